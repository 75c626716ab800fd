"""What `drlora plan` prints: what was chosen, memory by part, time, and what was given up."""

from __future__ import annotations

from rich.console import Console

from drlora.cli.progress import say
from drlora.errors import duration
from drlora.planning.plan import Plan, shortfall

GB = 1e9
PARTS = {
    "process": "Python and its libraries",
    "weights": "the base model",
    "checkpoint": "the file of weights, which the system takes back where memory is short",
    "adapter": "what is trained",
    "optimizer": "its moments",
    "step": "activations and gradients of the largest batch",
    "allocator": "blocks that are not used again",
    "code": "code of products in 16 bits",
}


def print_plan(made: Plan, console: Console) -> None:
    """For people."""
    for line in made.why:
        say(console, line)
    console.print(f"memory on {made.room} ({made.room_bytes / GB:.1f} GB):")
    for name, what in PARTS.items():
        size = getattr(made.memory, name)
        if size:
            console.print(f"  {size / GB:7.2f} GB  {name:11} {what}")
    verdict = "fits, with a tenth left free" if made.fits else "does NOT fit"
    console.print(f"  {made.memory.total / GB:7.2f} GB  in all: {verdict}")
    for line in made.changed:
        say(console, f"changed to fit: {line}")
    if made.step_seconds is None or made.seconds is None:
        console.print(f"time: {made.steps:,} steps; how long they take was not asked for")
    else:
        console.print(
            f"time: {made.steps:,} steps of {made.step_seconds:.3g} s, {duration(made.seconds)} in "
            f"all ({made.step_from}); measuring before and after comes to it"
        )
    if lacking := shortfall(made):
        say(console, lacking)
    console.print(f"written  {made.path}\nnext     drlora train {made.path}")
