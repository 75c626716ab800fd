"""The contract of policies: those of the package keep it, and each law refuses who breaks it."""

from __future__ import annotations

import pytest
import torch

import drlora
from drlora.config.registry import ALLOCATIONS
from drlora.ranks.contract import check_allocation
from drlora.ranks.policies import Change, Grow, Policy

GROWS = dict(r_init=2, r_target=4)
MOVES = dict(r_init=4, r_target=4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grow", {}),
        ("grow", dict(p_grow="auto", grow_every="auto", settle_steps="auto")),
        ("grow", dict(options=dict(move_share=0.2))),
        ("grow", {**MOVES, "options": dict(move_share=0.2)}),
        ("grow", dict(budget_scope="model", options=dict(layer_floor=0.5))),
        ("prune", dict(r_init=6)),
        ("prune", dict(r_init=8, options=dict(rank_importance="sensitivity"))),
        ("prune", MOVES),
    ],
)
@pytest.mark.parametrize("saliency", ["product", "random"])
def test_the_policies_of_the_package_keep_it(name, settings, saliency):
    check_allocation(name, saliency=saliency, **settings)


class Idle(Policy):
    def change(self, config, scored, event):
        return Change()


class Greedy(Policy):
    """Everything that is due to the first expert."""

    def change(self, config, scored, event):
        due = scored.group.plan.owned(event) - sum(scored.group.ranks())
        return Change(granted=[due] + [0] * (len(scored.saliency_E) - 1))


class TooMuch(Policy):
    def change(self, config, scored, event):
        return Change(granted=[1] * len(scored.saliency_E))


class FreesFreeRows(Policy):
    def change(self, config, scored, event):
        last = len(scored.group.members[0].pools[0].owner) - 1
        return Change(freed=[[last]] + [[]] * (len(scored.group.members) - 1))


class FreesTwice(Policy):
    def change(self, config, scored, event):
        return Change(freed=[[0, 0]] + [[]] * (len(scored.group.members) - 1))


class ForgetsAnExpert(Policy):
    def change(self, config, scored, event):
        return Change(granted=[0] * (len(scored.saliency_E) - 1))


class Remembers(Grow):
    """Grows by the number of its calls, which no checkpoint holds."""

    def __init__(self):
        self.calls = 0

    def change(self, config, scored, event):
        self.calls += 1
        shifted = scored.saliency_E[self.calls % 6 :] + scored.saliency_E[: self.calls % 6]
        return super().change(config, scored._replace(saliency_E=shifted), event)


class RollsDice(Grow):
    def change(self, config, scored, event):
        dice = torch.rand(len(scored.saliency_E)).tolist()
        return super().change(config, scored._replace(saliency_E=dice), event)


class Writes(Grow):
    def change(self, config, scored, event):
        scored.group.members[0].pools[0].importance[:1] += 1
        return super().change(config, scored, event)


@pytest.mark.parametrize(
    ("policy", "settings", "error", "said"),
    [
        (Idle(), GROWS, AssertionError, "12 ranks are owned in the end, not 24"),
        (Greedy(), GROWS, drlora.ConfigError, r"granted \d ranks, the cap is|gets rank \d+, r_max"),
        (TooMuch(), MOVES, drlora.ConfigError, "own 30 ranks together, 24 are allowed"),
        (FreesFreeRows(), GROWS, drlora.ConfigError, "row 23 of first is freed, but nobody owns"),
        (FreesTwice(), GROWS, drlora.ConfigError, "a row of first is freed twice"),
        (ForgetsAnExpert(), GROWS, drlora.ConfigError, "there are 5 grants for 6 experts"),
        (Remembers(), GROWS, AssertionError, "two runs differ|ends with other ranks"),
        (RollsDice(), GROWS, AssertionError, "two runs differ|ends with other ranks"),
        (Writes(), GROWS, AssertionError, "`change` itself writes into the pools of 'first'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_who_breaks_a_law_is_told_which(policy, settings, error, said):
    ALLOCATIONS.add("broken", policy, ALLOCATIONS.options_of("grow"))
    try:
        with pytest.raises(error, match=said):
            check_allocation("broken", **settings)
    finally:
        ALLOCATIONS.remove("broken")


def test_it_leaves_the_generator_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    check_allocation("grow")
    assert torch.equal(torch.rand(2), wanted)


def test_ranks_out_of_order_are_the_policys_to_refuse():
    with pytest.raises(drlora.ConfigError, match="out of order.*r_init=4, r_target=2"):
        check_allocation("grow", r_init=4, r_target=2)
    with pytest.raises(drlora.ConfigError, match="'prune' goes down from r_init=2 to r_target=4"):
        check_allocation("prune")
    with pytest.raises(drlora.ConfigError, match="allocation='nobody' is not known.*grow.*prune"):
        check_allocation("nobody")
