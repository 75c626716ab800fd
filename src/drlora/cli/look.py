"""What `drlora data` prints: figures, and examples with their trained part marked."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from drlora.cli.progress import say
from drlora.runs.look import DataReport, Example, summary

TRAINED = "bold green"
OPEN, CLOSE = "[[", "]]"  # where there is no colour
NAMES = {"train": "train", "eval": "held out"}


def print_data(found: DataReport, console: Console) -> None:
    """Role by role: figures, then examples."""
    has_colour = console.color_system is not None
    marked = "in green" if has_colour else f"in {OPEN} {CLOSE}"
    for role in found.roles:
        say(console, f"{NAMES[role.role]}: {role.source}, at most {found.max_length:,} tokens")
        for line in summary(role):
            say(console, f"  {line}")
    for note in found.notes:
        say(console, note)
    for role in found.roles:
        for number, example in enumerate(role.shown, start=1):
            console.print()
            where = f", {example.where}" if example.where else ""
            say(
                console,
                f"{NAMES[role.role]}, example {number}{where}: {example.tokens:,} tokens, "
                f"{example.trained:,} trained ({marked})",
            )
            console.print(_marked(example, has_colour), soft_wrap=True)


def _marked(example: Example, has_colour: bool) -> Text:
    text = Text()
    for part in example.parts:
        if part.is_trained and not has_colour:
            text.append(f"{OPEN}{part.text}{CLOSE}")
        else:
            text.append(part.text, TRAINED if part.is_trained else "")
    return text
