"""The README that lies beside an export: what was done, and how to load it."""

from __future__ import annotations

import os
from typing import Any

from drlora.export.engines import Reading
from drlora.export.format import Format
from drlora.io.run_files import EXPORT_RECORD


def readme(format: Format, record: dict[str, Any], difference: str) -> str:
    """Markdown from what `drlora_export.json` says."""
    named = record.get("base_model")
    # A path of this machine means nothing to others, and says what is on it.
    base = named if named and not os.path.exists(named) else "BASE_MODEL"
    ranks = record["adapter_ranks"]
    lines = [f"# drlora export: {format.name}", "", format.summary.format(**record)]
    if format.loading:
        lines += ["", "    " + format.loading.format(base=base)]
    lines += [
        "",
        f"- base model: {base}",
        f"- the adapter's ranks: {ranks['smallest']} to {ranks['largest']} (mean "
        f"{ranks['mean']:.4g})",
        f"- checked before writing: {difference}",
        *(f"- {note}" for note in record["notes"]),
        *_engines(record["engines"], base),
        "",
        f"`{EXPORT_RECORD}` holds the same for programs, and where adapter and base model were.",
    ]
    return "\n".join(lines) + "\n"


def _engines(readings: list[dict[str, Any]], base: str) -> list[str]:
    """Who reads this folder, and by which command; THIS_FOLDER stands for it."""
    if not readings:
        return []
    lines = ["", "## Engines", ""]
    for reading in map(lambda found: Reading(**found), readings):
        lines.append(f"- {reading} ({reading.seen})")
        if reading.reads is not False and reading.command:
            commands = reading.command.replace("BASE_MODEL", base).split("; ")
            lines += ["", *(f"      {command}" for command in commands), ""]
    return lines
