"""The report as Markdown, for a pull request or a log book."""

from __future__ import annotations

from collections.abc import Sequence

from drlora.report.facts import COST, SETUP, SUMMARY, Facts, Row, lead, table, title
from drlora.report.heat_map import LEVELS, block_lines
from drlora.report.read import RunRecord

WIDEST_MAP = 128


def markdown(runs: Sequence[RunRecord]) -> str:
    """Tables, and the final ranks as a map of blocks where they are not too many."""
    parts = [f"# {plain(title(runs))}", ""]
    for run in runs:
        name = f"**{plain(run.name)}**: " if len(runs) > 1 else ""
        parts += [name + plain(lead(run)), ""]
    parts += tables(runs, (("Result", SUMMARY), ("Cost", COST), ("Settings", SETUP)))
    for run in runs:
        parts += ranks_as_text(run)
    return "\n".join(parts).rstrip() + "\n"


def tables(runs: Sequence[RunRecord], sections: Sequence[tuple[str, Facts]]) -> list[str]:
    """Lines: a heading and a table for each section that has a fact."""
    lines = []
    for heading, facts in sections:
        if rows := table(runs, facts):
            lines += [f"## {heading}", "", *_table(runs, rows), ""]
    return lines


def _table(runs: Sequence[RunRecord], rows: Sequence[Row]) -> list[str]:
    names = [plain(run.name) for run in runs]
    return [
        f"| | {' | '.join(names)} |",
        "|---|" + "---|" * len(runs),
        *(f"| {name} | {' | '.join(map(plain, values))} |" for name, values in rows),
    ]


def ranks_as_text(run: RunRecord) -> list[str]:
    """Lines: the final ranks of each map that is not too wide."""
    lines = []
    for rank_map in run.maps:
        ranks = rank_map.final()
        if max(map(len, ranks)) > WIDEST_MAP:
            continue
        low, high = min(map(min, ranks)), max(map(max, ranks))
        rows = block_lines(ranks, low, high)
        lines += [
            f"## Final ranks of {plain(run.name)}: {plain(rank_map.projection)}",
            "",
            f"One row a layer, one column an expert, from {low} ({LEVELS[0]}) to {high} "
            f"({LEVELS[-1]}).",
            "",
            "```text",
            *(f"{layer:3} {row}" for layer, row in enumerate(rows)),
            "```",
            "",
        ]
    return lines


def plain(text: str) -> str:
    """Text that Markdown takes as it is, on one line."""
    joined = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in joined)
