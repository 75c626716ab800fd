"""Load of experts in the log, and a router's auxiliary loss that evens it out.

Run: make test ARGS=tests/trainer/test_router_log.py
"""

import json
import math

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_model
from tiny_run import save_all

from drlora import DrLoraConfig, RankDynamics, load_recipe, train
from drlora.trainer.router_log import RouterLog, evenness


def logged(folder, **training):
    """Log entries of a run with trained routers."""
    path = save_all(
        folder,
        adapter=dict(r_init=3, r_target=3, r_max=3, router="train"),
        training=dict(max_steps=12, save_strategy="no", **training),
        evaluation=dict(before=False, exact_match=False, samples=0),
    )
    train(load_recipe(path))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "router_entropy" in entry]


def test_a_run_logs_its_routers_and_the_auxiliary_loss_evens_them_out(tmp_path):
    """Off by default; on by `router_aux_loss_coef`, with more weight the load is more even."""
    off = logged(tmp_path / "off")
    on = logged(tmp_path / "on", router_aux_loss_coef=10.0)
    assert len(off) == len(on) == 12
    for entry in off + on:
        assert 0 < entry["router_entropy"] <= 1
        assert 1 <= entry["router_load_max"] <= 6
        assert 0 <= entry["router_dead"] < 1
    assert off[0]["router_drift"] == 0 or off[0]["router_drift"] < off[-1]["router_drift"]
    assert on[-1]["router_drift"] > 0
    late = [sum(e["router_entropy"] for e in entries[-4:]) for entries in (off, on)]
    assert late[1] > late[0] + 0.02


@pytest.mark.parametrize(
    ("shares", "even"),
    [([0.25] * 4, 1.0), ([1.0, 0.0, 0.0, 0.0], 0.0), ([0.5, 0.5, 0.0, 0.0], 0.5), ([1.0], 1.0)],
)
def test_evenness(shares, even):
    assert evenness(torch.tensor(shares)) == pytest.approx(even)


def test_what_is_counted_is_the_load_of_the_steps_since():
    """Against sums taken by hand."""
    model = get_peft_model(make_model(), DrLoraConfig(r_init=2, r_target=2, r_max=2))
    dynamics = RankDynamics(model, 4)
    log = RouterLog(dynamics, model)
    assert log.entries() == {}
    wanted = [torch.zeros(6) for _ in dynamics.adapters]
    for seed in range(2):
        model.train()
        model(**make_batch(seed)).loss.backward()
        for total_E, adapter in zip(wanted, dynamics.adapters.values(), strict=True):
            total_E += adapter.meter.sum_E
        log.count()
        dynamics.before_optimizer_step()
    found = log.entries()
    shares = [total_E / total_E.sum() for total_E in wanted]
    entropies = [float(-torch.xlogy(s, s).sum()) / math.log(6) for s in shares]
    assert found["router_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert found["router_load_max"] == pytest.approx(sum(6 * float(s.max()) for s in shares) / 2)
    assert "router_drift" not in found
    assert log.entries() == {}  # counting began anew
