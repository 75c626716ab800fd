"""The formulas behind the tables, on numbers that were worked out by hand or taken from tables."""

import math
from types import SimpleNamespace

import pytest

from drlora.compare.curves import lowest, mean_curve, share_until, step_at
from drlora.compare.metrics import items_of, value_of
from drlora.compare.statistics import (
    incomplete_beta,
    interval,
    item_gain,
    mean_gain,
    paired_gain,
    t_cdf,
    t_quantile,
)
from drlora.compare.tables import models_table, shown_share


@pytest.mark.parametrize(
    ("df", "expected"),
    # Two-sided 95 %, from printed tables of Student's t.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)],
)
def test_t_quantile_is_the_tables(df, expected):
    assert t_quantile(0.975, df) == pytest.approx(expected, abs=5e-4)


def test_t_quantile_in_closed_form():
    # df = 1 is Cauchy's distribution; df = 2 has 2 t / sqrt(1 - t^2) with t = p - 1/2 doubled.
    for p in (0.5, 0.6, 0.9, 0.975, 0.995):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-12)
        u = 2 * p - 1
        assert t_quantile(p, 2) == pytest.approx(u * math.sqrt(2 / (1 - u * u)), rel=1e-9, abs=1e-7)
    assert t_cdf(-2.0, 5) == pytest.approx(1 - t_cdf(2.0, 5), rel=1e-12)
    for bad in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="needs"):
            t_quantile(*bad)


def test_incomplete_beta_in_closed_form():
    for x in (0.0, 0.1, 0.5, 0.83, 1.0):
        assert incomplete_beta(1, 1, x) == pytest.approx(x, abs=1e-14)
        assert incomplete_beta(2, 3, x) == pytest.approx(6 * x**2 - 8 * x**3 + 3 * x**4, abs=1e-13)
        assert incomplete_beta(0.5, 0.5, x) == pytest.approx(
            2 / math.pi * math.asin(math.sqrt(x)), abs=1e-13
        )


def test_interval():
    found = interval([2.0, 4.0, 6.0])
    assert (found.n, found.mean, found.sd) == (3, 4.0, 2.0)
    half = 4.302653 * 2 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((4 - half, 4 + half), rel=1e-6)
    assert not found.is_above_zero and not found.is_below_zero
    assert interval([5.0, 5.1, 5.2]).is_above_zero
    assert interval([-5.0, -5.1, -5.2]).is_below_zero
    one = interval([3.0])
    assert (one.n, one.mean, one.sd, one.low, one.high) == (1, 3.0, None, None, None)
    assert not one.is_above_zero


def test_gains_are_paired_by_seed_and_positive_where_better():
    baseline = {1: 1.0, 2: 2.0, 3: 3.0, 4: 9.0}
    method = {3: 2.9, 2: 1.8, 1: 1.0, 5: 0.0}
    found = paired_gain(baseline, method, higher_is_better=False)
    assert found.difference.mean == pytest.approx(0.1)
    assert found.difference.n == 3  # seeds 4 and 5 have no partner
    assert (found.wins, found.ties) == (2, 1)
    # The spread is the differences', far below that of the metrics.
    assert found.difference.sd == pytest.approx(0.1)
    other = paired_gain(baseline, method, higher_is_better=True)
    assert other.difference.mean == pytest.approx(-0.1)
    assert (other.wins, other.ties) == (0, 1)
    assert paired_gain({1: 1.0}, {2: 1.0}, True) is None


def test_mean_over_tasks_is_paired_by_seed():
    # Seed effects that both tasks share do not cancel; those of opposite sign do.
    found = mean_gain({"a": {1: 1.0, 2: 3.0, 3: 5.0}, "b": {1: 3.0, 2: 1.0, 4: 0.0}})
    assert found.difference.n == 2
    assert (found.difference.mean, found.difference.sd) == (2.0, 0.0)
    assert found.wins == 2
    assert mean_gain({"a": {1: 1.0}, "b": {}}) is None
    assert mean_gain({}) is None


def test_gain_over_items_averages_the_runs_first():
    baseline, method = [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], [[0.0, 2.0, 4.0], [2.0, 2.0, 2.0]]
    found = item_gain(baseline, method, higher_is_better=False)
    expected = interval([1.0, 1.0, 1.0])
    assert found == expected
    spread = item_gain([[1.0, 1.0]], [[2.0, 4.0]], higher_is_better=True)
    assert spread == interval([1.0, 3.0])


def test_items_have_the_metric_as_their_mean():
    after = {"loss": {"loss": 0.75, "target_tokens": 8}, "match": {"accuracy": 2 / 3}}
    result = {"after": after, "items": {"loss_centinats": [100, 200, 300], "is_correct": "101"}}
    for metric in ("loss", "exact_match"):
        items = items_of(metric, result)
        assert sum(items) / len(items) == pytest.approx(value_of(metric, after))
    assert items_of("error_rate", result) is None
    assert items_of("exact_match", {"after": after}) is None
    diverged = {"after": after, "items": {"loss_centinats": [100, None, 300]}}
    assert items_of("loss", diverged) is None


def test_over_all_models_each_task_of_each_weighs_the_same():
    losses = {
        # (model, task): lora, static, drlora; two seeds each
        ("a", "one"): ([2.0, 2.0], [3.0, 3.0], [1.8, 1.9]),  # over lora: 10 and 5 %
        ("a", "two"): ([4.0, 4.0], [2.0, 2.0], [2.2, 2.1]),  # lora 45, 47.5; static -10, -5
        ("b", "one"): ([1.0, 1.0], [2.0, 2.0], [0.9, 0.9]),  # 10 and 10
        ("b", "two"): ([1.0, 1.0], [2.0, 2.0], [0.8, 0.8]),  # 20 and 20
    }
    methods = ["lora", "static", "drlora"]

    def values(metric, place):
        *where, method = place
        return dict(zip((1, 2), losses[tuple(where)][methods.index(method)], strict=True))

    plan = SimpleNamespace(models=["a", "b"], methods=methods, baselines=methods[:2],
                           seeds_of=lambda task: (1, 2))  # fmt: skip
    lines = models_table(SimpleNamespace(plan=plan, values=values), "loss", ["one", "two"])
    assert lines[0].split(" | ")[1:3] == ["over `lora`", "over the best baseline of each"]
    static, drlora = lines[2:4]
    # Over lora: (-50 + 50 - 100 - 100) / 4.
    assert "-50.00" in static and static.endswith("|  |  |")
    # (85 + 82.5) / 8 over lora; (30 + 30) / 8 over the best, static where lora is 4.0.
    assert "+20.94" in drlora and "| **+7.50 [+7.50, +7.50]** 2/2 | 2, 0, 4 |" in drlora


def test_the_first_step_at_a_loss_is_linear_between_points():
    curve = [[10, 3.0], [20, 2.0], [30, 2.5], [40, 1.0]]
    assert step_at(curve, 4.0) == 10  # there already
    assert step_at(curve, 2.25) == 17.5
    assert step_at(curve, 2.0) == 20
    assert step_at(curve, 1.5) == pytest.approx(30 + 10 * 1.0 / 1.5)
    assert step_at(curve, 0.9) is None


def test_curves_are_averaged_where_all_seeds_have_a_point():
    assert mean_curve({1: [[1, 2.0], [2, 1.0]], 2: [[2, 3.0], [3, 0.0]]}) == [(2, 2.0)]
    assert mean_curve({}) == []
    assert lowest({1: [[1, 2.0], [2, 1.0], [3, 1.5]]}) == {1: 1.0}


def test_share_of_the_steps_until_the_baseline_ends():
    """By seed: one is there at half of its steps, one never is, one has no partner."""
    runs = {
        ("lora", 1): [[50, 3.0], [100, 2.0]],
        ("ours", 1): [[25, 3.0], [50, 2.0], [100, 1.0]],
        ("lora", 2): [[50, 3.0], [100, 2.0]],
        ("ours", 2): [[50, 3.0], [100, 2.1]],
        ("ours", 3): [[50, 3.0], [100, 2.1]],
        ("lora", 4): None,
    }
    cells = [
        SimpleNamespace(place=("m", "t", method), seed=seed, key=(method, seed))
        for method, seed in runs
    ]
    results = {key: {"held_out_curve": curve} for key, curve in runs.items()}
    results["lora", 4] = {}  # from before there were curves
    matrix = SimpleNamespace(compare=cells, results=results)
    found = share_until(matrix, "m", "t", "lora", "ours")
    assert found == {1: 0.5, 2: None}
    assert shown_share(found) == "in 1 of 2 seeds, mean 50 %"
    assert shown_share({1: 0.4, 2: 0.5}) == "45 % [-19, 109]"
    assert shown_share({}) == "–"
