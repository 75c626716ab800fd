"""Rules of one's own come from outside by one call, and have contracts to be held to.

Allocations: tests/ranks/test_own_allocation.py; engines: tests/ops/test_engines.py; storages:
tests/ops/test_storage.py; families: tests/moe/test_own_family.py; formats: tests/export.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from registries import as_they_were
from tiny import make_batch, make_model, plain_loop, trainable

import drlora
from drlora.config.methods import METHODS, Method
from drlora.config.options import Option
from drlora.config.registry import SALIENCIES, STARTS
from drlora.ranks.starts import Start
from drlora.testing import check_allocation, check_method, check_saliency, check_start


@pytest.fixture(autouse=True)
def forget():
    """Whatever a test registers is gone after it."""
    with as_they_were():
        yield


@pytest.mark.parametrize("name", ["product", "routing", "importance", "random"])
def test_rules_that_come_along_keep_the_contract(name):
    check_saliency(name)


@pytest.mark.parametrize("name", ["uniform", "routing", "hot", "gradient"])
def test_starts_that_come_along_keep_the_contract(name):
    check_start(name)


@pytest.mark.parametrize("name", [*METHODS])
def test_methods_that_come_along_keep_the_contract(name):
    check_method(name, r_target=8, r_max=32, r_init=4)


@pytest.mark.parametrize(
    ("name", "settings"), [("grow", {}), ("prune", dict(r_init=6, r_target=4))]
)
def test_allocations_that_come_along_keep_the_contract(name, settings):
    check_allocation(name, **settings)


def test_growth_by_a_rule_of_ones_own_with_an_option():
    options = {"sharpness": Option(1.0, "exponent of f", low=0)}

    @SALIENCIES.register("sharp", options)
    def sharp(signals):
        return signals.frequency_E ** signals.options["sharpness"] * signals.importance_E

    check_saliency("sharp", options={"sharpness": 3})

    def ranks(sharpness):
        torch.manual_seed(0)
        config = drlora.DrLoraConfig(
            r_init=1, r_target=3, r_max=8, p_grow=0.5, warmup_steps=2, grow_every=3, settle_steps=1,
            saliency="sharp", options={"sharpness": sharpness},
        )  # fmt: skip
        model = get_peft_model(make_model(), config)
        dynamics = drlora.RankDynamics(model, 12)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        plain_loop(model, dynamics, optimizer, range(12), make_batch)
        return dynamics.ranks()

    assert ranks(1) == ranks(1) != ranks(9)


def test_a_start_and_a_method_of_ones_own():
    def two_for_one(found, config):
        order = sorted(range(len(found.share_E)), key=lambda e: -found.share_E[e])
        first = order[: len(order) // 2]
        return [2 * config.r_init - 1 if e in first else 1 for e in range(len(order))]

    STARTS.add("halves", Start(two_for_one, needs_routing=True))
    check_start("halves")
    METHODS.add("halves", Method("half of the experts", "here", lambda given: {
        "start": "halves", "r_init": given["r_target"]}))  # fmt: skip
    check_method("halves", r_max=40)
    model = get_peft_model(make_model(), drlora.DrLoraConfig.for_method("halves", r_target=4))
    drlora.place_ranks(model, [make_batch(0)])
    (ranks, *_) = drlora.rank_map(model).values()
    assert sorted(set(ranks["down"])) == [1, 7]


def broken(kind):
    """A rule that breaks one law, by the words that name it."""
    calls = iter(range(10**6))
    return {
        r"shape \(2,\), not \(E,\)": lambda s: s.frequency_E[:2],
        "is not finite": lambda s: s.frequency_E / 0,
        "the same signals give other numbers": lambda s: s.frequency_E + next(calls),
        "writes into its signals": lambda s: s.frequency_E.zero_() + 1,
        "list is no tensor": lambda s: s.frequency_E.tolist(),
    }[kind]


@pytest.mark.parametrize(
    "law",
    [
        r"shape \(2,\), not \(E,\)",
        "is not finite",
        "the same signals give other numbers",
        "writes into its signals",
        "list is no tensor",
    ],
)
def test_a_broken_rule_is_noticed(law):
    SALIENCIES.add("broken", broken(law))
    with pytest.raises(AssertionError, match=law):
        check_saliency("broken")


@pytest.mark.parametrize(
    ("law", "place"),
    [
        ("ranks in all, not 12", lambda f, c: [1] * 6),
        ("is not within 1 and r_max=24", lambda f, c: [0, 0, 3, 3, 3, 3]),
        ("is not one rank an expert", lambda f, c: [2.0] * 6),
    ],
)
def test_a_broken_start_is_noticed(law, place):
    STARTS.add("broken", Start(place))
    with pytest.raises(AssertionError, match=law):
        check_start("broken")


def test_a_broken_method_is_noticed():
    METHODS.add("more", Method("more", "here", lambda given: {"r_max": given["r_max"] + 1}))
    with pytest.raises(AssertionError, match="makes of its own settings"):
        check_method("more")
