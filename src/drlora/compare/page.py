"""The page of a comparison: tables in markdown, beside figures, from the result files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from drlora.compare.curves import curves, lowest, share_until
from drlora.compare.gains import best_baselines, gains_by_task, relative
from drlora.compare.metrics import METRICS, Metric
from drlora.compare.plan import Settings, Tune
from drlora.compare.results import Folder, Matrix, Place, Result
from drlora.compare.statistics import gain, interval, item_gain, mean_gain
from drlora.compare.tables import (
    NONE,
    PER_CENT,
    models_table,
    shown_gain,
    shown_interval,
    shown_share,
    table,
)
from drlora.io.run_files import README
from drlora.io.writing import write_at_once

FIGURES = "figures.svg"


def write_page(matrix: Matrix, folder: Folder, command: str) -> None:
    """Write README.md and figures.svg into the folder; the same results give the same bytes.

    Args:
        matrix: the plan and its results.
        folder: where they are.
        command: what makes the results, for the page to say.
    """
    from drlora.compare.figures import draw_figures  # matplotlib takes a second to import

    drawn = draw_figures(matrix, folder.path / FIGURES) if matrix.finished() else []
    text = page(matrix, command, drawn)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_at_once(folder.path / README, text)


def page(matrix: Matrix, command: str, figures: Sequence[str] = ()) -> str:
    """The page; `figures` are the titles of the parts of figures.svg."""
    parts = [
        *_head(matrix, command),
        *_results(matrix),
        *_on_the_way(matrix),
        *_figures(figures),
        *_tuning(matrix),
        *_cost(matrix),
        *_failures(matrix),
        *_provenance(matrix),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _head(matrix: Matrix, command: str) -> list[str]:
    plan = matrix.plan
    total = len(matrix.compare) + matrix.waiting
    done = len(matrix.finished())
    tuned = sum(cell.key in matrix.results for cell in matrix.tune)
    lines = [f"# Comparison: {plan.name}", "", f"Made by `{command}`; do not edit.", ""]
    lines += [f"- {done} of {total} compared runs are in the tables."]
    if plan.tune:
        lines += [f"- {tuned} of {len(matrix.tune)} tuning runs are finished."]
    failed = len(matrix.failures)
    lines += [
        f"- {failed} runs failed (listed below)." if failed else "- No run failed.",
        "- Nothing is left out: every run of the plan that finished is counted.",
        f"- Compared on the split `{plan.split}`; seeds {_seeds(matrix)}.",
    ]
    if plan.also:
        shared = ", ".join(f"`{folder}`" for folder in plan.also)
        lines += [f"- A run that another plan has made already is taken from there: {shared}."]
    diverged = sum(run["after"]["loss"]["loss"] is None for run in matrix.finished())
    if diverged:
        lines += [
            f"- **{diverged} compared runs diverged**: their loss is not finite, so it is in "
            "no mean and no difference below; the wins are out of so many fewer."
        ]
    if total > done:
        lines += ["- **Unfinished**: intervals will change."]
    lines += [
        "",
        "Tables give the mean over seeds ± standard deviation, and in brackets the 95 % t-interval "
        "of the mean. A gain is the paired difference by seed: same seed, same batches in the same "
        "order. Positive is better. It stands with its 95 % t-interval and with the seeds that "
        "won; **bold** where the interval excludes zero. Intervals are over training seeds and are "
        "not corrected for the number of comparisons. After `items` stands half of the 95 % "
        "interval of the same gain over test items, the runs taken as they are.",
        "",
    ]
    return lines


def _seeds(matrix: Matrix) -> str:
    plan = matrix.plan
    text = ", ".join(map(str, plan.seeds))
    if plan.confirmation_seeds is not None:
        text += f" (confirmation: {', '.join(map(str, plan.confirmation_seeds))})"
    return text


def _results(matrix: Matrix) -> Iterator[str]:
    for title, tasks in matrix.plan.groups().items():
        yield from (f"## {title}", "")
        for name in matrix.plan.metrics:
            for model in matrix.plan.models:
                shown = [task for task in tasks if _any_value(matrix, name, model, task)]
                if shown:
                    yield from _metric_section(matrix, name, model, shown)
            several = len(matrix.plan.models) > 1 and len(matrix.plan.baselines) > 0
            if several and _shows_per_cent(name):
                title = f"### All models: {METRICS[name].title}, gain in per cent of the baseline"
                yield from (title, "", *models_table(matrix, name, tasks))


def _on_the_way(matrix: Matrix) -> Iterator[str]:
    """Of runs that have a curve: the lowest loss, and how soon the first baseline's end is met."""
    plan, loss = matrix.plan, METRICS["loss"]
    least, shares = [], []
    for model in plan.models:
        for method in plan.methods:
            found = [lowest(curves(matrix, (model, task, method))) for task in plan.tasks]
            if any(found):
                cells = [shown_interval(interval([*of.values()]), loss) if of else NONE
                         for of in found]  # fmt: skip
                least.append([model, method, *cells])
            if plan.baselines and method != plan.baselines[0]:
                cells = [shown_share(share_until(matrix, model, task, plan.baselines[0], method))
                         for task in plan.tasks]  # fmt: skip
                if set(cells) != {NONE}:
                    shares.append([model, method, *cells])
    if not least:
        return
    yield from ("## On the way", "")
    yield (
        "The lowest held-out loss that was taken on the way. It is chosen on the data that it is "
        "measured on, which flatters every method a little."
    )
    yield ""
    yield from table(["model", "method", *plan.tasks], least)
    if not shares:
        return
    yield (
        f"Share of the steps until `{plan.baselines[0]}`'s last held-out loss, by seed, linear "
        "between two losses. The learning rate has the schedule of the whole run, so a run of so "
        "few steps would end elsewhere."
    )
    yield ""
    yield from table(["model", "method", *plan.tasks], shares)


def _any_value(matrix: Matrix, metric: str, model: str, task: str) -> bool:
    return any(matrix.values(metric, (model, task, method)) for method in matrix.plan.methods)


def _metric_section(matrix: Matrix, name: str, model: str, tasks: Sequence[str]) -> Iterator[str]:
    metric = METRICS[name]
    better = "higher" if metric.higher_is_better else "lower"
    yield from (f"### {model}: {metric.title}, {better} is better", "")
    yield from table(
        ["method", "trainable parameters", *tasks],
        [
            [
                method,
                _parameters(matrix, model, method, tasks),
                *(_values(matrix, name, (model, task, method)) for task in tasks),
            ]
            for method in matrix.plan.methods
        ],
    )
    best = best_baselines(matrix, name, model, tasks)
    if len(matrix.plan.baselines) > 1 and len(best) == len(tasks):
        yield from ("Gain over the best baseline of each task, chosen by these same runs:", "")
        titles = [f"{task} (`{baseline}`)" for task, baseline in best.items()]
        yield from _gain_table(matrix, name, model, best, matrix.plan.baselines, titles)
    for baseline in matrix.plan.baselines:
        yield from (f"Gain over `{baseline}`:", "")
        given = dict.fromkeys(tasks, baseline)
        yield from _gain_table(matrix, name, model, given, [baseline], tasks)


def _gain_table(
    matrix: Matrix,
    name: str,
    model: str,
    baselines: Mapping[str, str],
    without: Sequence[str],
    titles: Sequence[str],
) -> Iterator[str]:
    """Rows of all methods but `without`; a column a task, and the means over several tasks."""
    rows = [
        [method, *_gains(matrix, name, model, baselines, method)]
        for method in matrix.plan.methods
        if method not in without
    ]
    means = ["mean of tasks"] if len(titles) > 1 else []
    if means and _shows_per_cent(name):
        means.append("mean of tasks, % of the baseline")
    if rows:
        yield from table(["method", *titles, *means], rows)


def _values(matrix: Matrix, name: str, place: Place) -> str:
    values = matrix.values(name, place)
    return shown_interval(interval(list(values.values())), METRICS[name]) if values else NONE


def _gains(
    matrix: Matrix, name: str, model: str, baselines: Mapping[str, str], method: str
) -> list[str]:
    metric = METRICS[name]
    pairs = gains_by_task(matrix, name, model, baselines, method)
    cells = []
    for task, by_seed in pairs.items():
        places = [(model, task, which) for which in (baselines[task], method)]
        runs = [matrix.items(name, place, by_seed.keys()) for place in places]
        cells.append(shown_gain(gain(by_seed), metric) + _over_items(runs, metric))
    if len(pairs) == 1:
        return cells
    cells.append(shown_gain(mean_gain(pairs), metric))
    if _shows_per_cent(name):
        shares = relative(matrix, name, model, baselines, method)
        cells.append(shown_gain(mean_gain(shares), PER_CENT) if shares else NONE)
    return cells


def _shows_per_cent(metric: str) -> bool:
    """Of a loss or an error; a share of right answers may be next to nothing."""
    return not METRICS[metric].higher_is_better


def _over_items(runs: Sequence[Sequence[Sequence[float]]], metric: Metric) -> str:
    """`, items ±0.0080`: half of the interval over test items; nothing where they were not kept."""
    if not all(runs):
        return ""
    found = item_gain(runs[0], runs[1], metric.higher_is_better)
    if found.high is None:
        return ""
    return f", items ±{found.high - found.mean:.{metric.digits}f}"


def _parameters(matrix: Matrix, model: str, method: str, tasks: Sequence[str]) -> str:
    """Trainable parameters of a method; the range where runs differ."""
    found = {
        result["trainable_parameters"]
        for task in tasks
        for result in matrix.finished((model, task, method))
    }
    if not found:
        return NONE
    low, high = min(found), max(found)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _figures(titles: Sequence[str]) -> list[str]:
    if not titles:
        return []
    return ["## Figures", "", f"![{'; '.join(titles)}]({FIGURES})", ""]


def _tuning(matrix: Matrix) -> Iterator[str]:
    tune = matrix.plan.tune
    if tune is None:
        return
    metric = METRICS[tune.metric]
    yield from ("## Tuned settings", "")
    yield (
        f"Each method tried the same {len(tune.points())} points on the split `{tune.split}` with "
        f"{'seed' if len(tune.seeds) == 1 else 'seeds'} {', '.join(map(str, tune.seeds))}; the "
        f"best mean of {metric.title} was used. {_extended(tune)}An asterisk marks a value at an "
        f"end of what was tried: a better one may lie outside."
    )
    yield ""
    points = _all_points(matrix)
    rows = []
    for (model, task, method), choice in matrix.choices.items():
        means = {_point(settings): mean for settings, mean in choice.means}
        tried = [_tried(means, point, metric.digits) for point in points]
        chosen = ", ".join(
            f"{value}{'*' if key in choice.at_edge else ''}"
            for key, value in choice.settings.items()
        )
        rows.append([model, task, method, chosen, *tried])
    keys = ", ".join(tune.grid)
    titles = [", ".join(map(str, point)) for point in points]
    yield from table(["model", "task", "method", f"chosen {keys}", *titles], rows)


def _extended(tune: Tune) -> str:
    if not tune.extend:
        return ""
    return f"While it lay at an end, the next point past it was tried, up to {tune.extend} times. "


def _all_points(matrix: Matrix) -> list[tuple]:
    """The values of every point that was tried somewhere, in order."""
    found = {_point(p): None for c in matrix.choices.values() for p, _ in c.means}
    try:
        return sorted(found)
    except TypeError:  # words beside numbers
        return list(found)


def _point(settings: Settings) -> tuple:
    return tuple(v if isinstance(v, (int, float, str)) else str(v) for v in settings.values())


def _tried(means: Mapping[tuple, float | None], point: tuple, digits: int) -> str:
    """The mean at a point: a dash where a run diverged, nothing where it was not tried."""
    if point not in means:
        return ""
    mean = means[point]
    return NONE if mean is None else f"{mean:.{digits}f}"


def _cost(matrix: Matrix) -> Iterator[str]:
    yield from ("## Cost", "")
    yield "Means over the compared runs; of a stopped run, the time since it was continued."
    yield ""
    rows = []
    for model in matrix.plan.models:
        for method in matrix.plan.methods:
            found = [
                result
                for task in matrix.plan.tasks
                for result in matrix.finished((model, task, method))
            ]
            if found:
                rows.append([model, method, *_costs(found)])
    header = ["model", "method", "stored parameters", "training (s)", "whole run (s)", "memory"]
    yield from table(header, rows)


def _costs(found: Sequence[Result]) -> list[str]:
    def mean(key: str) -> float:
        return fmean(result[key] for result in found)

    gpu = [r["peak_gpu_memory_bytes"] for r in found if "peak_gpu_memory_bytes" in r]
    memory = f"{mean('peak_memory_bytes') / 2**20:.0f} MiB"
    if gpu:
        memory += f", GPU {fmean(gpu) / 2**20:.0f} MiB"
    return [
        f"{mean('stored_parameters'):,.0f}",
        f"{mean('seconds'):.1f}",
        f"{mean('wall_seconds'):.1f}",
        memory,
    ]


def _failures(matrix: Matrix) -> Iterator[str]:
    if not matrix.failures:
        return
    yield from ("## Failed runs", "")
    rows = [
        [f["stage"], f["model"], f["task"], f["method"], str(f["seed"]), f["error"]]
        for f in matrix.failures.values()
    ]
    yield from table(["stage", "model", "task", "method", "seed", "error"], rows)


def _provenance(matrix: Matrix) -> Iterator[str]:
    yield from ("## Where it ran", "")
    yield from _counted("versions", matrix, lambda r: _pairs(r["versions"]))
    yield from _counted("machine", matrix, _machine)
    yield ""


def _machine(result: Result) -> str:
    return f"{_pairs(result['machine'])}, {result['device']}, threads {result['threads']}"


def _counted(title: str, matrix: Matrix, describe: Callable[[Result], str]) -> Iterator[str]:
    counts = Counter(describe(result) for result in matrix.results.values())
    for text, count in sorted(counts.items()):
        yield f"- {title} of {count} runs: {text}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
