"""Law 4, the schedule: the budget is reached exactly, or refused with the sums."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora import ConfigError, DrLoraConfig
from drlora.allocator import allocate
from drlora.schedule import plan_growth, simulate


def test_paper_v3_on_olmoe():
    """arXiv 2601.04823 v3: 128 modules a layer, about 183 events, Q = 23."""
    config = DrLoraConfig.preset("paper-v3")
    plan = plan_growth(config, num_experts=64, total_steps=38_000)
    assert len(plan.event_steps) == 183
    assert plan.event_steps[0] == 1140 + 200
    assert plan.event_steps[-1] <= 38_000 - 200
    assert plan.quota == 23 and plan.cost == 2
    assert config.grant_cap == 9
    assert plan.due(183) == plan.budget == 64 * 32


def test_paper_v5():
    config = DrLoraConfig.preset("paper-v5")
    plan = plan_growth(config, num_experts=64, total_steps=3_750)
    assert len(plan.event_steps) == 17
    assert plan.due(17) == 64 * 8


def test_half_of_the_events_do_not_suffice():
    """Trap 3: the quota is charged in the unit it is counted in."""
    plan = plan_growth(DrLoraConfig.preset("paper-v3"), 64, 38_000)
    assert plan.due(92) < 0.52 * plan.budget


@settings(max_examples=60)
@given(
    experts=st.integers(1, 12),
    r_init=st.integers(1, 4),
    more=st.integers(1, 6),
    extra=st.integers(0, 6),
    p_grow=st.sampled_from([0.05, 0.1, 0.3, 1.0]),
    steps=st.integers(1, 400),
    grow_every=st.integers(1, 60),
    rank_per=st.sampled_from(["expert", "projection"]),
    seed=st.integers(0, 99),
)
def test_whatever_the_saliency_the_budget_is_met(
    experts, r_init, more, extra, p_grow, steps, grow_every, rank_per, seed
):
    try:
        config = DrLoraConfig(
            r_init=r_init, r_target=r_init + more, r_max=r_init + more + extra, p_grow=p_grow,
            grow_every=grow_every, settle_steps=10, rank_per=rank_per,
        )  # fmt: skip
        plan = plan_growth(config, experts, steps)
    except ConfigError as error:
        assert any(word in str(error) for word in ("grow_every", "p_grow", "settle_steps"))
        return
    draw = random.Random(seed)
    ranks = [r_init] * experts
    for step in range(1, steps + 1):
        if event := plan.event_number(step):
            quota = plan.due(event) - (sum(ranks) - experts * r_init)
            grants = allocate(
                [draw.random() ** 8 for _ in ranks],
                ranks=ranks, quota=quota, cap=config.grant_cap, r_max=config.r_max,
            )  # fmt: skip
            ranks = [r + g for r, g in zip(ranks, grants, strict=True)]
    assert sum(ranks) == experts * config.r_target
    assert max(ranks) <= config.r_max


def test_a_run_that_is_too_short_is_refused_with_the_window():
    config = DrLoraConfig(grow_every=200, settle_steps=200)
    with pytest.raises(ConfigError, match=r"run of 300 steps has no growth event.*grow_every"):
        plan_growth(config, 8, 300)


def test_too_few_ranks_per_event_are_refused_with_the_sums():
    config = DrLoraConfig(r_init=2, r_target=12, r_max=22, p_grow=0.1, grow_every=50)
    with pytest.raises(ConfigError, match=r"8 \* 10 = 80 ranks .* only 48 are certain"):
        plan_growth(config, 8, 400)


def test_growth_that_fills_every_expert_is_planned_for_the_worst_order():
    """r_target = r_max: every expert must end full, whoever was preferred."""
    config = DrLoraConfig(r_init=1, r_target=5, r_max=5, p_grow=0.5, grow_every=10, settle_steps=0)
    plan = plan_growth(config, 4, 100)
    assert simulate(config, 4, plan)[-1] == [5] * 4


def test_no_growth_means_no_events():
    plan = plan_growth(DrLoraConfig(r_init=16, r_target=16, r_max=16), 8, 10)
    assert plan.event_steps == () and plan.event_number(5) == 0
