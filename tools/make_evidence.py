"""The tables of docs/evidence.md, from the results in the repository.

    python tools/make_evidence.py [--check]

A table is between `<!-- make_evidence.py: PLAN [METHOD ...] -->` and `<!-- end -->`: PLAN is the
name of a plan in experiments/, and each METHOD one that is shown of it (none given: all). Its
numbers are those of the plan's own page, in per cent of the baseline. `PLAN over OTHER METHOD ...`
is the gain of methods over one that is no baseline, alone. `concentration` is no plan, but what
experiments/concentration.py wrote.
The site has only what lies in docs/, so the figures that it shows are drawn there.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from made_pages import write_or_check

from drlora.compare.curves import curves, lowest, share_until
from drlora.compare.figures import Part, budget_part, curves_part, draw_parts
from drlora.compare.gains import best_baselines, relative
from drlora.compare.metrics import METRICS
from drlora.compare.plan import load_plan
from drlora.compare.results import Folder, Matrix, Place, read_matrix
from drlora.compare.statistics import gain, interval, mean_gain
from drlora.compare.tables import (
    PER_CENT,
    models_table,
    shown_gain,
    shown_interval,
    shown_share,
    table,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
METRIC = "loss"
IMAGES = ROOT / "docs" / "images"
# File -> the plan, and the part of its figures that is drawn.
FIGURES: dict[str, tuple[str, Callable[[Matrix], Part | None]]] = {
    "budget.svg": ("budget", budget_part),
    "length.svg": ("embedded-3200", curves_part),
}
CONCENTRATION = ROOT / "experiments" / "results" / "concentration.json"
BLOCK = re.compile(
    r"(?P<head><!-- make_evidence\.py: (?P<plan>[\w-]+)(?P<methods>(?: [\w@-]+)*) -->\n)"
    r"(?P<tables>.*?)(?P<end><!-- end -->\n)",
    re.DOTALL,
)


def with_tables(text: str) -> str:
    """The page with every table made anew."""
    return BLOCK.sub(lambda found: found["head"] + tables(found) + found["end"], text)


def tables(block: re.Match[str]) -> str:
    """What the results of a block's plan say, model by model, and how much of it has been run."""
    name, methods = block["plan"], block["methods"].split()
    if name == CONCENTRATION.stem:
        return concentration(json.loads(CONCENTRATION.read_text("utf-8")))
    matrix = _matrix(name)
    plan = matrix.plan
    if methods[:1] == ["over"]:
        return "\n".join(line for m in plan.models for line in _over(matrix, m, *methods[1:]))
    done, total = len(matrix.finished()), len(matrix.compare) + matrix.waiting
    lines = [f"{done} of {total} compared runs; all tables: `{plan.output_dir}/README.md`.", ""]
    for model in plan.models:
        lines += _of_model(matrix, model, methods or list(plan.methods))
    is_whole = all(_is_complete(matrix, m, task) for m in plan.models for task in plan.tasks)
    if is_whole and len(plan.models) > 1:
        lines += ["**All models and tasks**: the mean gain, in per cent", ""]
        lines += models_table(matrix, METRIC, list(plan.tasks), methods)
    return "\n".join(lines)


def concentration(found: Mapping[str, Any]) -> str:
    """How concentrated each task is on each model, and how that goes with gains."""
    pairs, models = found["pairs"], dict.fromkeys(row["model"] for row in found["pairs"])
    tasks = dict.fromkeys(row["task"] for row in pairs)
    by_place = {(row["task"], row["model"]): f"{row['of_routing']:.2f}" for row in pairs}
    rows = [[task, *(by_place.get((task, model), "") for model in models)] for task in tasks]
    lines = ["Concentration of routing, by task and model:", "", *table(["task", *models], rows)]
    lines += ["Rank correlation of concentration with the gain over LoRA, and the mean gain in per "
              "cent in the less and in the more concentrated half of the pairs:", ""]  # fmt: skip
    rows = [
        [f"`{method}`", signal.removeprefix("of_"), str(of["pairs"]),
         f"{of['spearman']:+.2f} [{of['low']:+.2f}, {of['high']:+.2f}]",
         f"{of['mean_gain_below_the_median']:+.2f}", f"{of['mean_gain_from_the_median_on']:+.2f}"]
        for signal, by_method in found["relations"].items()
        for method, of in by_method.items()
    ]  # fmt: skip
    titles = ["method", "concentration of the", "pairs", "rank correlation", "less", "more"]
    return "\n".join([*lines, *table(titles, rows)])


def draw(name: str, folder: Path) -> None:
    """One part of a comparison's figures, for the site, which has only what lies in docs/."""
    plan, part_of = FIGURES[name]
    part = part_of(_matrix(plan))
    assert part is not None, f"{plan} has nothing to draw for {name}"
    draw_parts([part], folder / name)


def _matrix(name: str) -> Matrix:
    plan = load_plan(ROOT / "experiments" / f"{name}.yaml")
    return read_matrix(plan, Folder.of(plan, ROOT))


def _of_model(matrix: Matrix, model: str, methods: Sequence[str]) -> Iterator[str]:
    plan = matrix.plan
    first = plan.baselines[0]
    tasks = [task for task in plan.tasks if _is_complete(matrix, model, task)]
    if not tasks:
        return
    means = ["mean of tasks"] if len(tasks) > 1 else []
    losses = [
        shown_interval(
            interval(list(matrix.values(METRIC, (model, task, first)).values())), METRICS[METRIC]
        )
        for task in tasks
    ]
    everywhere = dict.fromkeys(tasks, first)
    rows = [[f"`{first}` itself: loss", *losses, *("" for _ in means)]]
    rows += [
        [f"`{method}`", *_gains(matrix, model, everywhere, method)]
        for method in methods
        if method != first
    ]
    yield from (f"**{model}**: gain in held-out loss over `{first}`, in per cent", "")
    yield from table(["method", *tasks, *means], rows)
    best = best_baselines(matrix, METRIC, model, tasks)
    others = [method for method in methods if method not in plan.baselines]
    is_news = set(best.values()) != {first}
    if is_news and len(best) == len(tasks) and others:
        yield from (f"**{model}**: the same over the best baseline of each task", "")
        titles = [f"{task} (`{baseline}`)" for task, baseline in best.items()]
        rows = [[f"`{method}`", *_gains(matrix, model, best, method)] for method in others]
        yield from table(["method", *titles, *means], rows)
    if all(curves(matrix, (model, task, method)) for task in tasks for method in methods):
        yield from (f"**{model}**: share of the steps until `{first}`'s last held-out loss", "")
        rows = [
            [f"`{m}`", *(shown_share(share_until(matrix, model, task, first, m)) for task in tasks)]
            for m in methods
            if m != first
        ]
        yield from table(["method", *tasks], rows)
        yield from (
            f"**{model}**: gain over `{first}` in the lowest loss on the way, in per cent",
            "",
        )
        rows = [
            [f"`{m}`", *(_lowest_gain(matrix, (model, task, first), m) for task in tasks)]
            for m in methods
            if m != first
        ]
        yield from table(["method", *tasks], rows)


def _over(matrix: Matrix, model: str, other: str, *methods: str) -> Iterator[str]:
    tasks = [task for task in matrix.plan.tasks if _is_complete(matrix, model, task)]
    if not tasks:
        return
    everywhere = dict.fromkeys(tasks, other)
    rows = [[f"`{method}`", *_gains(matrix, model, everywhere, method)] for method in methods]
    means = ["mean of tasks"] if len(tasks) > 1 else []
    yield from (f"**{model}**: gain in held-out loss over `{other}`, in per cent", "")
    yield from table(["method", *tasks, *means], rows)


def _lowest_gain(matrix: Matrix, baseline: Place, method: str) -> str:
    """As gains are shown, of the lowest loss of each run."""
    model, task, _ = baseline
    least, own = (lowest(curves(matrix, p)) for p in (baseline, (model, task, method)))
    mean = fmean(least.values())
    return shown_gain(
        gain({seed: 100 * (least[seed] - own[seed]) / mean for seed in least}), PER_CENT
    )


def _is_complete(matrix: Matrix, model: str, task: str) -> bool:
    """Whether every method has a run for every seed; half a task is not shown."""
    seeds = set(matrix.plan.seeds_of(task))
    return all(
        matrix.values(METRIC, (model, task, method)).keys() >= seeds
        for method in matrix.plan.methods
    )


def _gains(matrix: Matrix, model: str, baselines: Mapping[str, str], method: str) -> list[str]:
    found = relative(matrix, METRIC, model, baselines, method)
    if found is None:
        return ["–"] * (len(baselines) + (len(baselines) > 1))
    cells = [shown_gain(gain(by_seed), PER_CENT) for by_seed in found.values()]
    return [*cells, shown_gain(mean_gain(found), PER_CENT)] if len(found) > 1 else cells


if __name__ == "__main__":
    os.chdir(ROOT)  # the plans name their data from there
    status = write_or_check(PAGE, with_tables, __doc__)
    if "--check" not in sys.argv:
        for figure in FIGURES:
            draw(figure, IMAGES)
    sys.exit(status)
