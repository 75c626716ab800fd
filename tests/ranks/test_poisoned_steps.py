"""Poisoned steps: statistics stay finite, no event is lost, and the log says what happened.

Every run here is 15 steps long, with growth after plan steps 5, 9 and 13.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_model, trainable
from tiny_trainer import STEPS, dynamics_of, make_trainer

import drlora
from drlora.io.jsonl import read_lines
from drlora.runs.metrics_log import MetricsLog

SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=4, warmup_steps=5,
                settle_steps=2, lora_alpha=8.0)  # fmt: skip
TOTAL, EVENTS = 15, (5, 9, 13)
NAN, INF = float("nan"), float("inf")


class Run:
    """The plain loop, with something going wrong at some steps (counted from 1).

    Args:
        at: the steps.
        spoil: what is done to the gradients of the run there, before clipping.
        skip: whether the optimizer leaves these steps out, as a GradScaler makes it do.
        batch: what the model is called with there.
        clip: greatest norm of the gradients, at every step.
        changes: to the settings.
    """

    def __init__(self, at=(), spoil=None, skip=False, batch=None, clip=None, **changes):
        self.at, self.spoil, self.skip, self.batch, self.clip = at, spoil, skip, batch, clip
        config = drlora.DrLoraConfig(**{**SETTINGS, **changes})
        self.model = get_peft_model(make_model(), config).train()
        self.dynamics = drlora.RankDynamics(self.model, TOTAL)
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=1e-2)
        self.grants, self.said, self.before, self.after = [], [], {}, {}

    @property
    def groups(self):
        return self.dynamics.growth.groups

    @property
    def pools(self):
        return [p for a in self.dynamics.adapters.values() for p in a.rank_pools.values()]

    def go(self, steps=range(1, TOTAL + 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in steps:
                self._step(step, step in self.at)
        self.said += [str(warning.message) for warning in said]
        return self

    def _step(self, step, spoilt):
        batch = self.batch if spoilt and self.batch else make_batch
        self.model(**batch(step)).loss.backward()
        if spoilt and self.spoil:
            self.spoil(self)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(trainable(self.model), self.clip)
        if spoilt:
            self.before = self.dynamics.state_dict()
        self.dynamics.before_optimizer_step()
        if spoilt:
            self.after = self.dynamics.state_dict()
        skipped = spoilt and self.skip
        if not skipped:
            self.optimizer.step()
        self.grants += self.dynamics.after_optimizer_step(self.optimizer, skipped=skipped)
        self.optimizer.zero_grad()
        assert all(value.isfinite().all() for value in self.dynamics.state_dict().values())

    def changed(self, statistic):
        """Whether the last spoilt step changed it, for every block or pool."""
        keys = [key for key in self.after if key.endswith(f".{statistic}")]
        return [not torch.equal(self.after[key], self.before[key]) for key in keys]

    def assert_all_grown(self, at=EVENTS):
        assert sorted({grant.step for grant in self.grants}) == list(at)
        assert all(group.plan.owned(3) == sum(group.ranks()) for group in self.groups)


def nan_of_one_expert(run):
    for pool in run.pools:
        pool.lora_A.grad[pool.owner == 1] = NAN


def infinity_in_one_element(run):
    run.pools[-1].lora_B.grad[0, 0] = INF


def nan_of_all(run):
    for parameter in trainable(run.model):
        parameter.grad.fill_(NAN)


def nan_in_a_young_row(run):
    young = run.pools[0].birth.nonzero()[0]
    run.pools[0].lora_A.grad[young] = NAN


GRADIENTS = {
    "NaN of one expert": (nan_of_one_expert, None),
    "infinite element": (infinity_in_one_element, None),
    "NaN of all": (nan_of_all, None),
    "NaN in a young row": (nan_in_a_young_row, None),
    # Clipping divides by an infinite norm: the rest becomes 0, the element NaN.
    "clipped to NaN": (infinity_in_one_element, 1.0),
}


@pytest.mark.parametrize("case", GRADIENTS)
@pytest.mark.parametrize("skip", [True, False], ids=["skipped", "taken"])
def test_gradients_that_are_not_finite(case, skip):
    """They leave the importance of all rows as it was, to the bit; routing is counted."""
    spoil, clip = GRADIENTS[case]
    run = Run(at=(6, 7), spoil=spoil, skip=skip, clip=clip).go()
    assert run.after and not any(run.changed("importance"))
    if skip:
        # Two steps later, as settle_steps allows; nothing was harmed, so there is nothing to say.
        run.assert_all_grown(at=(5, 11, 15))
        assert all(run.changed("frequency")) and run.dynamics.poisoned_steps == 0
        assert not run.said and all(p.isfinite().all() for p in run.model.parameters())
    else:
        run.assert_all_grown()
        assert run.dynamics.poisoned_steps >= 2
        (told,) = [said for said in run.said if "NaN or infinite" in said]
        assert "of the 9 steps so far" in told, "at the first event after it"


@pytest.mark.parametrize(
    "changes",
    [
        dict(options={"young_a": "gradient"}),
        dict(options={"rank_importance": "sensitivity"}),
        dict(r_init=6, allocation="prune", options={"rank_importance": "sensitivity"}),
        dict(options={"move_share": 0.2}),
        dict(budget_scope="model", options={"layer_floor": 0.5}),
        dict(options={"rank_per": "projection"}, young_rows="inherit"),
    ],
    ids=lambda changes: ",".join(changes),
)
def test_other_settings_survive_nan_weights(changes):
    """The optimizer took a NaN: from then on the model computes nothing else."""
    run = Run(at=(4,), spoil=nan_of_one_expert, **changes).go()
    assert any(not parameter.isfinite().all() for parameter in run.model.parameters())
    run.assert_all_grown()


@pytest.mark.parametrize(
    ("skipped", "events"),
    [
        ((5,), (6, 10, 14)),  # an event falls on it: it takes place after the next step
        ((6, 7, 8), (5, 11, 15)),  # all between two events, one more than settle_steps
        ((2, 4, 6, 8, 10, 12, 14), (7, 11, 15)),
        (tuple(range(10, 16)), (5, 9, 15)),  # up to the end: the last event is on a skipped step
    ],
)
def test_skipped_steps_lose_no_event(skipped, events):
    """Also where the state was saved among them and loaded again."""
    run = Run(at=skipped, skip=True).go(range(1, 12))
    state, run.dynamics = run.dynamics.state_dict(), drlora.RankDynamics(run.model, TOTAL)
    run.dynamics.load_state_dict(state)
    run.go(range(12, TOTAL + 1))
    run.assert_all_grown(events)
    assert run.dynamics.skipped == len(skipped) and run.dynamics.run_step == TOTAL
    for pool in run.pools:  # births are of the optimizer's own count
        assert pool.birth.max() <= run.dynamics.step == TOTAL - len(skipped)
    assert not run.said
    run.dynamics.load_state_dict({k: v for k, v in state.items() if k != "skipped"})
    assert run.dynamics.skipped == 0, "states of 0.1"


@pytest.mark.parametrize("clip", [None, 1e-3], ids=["unclipped", "clipped"])
def test_a_spike_outweighs_other_steps_unless_it_is_clipped(clip):
    """Gradients 1e6 times as large are importance 1e12 times as large: the published rule."""

    def spike(run, factor=1e6):
        for parameter in trainable(run.model):
            parameter.grad *= factor

    plain, spiked = Run(clip=clip).go(range(1, 5)), Run(at=(4,), spoil=spike, clip=clip)
    spiked.go(range(1, 5))
    for one, other in zip(plain.pools, spiked.pools, strict=True):
        if clip:
            torch.testing.assert_close(other.importance, one.importance, rtol=1e-3, atol=0.0)
        else:
            assert (other.importance > 1e9 * one.importance).any()
    spiked.go(range(5, TOTAL + 1)).assert_all_grown()
    assert spiked.dynamics.poisoned_steps == 0 and not spiked.said


@pytest.mark.parametrize("factor", [1e18, 1e30])
def test_a_spike_beyond_what_float32_holds(factor):
    """Averages near its end have no finite sum; beyond it the step counts as poisoned."""

    def spike(run):
        for pool in run.pools:
            if factor < 1e20:
                pool.lora_A.grad.fill_(factor)
                pool.lora_B.grad.fill_(factor)
                pool.importance.fill_(torch.finfo(torch.float32).max)
            else:
                pool.lora_A.grad.mul_(factor)
                pool.lora_B.grad.mul_(factor)

    run = Run(at=(5,), spoil=spike).go()
    run.assert_all_grown()
    assert run.dynamics.poisoned_steps == (factor > 1e20)
    assert any("NaN or infinite" in said for said in run.said) == (factor > 1e20)


def padding_alone(step):
    ids = make_batch(step)["input_ids"]
    return {
        "input_ids": torch.zeros_like(ids),
        "labels": torch.full_like(ids, -100),
        "attention_mask": torch.zeros_like(ids),
    }


def test_batches_of_padding_alone():
    """The mean loss of no token is NaN, its gradient is zero; one falls on an event."""
    run = Run(at=(4, 5, 10), batch=padding_alone).go()
    assert not any(run.changed("frequency"))
    run.assert_all_grown()
    assert run.dynamics.poisoned_steps == 0 and not run.said


@pytest.mark.parametrize("steps", [range(4, 9), range(1, TOTAL + 1)], ids=["some", "all"])
def test_a_layer_without_tokens(steps):
    """Left out as a whole, as LayerDrop does: its averages stay, and it grows with the others."""
    run = Run(at=steps)
    mlp = run.model.get_base_model().model.layers[1].mlp
    forward = mlp.forward
    for step in range(1, TOTAL + 1):
        mlp.forward = torch.zeros_like if step in steps else forward
        run.go(range(step, step + 1))
        if step in steps:
            assert not run.changed("frequency")[1] and run.changed("frequency")[0]
            assert not any(run.changed("importance")[2:])
    run.assert_all_grown()
    if len(steps) == TOTAL:
        assert len(run.said) == 1 and "layers.1" in run.said[0]
        assert "no expert has any saliency" in run.said[0]
    else:
        assert not run.said


def test_an_expert_that_is_never_chosen_gets_nothing():
    run = Run()

    def never_0(module, args, output):
        logits = output[0].clone()
        logits[:, 0] = -INF
        weight, index = logits.softmax(-1).topk(2)
        return logits, weight, index

    base = run.model.get_base_model()
    for adapter in run.dynamics.adapters.values():
        base.get_submodule(adapter.block.router_name).register_forward_hook(never_0)
    run.go().assert_all_grown()
    for adapter in run.dynamics.adapters.values():
        assert adapter.frequency[0] == 0 and (adapter.frequency[1:] > 0).all()
        for pool in adapter.rank_pools.values():
            assert (pool.importance[pool.owner == 0] == 0).all()
        assert all(ranks[0] == SETTINGS["r_init"] for ranks in adapter.ranks().values())
    assert not run.said


def test_a_fused_optimizer_under_a_grad_scaler_in_the_trainer(tmp_path):
    """It skips without accelerate knowing, and only clipping would unscale before the signals."""
    found = {}
    for name, scale, overflow in (("plain", None, ()), ("scaled", 2.0**10, ()),
                                  ("overflow", 2.0**10, (3,))):  # fmt: skip
        log = tmp_path / f"{name}.jsonl"
        trainer = make_trainer(tmp_path / name, optim="adamw_torch_fused", max_grad_norm=0.0,
                               save_strategy="no", callbacks=[MetricsLog(log)])  # fmt: skip
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        calls = []

        def spoil(grad, calls=calls, overflow=overflow):
            calls.append(1)
            return grad * INF if len(calls) in overflow else grad

        trainable(trainer.model)[0].register_hook(spoil)
        trainer.train()
        found[name] = dynamics_of(trainer)
        entries = [e for e in read_lines(log) if "loss" in e]
    plain, scaled, overflow = (found[n].state_dict() for n in ("plain", "scaled", "overflow"))
    assert all(torch.equal(scaled[key], plain[key]) for key in plain), "signals were scaled"
    assert overflow["skipped"] == 1 and overflow["step"] == STEPS - 1
    assert found["overflow"].budget()[0] == found["overflow"].budget()[1]
    assert [e.get("skipped_steps", 0) for e in entries] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert not any("poisoned_steps" in e for e in entries)


def test_the_trainer_tells_of_poisoned_steps(tmp_path):
    """In metrics and, once, in a warning: at the end where no event comes after them."""
    log = tmp_path / "metrics.jsonl"
    trainer = make_trainer(tmp_path, save_strategy="no", callbacks=[MetricsLog(log)])
    calls = []

    def spoil(grad):
        calls.append(1)
        return grad * NAN if len(calls) == STEPS else grad

    trainable(trainer.model)[0].register_hook(spoil)
    with pytest.warns(UserWarning, match="1 of the 8 steps so far") as said:
        trainer.train()
    assert len(said) == 1
    last = [entry for entry in read_lines(log) if "loss" in entry][-1]
    assert last["poisoned_steps"] == 1 and last["step"] == STEPS
