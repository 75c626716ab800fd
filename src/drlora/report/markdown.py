"""The report as Markdown, for a pull request or a log book."""

from __future__ import annotations

from collections.abc import Sequence

from drlora.heat_map import LEVELS, block_lines
from drlora.report.facts import COST, SETUP, SUMMARY, Row, lead, table, title
from drlora.report.read import RunRecord

WIDEST_MAP = 128


def markdown(runs: Sequence[RunRecord]) -> str:
    """Tables, and the final ranks as a map of blocks where they are not too many."""
    parts = [f"# {_plain(title(runs))}", ""]
    for run in runs:
        name = f"**{_plain(run.name)}**: " if len(runs) > 1 else ""
        parts += [name + _plain(lead(run)), ""]
    for heading, facts in (("Result", SUMMARY), ("Cost", COST), ("Settings", SETUP)):
        parts += [f"## {heading}", "", *_table(runs, table(runs, facts)), ""]
    for run in runs:
        parts += _map(run)
    return "\n".join(parts).rstrip() + "\n"


def _table(runs: Sequence[RunRecord], rows: Sequence[Row]) -> list[str]:
    names = [_cell(run.name) for run in runs]
    return [
        f"| | {' | '.join(names)} |",
        "|---|" + "---|" * len(runs),
        *(f"| {name} | {' | '.join(map(_cell, values))} |" for name, values in rows),
    ]


def _map(run: RunRecord) -> list[str]:
    lines = [f"## Final ranks: {_plain(run.name)}", ""]
    for rank_map in run.maps:
        ranks = rank_map.final()
        if max(map(len, ranks)) > WIDEST_MAP:
            continue
        low, high = min(map(min, ranks)), max(map(max, ranks))
        rows = block_lines(ranks, low, high)
        lines += [
            f"{_plain(rank_map.projection)}: one row a layer, one column an expert, from {low} "
            f"({LEVELS[0]}) to {high} ({LEVELS[-1]}).",
            "",
            "```text",
            *(f"{layer:3} {row}" for layer, row in enumerate(rows)),
            "```",
            "",
        ]
    return lines


def _plain(text: str) -> str:
    """Text that Markdown takes as it is, on one line."""
    joined = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in joined)


def _cell(text: str) -> str:
    return _plain(text)
