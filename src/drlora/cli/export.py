"""What `drlora export` prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from drlora.runs.export_source import ExportResult


def print_export(result: ExportResult, output: str | Path, console: Console) -> None:
    """The plan and the outcome, for people."""
    plan = result.plan
    low, mean, high = plan.owned
    console.print(f"format   {plan.format}")
    padded = "" if plan.rank is None else f", written at rank {plan.rank}"
    console.print(f"ranks    {low} to {high} (mean {mean:.4g}) in the adapter{padded}")
    console.print(f"weights  {plan.weight_bytes / 2**20:.2f} MiB")
    console.print(f"files    {', '.join(plan.files)}")
    for reading in plan.readings:
        console.print(f"engine   {reading}")
    for note in (*plan.notes, *result.notes):
        console.print(f"note     {note}")
    if result.output is None:
        console.print(f"dry run: nothing was written to {output}")
    else:
        console.print(f"checked  {result.checked}")
        console.print(f"written  {output}")
