"""A run on the terminal: a bar and a line a growth event; elsewhere a few plain lines.

On a terminal lines are broken between words; elsewhere, as in a log, each line is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from drlora.ranks.event import Grant
from drlora.runs.progress import Lines


class ConsoleProgress(Lines):
    """Shows a run on a console."""

    def __init__(self, console: Console) -> None:
        super().__init__(lambda text: say(console, text))
        self.console = console
        self.note = ""  # nothing was logged yet
        self._bar_width = max(4, min(14, console.width - 71))
        self.bar = Bar(
            BarColumn(self._bar_width),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
        )

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """A spinner on a terminal, else a line."""
        if self.console.is_terminal:
            with self.console.status(Text(what)):
                yield
        else:
            with super().at_work(what):
                yield

    def training_begins(self, step: int, of: int) -> None:
        """Start the bar."""
        super().training_begins(step, of)
        for task in self.bar.task_ids:  # of a batch that did not fit
            self.bar.remove_task(task)
        self.task = self.bar.add_task("training", total=of, completed=step, note=self.note, left="")
        self.bar.start()

    def step_done(self, step: int, of: int) -> None:
        """Move the bar."""
        left = self.time_left(step, of)
        self.bar.update(self.task, completed=step, note=self.note, left=left)

    def logged(self, step: int, of: int, logs: dict[str, Any]) -> None:
        """Keep the numbers for the bar, or print the loss in one of a few lines."""
        if not self.console.is_terminal:
            super().logged(step, of, logs)
            return
        # Beside it stand the bar, `40/100` and `59:59 min left`, with a space between two.
        beside = self._bar_width + 2 * len(str(of)) + 18
        self.note = bar_note(logs, self.console.width - beside)

    def grew(self, grants: list[Grant], text: str) -> None:
        """One line for one event, on a terminal."""
        if self.console.is_terminal:
            self.say(text)

    def training_ends(self) -> None:
        """Take the bar down."""
        self.bar.stop()


def say(console: Console, text: str) -> None:
    """Print a sentence: on a terminal broken between words, elsewhere in one line."""
    console.print(text, soft_wrap=not console.is_terminal, markup=False)


def bar_note(logs: dict[str, Any], width: int = 1000) -> str:
    """`loss 1.234 lr 2.0e-04 3,210 tokens/s rank 12.5`, as far as it was logged and has room."""
    shown = {
        "loss": "loss {:.3f}",
        "rank_mean": "rank {:.1f}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
    }
    found = {key: text.format(logs[key]) for key, text in shown.items() if key in logs}
    while len(found) > 1 and len(" ".join(found.values())) > width:
        found.popitem()
    in_order = ("loss", "learning_rate", "tokens_per_second", "rank_mean")
    return " ".join(found[key] for key in in_order if key in found)
