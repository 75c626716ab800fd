"""How a comparison shows intervals, gains and tables; for its page and for docs/evidence.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from drlora.compare.gains import best_baselines, relative_over_models
from drlora.compare.metrics import Metric
from drlora.compare.results import Matrix
from drlora.compare.statistics import Gain, Interval, gain, interval, mean_gain

NONE = "–"
PER_CENT = Metric("per cent of the baseline", ("", ""), True, digits=2)


def shown_interval(found: Interval, metric: Metric) -> str:
    """`0.8931 ± 0.0040 [0.8832, 0.9030]`."""
    text = f"{found.mean:.{metric.digits}f}"
    if found.sd is None:
        return f"{text} (one seed)"
    bounds = f"[{found.low:.{metric.digits}f}, {found.high:.{metric.digits}f}]"
    return f"{text} ± {found.sd:.{metric.digits}f} {bounds}"


def shown_gain(found: Gain | None, metric: Metric) -> str:
    """`+0.0210 [+0.0110, +0.0310] 3/3`, bold where the interval excludes zero."""
    if found is None:
        return NONE
    d = found.difference
    wins = f"{found.wins}/{d.n}" + (f" ({found.ties} equal)" if found.ties else "")
    if d.low is None:
        return f"{d.mean:+.{metric.digits}f} (one seed)"
    text = f"{d.mean:+.{metric.digits}f} [{d.low:+.{metric.digits}f}, {d.high:+.{metric.digits}f}]"
    return f"**{text}** {wins}" if d.is_above_zero or d.is_below_zero else f"{text} {wins}"


def shown_share(by_seed: Mapping[int, float | None]) -> str:
    """`41 % [36, 46]`; how many seeds where not all of them have one."""
    known = [100 * share for share in by_seed.values() if share is not None]
    if not by_seed:
        return NONE
    if len(known) < len(by_seed):
        mean = f", mean {sum(known) / len(known):.0f} %" if known else ""
        return f"in {len(known)} of {len(by_seed)} seeds{mean}"
    found = interval(known)
    bounds = "" if found.low is None else f" [{found.low:.0f}, {found.high:.0f}]"
    return f"{found.mean:.0f} %{bounds}"


def models_table(
    matrix: Matrix, name: str, tasks: Sequence[str], methods: Sequence[str] = ()
) -> list[str]:
    """Gains in per cent of `methods` (none: all), each task of each model weighing the same.

    Over the best baseline of each model and task there is also the number of them, and of those
    whose own interval lies above or below zero.
    """
    plan = matrix.plan
    first = plan.baselines[0]
    everywhere = {model: dict.fromkeys(tasks, first) for model in plan.models}
    best = {model: best_baselines(matrix, name, model, tasks) for model in plan.models}
    is_choice = len(plan.baselines) > 1 and all(len(of) == len(tasks) for of in best.values())
    rows = []
    for method in methods or plan.methods:
        if method == first:
            continue
        over_first = relative_over_models(matrix, name, everywhere, method)
        row = [f"`{method}`", shown_gain(mean_gain(over_first), PER_CENT) if over_first else NONE]
        is_shown = is_choice and method not in plan.baselines
        over_best = relative_over_models(matrix, name, best, method) if is_shown else None
        rows.append([*row, *(_mean_and_counts(over_best) if over_best else ["", ""])])
    titles = [f"over `{first}`", "over the best baseline of each", "above zero, below, of"]
    return list(table(["method", *titles], rows))


def _mean_and_counts(shares: Mapping[tuple[str, str], Mapping[int, float]]) -> list[str]:
    """The mean over models and tasks; of how many of them the interval excludes zero."""
    each = [found.difference for pairs in shares.values() if (found := gain(pairs))]
    above = sum(difference.is_above_zero for difference in each)
    below = sum(difference.is_below_zero for difference in each)
    return [shown_gain(mean_gain(shares), PER_CENT), f"{above}, {below}, {len(each)}"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown, and an empty line."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""
