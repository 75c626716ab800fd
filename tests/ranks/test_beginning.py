"""Where a run is: RankDynamics is told, and does not guess it from what the adapter holds."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import make_batch, make_model, plain_loop, trainable

import drlora
from drlora.adapter.inject import adapted_layers

SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=3, warmup_steps=2,
                settle_steps=1, router="train")  # fmt: skip
TOTAL, CUT = 12, 6  # events after steps 2, 5, 8 and 11


def start():
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS))
    return model, torch.optim.AdamW(trainable(model), lr=1e-2)


def trained(steps=CUT):
    model, optimizer = start()
    dynamics = drlora.RankDynamics(model, TOTAL)
    plain_loop(model, dynamics, optimizer, range(steps))
    return model, optimizer, dynamics


def births(model):
    layers = adapted_layers(model, "default").values()
    return torch.cat([p.birth for la in layers for p in la.adapter("default").rank_pools.values()])


def loaded(folder):
    model, _, _ = trained()
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(make_model(), folder, is_trainable=True)


@pytest.mark.parametrize("comes", ["from memory", "from a folder"])
def test_a_trained_adapter_without_a_step_is_refused_before_anything_changes(tmp_path, comes):
    model = loaded(tmp_path) if comes == "from a folder" else trained()[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dynamics = drlora.RankDynamics(model, TOTAL)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model.train()(**make_batch()).loss.backward()
    for call in (dynamics.before_optimizer_step, lambda: dynamics.after_optimizer_step(optimizer)):
        with pytest.raises(drlora.ConfigError, match="trained before.*step=0.*load_state_dict"):
            call()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_step_0_begins_a_new_run(tmp_path):
    model = loaded(tmp_path)
    assert births(model).any()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    dynamics = drlora.RankDynamics(model, TOTAL, step=0)
    plain_loop(model, dynamics, optimizer, range(1))
    assert dynamics.step == 1 and not births(model).any()


@pytest.mark.parametrize("told", ["step", "attribute", "state"])
def test_a_run_that_goes_on_is_the_straight_run_to_the_bit(told):
    model, optimizer, dynamics = trained(TOTAL)
    wanted, ranks = {k: v.clone() for k, v in model.state_dict().items()}, dynamics.ranks()
    model, optimizer, dynamics = trained()
    state = dynamics.state_dict()
    dynamics.release()
    again = drlora.RankDynamics(model, TOTAL, step=CUT if told == "step" else None)
    if told == "attribute":
        again.step = CUT
    if told == "state":
        again.load_state_dict(state)
    plain_loop(model, again, optimizer, range(CUT, TOTAL))
    assert again.step == TOTAL and again.ranks() == ranks
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_skipped_steps_are_part_of_where_a_run_is():
    model, optimizer, _ = trained()
    dynamics = drlora.RankDynamics(model, TOTAL, step=CUT, skipped=2)
    assert dynamics.run_step == CUT + 2 and dynamics.plan_step == CUT + 1, "settle_steps=1"


def test_routers_are_held_by_the_step_that_was_told():
    model, optimizer, dynamics = trained()
    dynamics.release()
    for step, is_held in ((0, True), (CUT, False)):
        again = drlora.RankDynamics(model, TOTAL, step=step)
        optimizer.zero_grad()
        model.train()(**make_batch()).loss.backward()
        assert again.routers.parameters
        assert all(bool(p.grad.any()) != is_held for p in again.routers.parameters)
        again.before_optimizer_step()
        assert all((p.grad is None) == is_held for p in again.routers.parameters)
        again.release()


def own(total=20, **changes):
    """A run whose events are after steps 10 and 16, and its young rows have clocks of their own."""
    settings = {**SETTINGS, "router": "frozen", "warmup_steps": 10, "grow_every": 6, **changes}
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**settings))
    return model, drlora.RankDynamics(model, total)


def adam(model, kind):
    return torch.optim.AdamW(trainable(model), lr=1e-3, weight_decay=0.0, fused=kind == "fused")


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_a_new_optimizer_gives_young_rows_their_first_steps(kind):
    """A checkpoint without the optimizer's state: the count of the new one begins at 0."""
    model, dynamics = own()
    plain_loop(model, dynamics, adam(model, kind), range(13))
    dynamics.release()
    dynamics, optimizer = drlora.RankDynamics(model, 20, step=13), adam(model, kind)
    plain_loop(model, dynamics, optimizer, range(13, 16))
    assert set(births(model).tolist()) == {0, 3}, "in steps of this optimizer"
    pools = [p for a in dynamics.adapters.values() for p in a.rank_pools.values()]
    young = [pool.birth == 3 for pool in pools]
    before = [pool.lora_B.detach().clone() for pool in pools]
    dynamics, state = drlora.RankDynamics(model, 20, step=16), optimizer.state_dict()
    optimizer = adam(model, kind)
    optimizer.load_state_dict(state)  # and resumed once more, with its state
    plain_loop(model, dynamics, optimizer, range(16, 17))
    assert set(births(model).tolist()) == {0, 3}
    for pool, rows, old in zip(pools, young, before, strict=True):
        moved = (pool.lora_B.detach() - old)[rows].abs()
        assert moved[moved > 0].median().item() == pytest.approx(1e-3, rel=0.01)


def test_the_plan_of_the_run_is_kept_where_only_the_step_is_told():
    """Ranks that begin unequal need a larger cap than the settings alone would give."""
    ranks = []
    for cut in (12, 4):
        torch.manual_seed(0)
        model, _ = own(12, warmup_steps=6, p_grow="auto")
        blocks = drlora.rank_map(model)
        drlora.start_ranks(
            model, {b: dict.fromkeys(p, [7, 1, 1, 1, 1, 1]) for b, p in blocks.items()}
        )
        dynamics = drlora.RankDynamics(model, 12)
        optimizer, planned = adam(model, "plain"), dynamics.schedule
        plain_loop(model, dynamics, optimizer, range(cut))
        dynamics.release()
        if cut < 12:
            dynamics = drlora.RankDynamics(model, 12, step=cut)
            assert dynamics.schedule == planned
            assert drlora.RankDynamics(model, 24, step=cut).schedule.total_steps == 24
            dynamics = drlora.RankDynamics(model, 12, step=cut, schedule=planned)
            plain_loop(model, dynamics, optimizer, range(cut, 12))
        assert dynamics.budget()[0] == dynamics.budget()[1]
        ranks.append(dynamics.ranks())
    assert ranks[0] == ranks[1]
