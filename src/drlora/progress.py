"""What a run writes and shows while it trains: metrics, progress bar or plain lines, Ctrl-C."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drlora.dynamics import Grant, RankDynamics
from drlora.jsonl import append_lines
from drlora.processes import are_several
from drlora.writing import sync

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


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the training after the step under way, with a checkpoint; twice ends it at once.

    Of several processes, which would hear of it at different steps, it ends all at once.

    Use it as a context around `trainer.train()`.

    Attributes:
        interrupted: whether Ctrl-C was pressed.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.interrupted = False

    def __enter__(self) -> StopOnInterrupt:
        is_main_thread = threading.current_thread() is threading.main_thread()
        self._is_main = is_main_thread and not are_several()
        if self._is_main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
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
        self.bar = Progress(
            BarColumn(14),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start at the step that the run resumes from."""
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, note=self.note
        )
        if self.dynamics is not None and self.dynamics.event_steps:
            self.console.print(f"growth: {self.dynamics.schedule}")
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step, note=self.note)

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
        self.note = bar_note(logs)
        tenth = PLAIN_LINES * state.global_step // state.max_steps
        if not self.console.is_terminal and tenth > self.tenth:
            self.tenth = tenth
            loss = f"loss {logs['loss']:.3f}"
            self.console.print(f"step {state.global_step}/{state.max_steps}, {loss}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar down."""
        self.bar.stop()

    def show_growth(self, grants: list[Grant]) -> None:
        """One line for one event, on a terminal."""
        if self.console.is_terminal and self.dynamics is not None:
            self.console.print(growth_line(grants, self.dynamics))


def bar_note(logs: dict[str, Any]) -> str:
    """`loss 1.234 lr 2.0e-04 3,210 tokens/s rank 12.5`, as far as it was logged."""
    shown = {
        "loss": "loss {:.3f}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "rank_mean": "rank {:.1f}",
    }
    return " ".join(text.format(logs[key]) for key, text in shown.items() if key in logs)


def growth_line(grants: list[Grant], dynamics: RankDynamics) -> str:
    """`step 120: 24 ranks to 9 experts, most to 3.7 +5, 0.1 +4, 2.9 +4; the largest has 12; 40 % of
    the growth is done`; 3.7 is expert 7 of the fourth layer.
    """
    layers = {block: number for number, block in enumerate(dynamics.adapters)}
    top = sorted((g for g in grants if g.granted > 0), key=lambda g: -g.granted)[:3]
    most = ", ".join(f"{layers[g.block]}.{g.expert} +{g.granted}" for g in top)
    changes = [
        f"{_count(sum(abs(g.granted) for g in some), 'rank')} {word} {_count(len(some), 'expert')}"
        for word, sign in (("to", 1), ("taken from", -1))
        if (some := [g for g in grants if g.granted * sign > 0])
    ]
    kind = "pruning" if dynamics.config.allocation == "prune" else "growth"
    return (
        f"step {grants[0].step}: {', '.join(changes)}{most and f', most to {most}'}; the largest "
        f"has {max(g.rank for g in grants)}; {dynamics.growth.done_share:.0%} of the {kind} is done"
    )


def _count(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {what}{'s' * (number != 1)}"
