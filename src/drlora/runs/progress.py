"""What a run writes and shows while it trains: metrics, progress bar or plain lines, Ctrl-C.

On a terminal lines are broken between words; elsewhere, as in a log, each line is whole.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drlora.distributed import are_several
from drlora.errors import Terminated, counted, duration
from drlora.io.jsonl import append_lines
from drlora.io.writing import sync
from drlora.ranks.dynamics import RankDynamics
from drlora.ranks.event import Grant

PLAIN_LINES = 10


class MetricsLog(TrainerCallback):
    """Appends every log entry of the Trainer to a .jsonl file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line: step, kind, and what the Trainer logged."""
        if not state.is_world_process_zero:
            return
        append_lines(self.path, [{"step": state.global_step, "kind": "log", **(logs or {})}])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What lies before a checkpoint is to outlive it."""
        if state.is_world_process_zero and self.path.exists():
            sync(self.path)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, which clusters send, acts as Ctrl-C does while the block lasts: `Terminated`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C and SIGTERM end the training after the step under way, with a checkpoint; a second one
    ends it at once.

    Of several processes, which would hear of it at different steps, it ends all at once.

    Use it as a context around `trainer.train()`.

    Attributes:
        signal: SIGINT or SIGTERM, if one came.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.signal: int | None = None

    def __enter__(self) -> StopOnInterrupt:
        is_main_thread = threading.current_thread() is threading.main_thread()
        listens = is_main_thread and not are_several()
        self._before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM)
            if listens
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def interrupted(self) -> bool:
        """Whether the run was told to stop."""
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.signal = number
        self.console.print("stopping after this step; Ctrl-C again stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer for a checkpoint and the end."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True


class ShowProgress(TrainerCallback):
    """A bar and a line a growth event on a terminal; a few plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.dynamics: RankDynamics | None = None
        self.note = ""  # nothing was logged yet
        self.tenth = 0
        self._begun_at = (0, time.monotonic())
        self._bar_width = max(4, min(14, console.width - 71))
        self.bar = Progress(
            BarColumn(self._bar_width),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start at the step that the run resumes from."""
        self.tenth = PLAIN_LINES * state.global_step // max(1, state.max_steps)
        self._begun_at = (state.global_step, time.monotonic())
        for task in self.bar.task_ids:  # of a batch that did not fit
            self.bar.remove_task(task)
        self.task = self.bar.add_task(
            "training",
            total=state.max_steps,
            completed=state.global_step,
            note=self.note,
            left="",
        )
        if self.dynamics is not None and self.dynamics.event_steps:
            say(self.console, f"growth: {self.dynamics.schedule}")
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        left = self._left(state)
        self.bar.update(self.task, completed=state.global_step, note=self.note, left=left)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the numbers for the bar, or print the loss in one of a few lines."""
        if logs is None or "loss" not in logs:
            return
        # Beside it stand the bar, `40/100` and `59:59 min left`, with a space between two.
        beside = self._bar_width + 2 * len(str(state.max_steps)) + 18
        self.note = bar_note(logs, self.console.width - beside)
        tenth = PLAIN_LINES * state.global_step // state.max_steps
        if not self.console.is_terminal and tenth > self.tenth:
            self.tenth = tenth
            say(self.console, self._plain_line(state, logs))

    def _plain_line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        """`step 80/800, epoch 0.4, loss 1.696, 2:31 min left`."""
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if logs.get("epoch") is not None:
            parts.append(f"epoch {logs['epoch']:.2f}")
        parts.append(f"loss {logs['loss']:.3f}")
        if left := self._left(state):
            parts.append(left)
        return ", ".join(parts)

    def _left(self, state: TrainerState) -> str:
        """`1:05 min left`, by the mean of the steps so far; nothing before the first one."""
        first, started = self._begun_at
        done, due = state.global_step - first, state.max_steps - state.global_step
        if done < 1 or due < 1:
            return ""
        return f"{duration((time.monotonic() - started) / done * due)} left"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar down."""
        self.bar.stop()

    def show_growth(self, grants: list[Grant]) -> None:
        """One line for one event, on a terminal."""
        if self.console.is_terminal and self.dynamics is not None:
            say(self.console, growth_line(grants, self.dynamics))


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


@contextmanager
def at_work(console: Console, what: str) -> Iterator[None]:
    """Say that something is happening which takes a while: a spinner on a terminal, else a line."""
    if not console.is_terminal:
        say(console, f"{what} ...")
        yield
        return
    with console.status(Text(what)):
        yield


def growth_line(grants: list[Grant], dynamics: RankDynamics) -> str:
    """`step 120: 24 ranks to 9 experts, most to 3.7 +5, 0.1 +4, 2.9 +4; the largest has 12; 40 % of
    the growth is done`; 3.7 is expert 7 of the fourth layer.
    """
    layers = {block: number for number, block in enumerate(dynamics.adapters)}
    top = sorted((g for g in grants if g.granted > 0), key=lambda g: -g.granted)[:3]
    most = ", ".join(f"{layers[g.block]}.{g.expert} +{g.granted}" for g in top)
    changes = [
        f"{counted(sum(abs(g.granted) for g in some), 'rank')} {word} "
        f"{counted(len(some), 'expert')}"
        for word, sign in (("to", 1), ("taken from", -1))
        if (some := [g for g in grants if g.granted * sign > 0])
    ]
    kind = "pruning" if dynamics.config.allocation == "prune" else "growth"
    return (
        f"step {grants[0].step}: {', '.join(changes)}{most and f', most to {most}'}; the largest "
        f"has {max(g.rank for g in grants)}; {dynamics.growth.done_share:.0%} of the {kind} is done"
    )
