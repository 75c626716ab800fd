"""The tables of docs/evidence.md, from the results in the repository.

    python tools/make_evidence.py [--check]

A table is between `<!-- make_evidence.py: PLAN [METHOD ...] -->` and `<!-- end -->`: PLAN is the
name of a plan in experiments/, and each METHOD one that is shown of it (none given: all). Its
numbers are those of the plan's own page, in per cent of the baseline. `concentration` is no plan,
but what experiments/concentration.py wrote.
The site has only what lies in docs/, so the figure that it shows is drawn there.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from made_pages import write_or_check

from drlora.compare.figures import budget_part, draw_parts
from drlora.compare.gains import best_baselines, relative
from drlora.compare.metrics import METRICS
from drlora.compare.plan import load_plan
from drlora.compare.results import Folder, Matrix, read_matrix
from drlora.compare.statistics import gain, interval, mean_gain
from drlora.compare.tables import PER_CENT, models_table, shown_gain, shown_interval, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
METRIC = "loss"
BUDGET = "budget"  # the plan whose metric against parameters is drawn
BUDGET_FIGURE = ROOT / "docs" / "images" / "budget.svg"
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
    plan = load_plan(ROOT / "experiments" / f"{name}.yaml")
    matrix = read_matrix(plan, Folder.of(plan, ROOT))
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


def draw_budget(path: Path) -> None:
    """One part of a comparison's figures, for the site, which has only what lies in docs/."""
    plan = load_plan(ROOT / "experiments" / f"{BUDGET}.yaml")
    draw_parts([budget_part(read_matrix(plan, Folder.of(plan, ROOT)))], path)


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
        draw_budget(BUDGET_FIGURE)
    sys.exit(status)
