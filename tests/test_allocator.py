"""Law 4, the allocator: grants >= 0, sum <= quota, caps, ties, monotone in saliency."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora.allocator import allocate

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


def test_ties_go_to_the_lower_number():
    assert allocate([1.0] * 4, ranks=[0] * 4, quota=5, cap=2, r_max=8) == [2, 2, 1, 0]


def test_saliency_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="expert 1 is nan"):
        allocate([0.0, float("nan")], ranks=[0, 0], quota=1, cap=1, r_max=2)
