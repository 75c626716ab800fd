"""The outcome of a run, for people: what was measured, the ranks, the budget."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from drlora.cli.heat_map import print_heat_map
from drlora.cli.progress import say
from drlora.errors import counted, duration
from drlora.evaluation.measure import Measurement
from drlora.ranks.rank_map import Ranks
from drlora.runs.outcome import TrainResult

MOST_IN_TABLE = 32  # experts of a layer


def print_summary(result: TrainResult, console: Console) -> None:
    """Held-out measurements before and after, ranks, budget, size and time."""
    console.print()
    if result.after is not None:
        for line in compare(result.before, result.after):
            say(console, line)
    print_ranks(result.ranks, console)
    say(console, budget_line(result))
    say(
        console,
        f"{result.trainable_parameters:,} trainable parameters ({result.stored_parameters:,} "
        f"stored), {counted(result.steps, 'step')}, {duration(result.seconds)} of training",
    )
    if result.after is not None:
        console.print(f"the run is in {result.run.path}", soft_wrap=True, markup=False)


def print_ranks(ranks: Ranks, console: Console) -> None:
    """A map on a terminal, and of many experts anywhere; else a table with every rank."""
    maps = _maps(ranks)
    if not console.is_terminal and max(map(len, next(iter(maps.values())))) <= MOST_IN_TABLE:
        for line in _whole_lines(rank_table(ranks)):
            console.print(line, soft_wrap=True, markup=False)
        return
    for label, rows in maps.items():
        console.print(f"ranks, {label}")
        print_heat_map(rows, console)


def _whole_lines(table: Table) -> list[str]:
    """Each row in one line, however long it is: in a log nothing is gained by breaking it."""
    wide = Console(file=io.StringIO(), width=10_000, color_system=None)
    wide = Console(file=io.StringIO(), width=wide.measure(table).maximum, color_system=None)
    wide.print(table)
    assert isinstance(wide.file, io.StringIO)
    return [line.rstrip() for line in wide.file.getvalue().splitlines()]


def _maps(ranks: Ranks) -> dict[str, list[Sequence[int]]]:
    """Projections that share ranks, joined by "+" -> the ranks of each layer."""
    found: dict[str, list[Sequence[int]]] = {}
    together = all(len(_rows(projections)) == 1 for projections in ranks.values())
    for projections in ranks.values():
        for label, row in _rows(projections) if together else projections.items():
            found.setdefault(label, []).append(row)
    return found


def compare(before: Measurement | None, after: Measurement) -> list[str]:
    """`held-out loss 3.1 -> 0.9` and, where it was measured, exact match."""
    if before is None:
        return [f"after: {after}"]
    lines = [
        f"held-out loss      {before.loss.loss:.4f} -> {after.loss.loss:.4f}   "
        f"(perplexity {before.loss.perplexity:.2f} -> {after.loss.perplexity:.2f})"
    ]
    if before.match is not None and after.match is not None:
        lines.append(
            f"exact match        {before.match.accuracy:.1%} -> {after.match.accuracy:.1%}   "
            f"({before.match.correct} -> {after.match.correct} of {after.match.total})"
        )
    if before.forgetting is not None and after.forgetting is not None:
        was, now = before.forgetting.loss, after.forgetting.loss
        lines.append(f"on other data      {was:.4f} -> {now:.4f}   (what is forgotten)")
    return lines


def budget_line(result: TrainResult) -> str:
    """The ranks spent, and what the budget is made of."""
    b = result.budget
    factors = (
        f"r_target {b.r_target} x {b.experts} experts x {b.layers} layers x "
        f"{b.projections} projections"
    )
    planned = b.r_target * b.experts * b.layers * b.projections
    if b.stored == planned:
        return f"spent {b.spent} of {b.stored} ranks = {factors}"
    return f"spent {b.spent} ranks ({planned} = {factors}); {b.stored} rows are stored"


def rank_table(ranks: Ranks) -> Table:
    """One row a block, or one a projection where ranks differ between projections."""
    table = Table(title="ranks", title_justify="left", box=None, pad_edge=False)
    for name in ("layer", "projection"):
        table.add_column(name)
    for name in ("min", "mean", "max"):
        table.add_column(name, justify="right")
    table.add_column("by expert")
    for block, projections in ranks.items():
        for label, row in _rows(projections):
            mean = f"{sum(row) / len(row):.2f}"
            cells = " ".join(map(str, row))
            table.add_row(block, label, str(min(row)), mean, str(max(row)), cells)
    return table


def _rows(projections: dict[str, list[int]]) -> list[tuple[str, Sequence[int]]]:
    """(projections, ranks): one entry if all projections have the same ranks."""
    distinct = {tuple(row) for row in projections.values()}
    if len(distinct) == 1:
        return [("+".join(projections), distinct.pop())]
    return list(projections.items())
