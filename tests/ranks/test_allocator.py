"""Law 4, the allocator: grants >= 0, sum <= quota, caps, ties, monotone in saliency."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora.ranks.allocator import allocate, allocate_in_layers, take_back

R_MAX = 8


@st.composite
def events(draw):
    experts = draw(st.integers(1, 8))
    vector = {"min_size": experts, "max_size": experts}
    return dict(
        saliency=draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 7.0]), **vector)),
        ranks=draw(st.lists(st.integers(0, R_MAX), **vector)),
        quota=draw(st.integers(0, 30)),
        cap=draw(st.integers(1, 6)),
        r_max=R_MAX,
    )


@given(events())
def test_grants_keep_every_limit_and_waste_nothing(event):
    grants = allocate(**event)
    room = [min(event["cap"], R_MAX - rank) for rank in event["ranks"]]
    assert all(0 <= g <= limit for g, limit in zip(grants, room, strict=True))
    assert sum(grants) == min(event["quota"], sum(room))


@given(events())
def test_a_more_salient_expert_is_served_first(event):
    grants, saliency = allocate(**event), event["saliency"]
    for low in range(len(grants)):
        for high in range(len(grants)):
            if saliency[high] > saliency[low] and grants[low] > 0:
                assert grants[high] == min(event["cap"], R_MAX - event["ranks"][high])


@given(events(), st.data())
def test_raising_saliency_never_lowers_the_grant(event, data):
    expert = data.draw(st.integers(0, len(event["ranks"]) - 1))
    raised = list(event["saliency"])
    raised[expert] += data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    assert allocate(**{**event, "saliency": raised})[expert] >= allocate(**event)[expert]


@given(events(), st.data())
def test_reserved_ranks_go_to_their_layer_and_none_is_wasted(event, data):
    first = data.draw(st.integers(0, len(event["ranks"])))
    sizes = [first, len(event["ranks"]) - first]
    one = data.draw(st.integers(0, event["quota"]))
    reserved = [one, data.draw(st.integers(0, event["quota"] - one))]
    grants = allocate_in_layers(**event, sizes=sizes, reserved=reserved)
    room = [min(event["cap"], R_MAX - rank) for rank in event["ranks"]]
    assert all(0 <= g <= limit for g, limit in zip(grants, room, strict=True))
    assert sum(grants) == sum(allocate(**event))
    for own, start, end in ((reserved[0], 0, first), (reserved[1], first, len(room))):
        assert sum(grants[start:end]) >= min(own, sum(room[start:end]))


@given(events(), st.floats(0, 1))
def test_what_is_taken_back_can_be_handed_out_again(event, share):
    ranks = [max(1, rank) for rank in event["ranks"]]
    event = {**event, "ranks": ranks}
    taken = take_back(**event, share=share)
    assert all(0 <= t <= min(event["cap"], r - 1) for t, r in zip(taken, ranks, strict=True))
    assert sum(taken) <= share * sum(ranks) + 1e-6
    if any(taken):
        full = [R_MAX if t else rank for t, rank in zip(taken, ranks, strict=True)]
        again = allocate(**{**event, "ranks": full, "quota": event["quota"] + sum(taken)})
        assert sum(again) == event["quota"] + sum(taken)
        least = sorted(range(len(ranks)), key=lambda e: (event["saliency"][e], -e))
        assert {e for e, t in enumerate(taken) if t} <= set(least[: len(ranks) // 2])


def test_ties_go_to_the_lower_number():
    assert allocate([1.0] * 4, ranks=[0] * 4, quota=5, cap=2, r_max=8) == [2, 2, 1, 0]


def test_saliency_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="expert 1 is nan"):
        allocate([0.0, float("nan")], ranks=[0, 0], quota=1, cap=1, r_max=2)
