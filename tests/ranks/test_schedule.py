"""Law 4, the schedule: the budget is reached exactly, or refused with the sums."""

from __future__ import annotations

import random
from functools import cache
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora import ConfigError, DrLoraConfig
from drlora.ranks.allocator import allocate
from drlora.ranks.certain import certain_ranks
from drlora.ranks.schedule import (
    Competitors,
    GrowthPlan,
    Schedule,
    make_schedule,
    plan_growth,
)

# arXiv 2601.04823 v3, Table 10: mean rank at these steps of 37,997, and the events that give it
# (32 + 23 n / 128 of 128 modules a layer).
TABLE_10 = {6_000: (36.49, 25), 12_000: (41.88, 55), 18_000: (47.27, 85), 24_000: (52.66, 115),
            30_000: (58.05, 145), 37_800: (64.00, 184)}  # fmt: skip


def test_paper_v3_on_olmoe():
    """128 modules a layer, the first event at the end of the warm-up, Q = 23."""
    plan = plan_growth(DrLoraConfig.preset("paper-v3"), num_experts=64, total_steps=37_997)
    assert plan.event_steps[0] == 1140 and plan.spacing == 200
    assert plan.event_steps[-1] <= 37_997 - 200
    assert plan.quota == 23 and plan.cost == 2 and plan.cap == 9
    for step, (mean_rank, events) in TABLE_10.items():
        assert sum(event <= step for event in plan.event_steps) == events
        assert 32 + plan.due(events) / 64 == pytest.approx(mean_rank, abs=0.01)
    assert plan.due(184) == plan.budget == 64 * 32


def test_paper_v5():
    """18 events: after the warm-up of 3 % and then every 200 steps."""
    plan = plan_growth(DrLoraConfig.preset("paper-v5"), num_experts=64, total_steps=3_750)
    assert plan.event_steps == tuple(range(113, 3_551, 200)) and len(plan.event_steps) == 18
    assert plan.due(18) == 64 * 8 and plan.cap == 2


def test_without_a_warmup_something_is_observed_before_the_first_event():
    config = DrLoraConfig(warmup_steps=0, grow_every=5, settle_steps=0)
    assert make_schedule(config, [], 20).event_steps == (5, 10, 15, 20)


def test_half_of_the_events_do_not_suffice():
    """Trap 3: the quota is charged in the unit it is counted in."""
    plan = plan_growth(DrLoraConfig.preset("paper-v3"), 64, 37_997)
    assert plan.due(92) < 0.52 * plan.budget


def under_any_saliency(ranks, dues, base, cap, r_max) -> int:
    """The least sum of ranks at the end over every order of the experts at every event."""

    @cache
    def least(number: int, ranks: tuple[int, ...]) -> int:
        if number == len(dues):
            return sum(ranks)
        quota = max(0, dues[number] - (sum(ranks) - base))
        found = set()
        for order in permutations(range(len(ranks))):
            saliency = [float(-order.index(e)) for e in range(len(ranks))]
            grants = allocate(saliency, ranks=ranks, quota=quota, cap=cap, r_max=r_max)
            found.add(tuple(sorted(r + g for r, g in zip(ranks, grants, strict=True))))
        return min(least(number + 1, next_ranks) for next_ranks in found)

    return least(0, tuple(sorted(ranks)))


@settings(max_examples=150, deadline=None)
@given(
    r_init=st.integers(1, 2), more=st.integers(1, 3), extra=st.integers(0, 3),
    cap=st.integers(1, 5), events=st.integers(1, 6), cost=st.integers(1, 2),
    first_event=st.integers(1, 2), moved=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)),
                                                  max_size=3), experts=st.integers(1, 4),
)  # fmt: skip
def test_what_is_certain_is_what_the_worst_saliency_leaves(
    r_init, more, extra, cap, events, cost, first_event, moved, experts
):
    """Against all orders of up to four experts at every event, from equal and unequal starts."""
    r_max, base = r_init + more + extra, experts * r_init
    config = DrLoraConfig(r_init=r_init, r_target=r_init + more, r_max=r_max)
    budget = experts * more
    plan = GrowthPlan(tuple(range(1, events + 1)), -(-cost * budget // events), cost, budget, base,
                      cap)  # fmt: skip
    start = [r_init] * experts
    for giver, taker in moved:
        giver, taker = giver % experts, taker % experts
        if start[giver] > 1 and start[taker] < r_max:
            start[giver], start[taker] = start[giver] - 1, start[taker] + 1
    first = min(first_event, events)
    dues = [plan.due(event) for event in range(first, events + 1)]
    wanted = under_any_saliency(start, dues, base, cap, r_max)
    found = certain_ranks(config, experts, plan, start, first)
    assert (found == base + budget) == (wanted == base + budget) and found >= wanted


@settings(max_examples=60)
@given(
    experts=st.integers(1, 12),
    r_init=st.integers(1, 4),
    more=st.integers(1, 6),
    extra=st.integers(0, 6),
    p_grow=st.sampled_from(["auto", 0.05, 0.1, 0.3, 1.0]),
    steps=st.integers(1, 400),
    grow_every=st.one_of(st.just("auto"), st.integers(1, 60)),
    settle_steps=st.sampled_from(["auto", 0, 10]),
    rank_per=st.sampled_from(["expert", "projection"]),
    seed=st.integers(0, 99),
)
def test_whatever_the_saliency_the_budget_is_met(
    experts, r_init, more, extra, p_grow, steps, grow_every, settle_steps, rank_per, seed
):
    chosen_by_user = [v for v in (p_grow, grow_every, settle_steps) if v != "auto"]
    try:
        config = DrLoraConfig(
            r_init=r_init, r_target=r_init + more, r_max=r_init + more + extra, p_grow=p_grow,
            grow_every=grow_every, settle_steps=settle_steps, options={"rank_per": rank_per},
        )  # fmt: skip
        plan = plan_growth(config, experts, steps)
    except ConfigError as error:
        assert chosen_by_user, error
        assert any(word in str(error) for word in ("grow_every", "p_grow", "settle_steps"))
        return
    draw = random.Random(seed)
    ranks = [r_init] * experts
    for step in range(1, steps + 1):
        if event := plan.event_number(step):
            quota = plan.due(event) - (sum(ranks) - experts * r_init)
            grants = allocate(
                [draw.random() ** 8 for _ in ranks],
                ranks=ranks, quota=quota, cap=plan.cap, r_max=config.r_max,
            )  # fmt: skip
            ranks = [r + g for r, g in zip(ranks, grants, strict=True)]
    assert sum(ranks) == experts * config.r_target
    assert max(ranks) <= config.r_max


def test_a_run_that_is_too_short_is_refused_with_the_window():
    config = DrLoraConfig(grow_every=200, settle_steps=200)
    with pytest.raises(ConfigError, match=r"run of 205 steps has no growth event.*grow_every"):
        plan_growth(config, 8, 205)


def test_too_few_ranks_per_event_are_refused_with_the_sums():
    settings = dict(r_init=2, r_target=12, r_max=22, grow_every=50, settle_steps=200)
    with pytest.raises(ConfigError, match=r"8 \* 10 = 80 ranks .* only 64 are certain"):
        plan_growth(DrLoraConfig(**settings, p_grow=0.1), 8, 400)
    assert plan_growth(DrLoraConfig(**settings), 8, 400).cap == 3  # auto: one more a cap suffices


@pytest.mark.parametrize("ranks", [(1, 2, 4), (2, 4, 8), (4, 8, 12), (8, 16, 32)])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16, 50, 64, 299, 1_000, 3_750])
def test_every_length_of_run_has_a_schedule(ranks, steps):
    """Nothing but ranks is set: the budget is spent in a run of any length."""
    config = DrLoraConfig(r_init=ranks[0], r_target=ranks[1], r_max=ranks[2])
    plan = plan_growth(config, 16, steps)
    assert certain_ranks(config, 16, plan) == 16 * ranks[1]
    assert len(plan.event_steps) >= min(16, steps - 2)
    assert all(1 <= step <= steps for step in plan.event_steps)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (38_000, Schedule(38_000, 1_140, 200, 200, 2)),
        (3_750, Schedule(3_750, 113, 200, 200, 2)),
        (2_000, Schedule(2_000, 60, 116, 200, 2)),  # 16 events, one in ten steps settles
        (800, Schedule(800, 24, 46, 80, 2)),
        (50, Schedule(50, 2, 2, 5, 2)),
        (16, Schedule(16, 1, 1, 1, 2)),
    ],
)
def test_auto_is_as_published_where_that_fits_and_follows_the_length_where_not(steps, expected):
    assert make_schedule(DrLoraConfig(), [Competitors(16)], steps) == expected


def test_numbers_that_were_given_are_kept_or_refused():
    kept = make_schedule(DrLoraConfig(grow_every=7), [Competitors(16)], 50)
    assert (kept.grow_every, kept.settle_steps) == (7, 5)
    with pytest.raises(ConfigError, match="settle_steps=200 are kept"):
        make_schedule(DrLoraConfig(settle_steps=200), [Competitors(16)], 50)
    with pytest.raises(ConfigError, match="settle_steps=0 .auto.*grow_every=1 .auto."):
        make_schedule(DrLoraConfig(warmup_steps=60), [Competitors(16)], 50)


def test_the_cap_is_at_least_one():
    config = DrLoraConfig(r_init=2, r_target=4, r_max=8, p_grow=0.1)  # floor(0.1 * 6) = 0
    assert plan_growth(config, 8, 100).cap == 1


def test_one_cap_serves_blocks_of_different_size():
    config = DrLoraConfig(r_init=1, r_target=8, r_max=16)
    schedule = make_schedule(config, [Competitors(4), Competitors(64)], 8)
    for experts in (4, 64):
        plan = plan_growth(config, experts, 8)
        assert plan.cap <= schedule.cap


def test_an_expert_that_is_neglected_to_the_last_is_planned_for():
    """Preferring always the same experts is not the worst: 2 of 8 ranks would be left over."""
    with pytest.raises(ConfigError, match="only 7 are certain"):
        plan_growth(DrLoraConfig(r_init=1, r_target=3, r_max=3, p_grow=0.5, grow_every=1,
                                 warmup_steps=1, settle_steps=1), 4, 5)  # fmt: skip
    assert plan_growth(DrLoraConfig(r_init=1, r_target=3, r_max=3), 4, 5).cap == 2


def test_growth_that_fills_every_expert_is_planned_for_the_worst_order():
    """r_target = r_max: every expert must end full, whoever was preferred."""
    config = DrLoraConfig(r_init=1, r_target=5, r_max=5, p_grow=0.5, grow_every=10, settle_steps=0)
    plan = plan_growth(config, 4, 100)
    assert certain_ranks(config, 4, plan) == 4 * 5


def test_no_growth_means_no_events():
    plan = plan_growth(DrLoraConfig(r_init=16, r_target=16, r_max=16), 8, 10)
    assert plan.event_steps == () and plan.event_number(5) == 0


@pytest.mark.parametrize("target", [16, 8])
def test_routers_that_would_never_train_are_refused(target):
    settings = dict(r_init=8, r_target=target, router="train", settle_steps=0)
    config = DrLoraConfig(**settings, warmup_steps=10)
    with pytest.raises(ConfigError, match="train no router: a run of 10 steps .*warmup_steps=10"):
        make_schedule(config, [Competitors(6)], 10)
    make_schedule(config, [Competitors(6)], 11)
    make_schedule(DrLoraConfig(**settings), [Competitors(6)], 1)  # a trial of one step
