"""What `drlora compare` prints when nothing is under way any more."""

from __future__ import annotations

from rich.console import Console

from drlora.compare.comparison import Comparison


def print_comparison(found: Comparison, console: Console) -> None:
    """The cells and how long they take, of a dry run; else where the page is, and what failed."""
    matrix = found.matrix
    if found.page is None:
        _print_cells(found, console)
        console.print(found.estimate())
    else:
        console.print(f"the page is {found.page}")
    console.print(str(found))
    for failure in matrix.failures.values():
        console.print(f"failed: {failure['method']} on {failure['task']}: {failure['error']}")


def _print_cells(found: Comparison, console: Console) -> None:
    for cell in found.matrix.cells:
        state = "done" if cell.key in found.matrix.results else "open"
        state = "failed" if cell.key in found.matrix.failures else state
        tuned = " ".join(f"{key}={value}" for key, value in cell.tuned.items())
        console.print(f"{state:7} {cell.stage:8} {cell.name} {tuned}".rstrip())
