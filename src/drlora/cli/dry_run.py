"""What `drlora train --dry-run` prints."""

from __future__ import annotations

from rich.console import Console

from drlora.cli.inspection import print_inspection
from drlora.cli.progress import say
from drlora.runs.dry_run import DryRun


def print_dry_run(found: DryRun, console: Console) -> None:
    """The same, for people."""
    print_inspection(found.model, console)
    for note in found.notes:
        say(console, note)
    console.print(f"dry run: nothing was written to {found.recipe.output_dir}")
