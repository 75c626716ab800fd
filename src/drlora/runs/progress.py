"""What a run tells while it is under way; where that is shown is the caller's business.

train(recipe)                    # says nothing
train(recipe, progress=print)    # a few plain lines
train(recipe, progress=Mine())   # a Progress of one's own, such as a bar
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drlora.errors import counted, duration
from drlora.ranks.dynamics import RankDynamics
from drlora.ranks.event import Grant

PLAIN_LINES = 10


class Progress:
    """Is told how a run goes, and says nothing of it; override what is to be shown."""

    def say(self, text: str) -> None:
        """A sentence: what the run is, what was measured, what is about to happen."""

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """Something happens which takes a while, until the block ends."""
        yield

    def training_begins(self, step: int, of: int) -> None:
        """Training goes on from `step`, 0 for a new run; once for each batch size that is tried."""

    def step_done(self, step: int, of: int) -> None:
        """An optimizer step is done."""

    def logged(self, step: int, of: int, logs: dict[str, Any]) -> None:
        """What the Trainer logs: loss, learning_rate, epoch, tokens_per_second, rank_mean."""

    def grew(self, grants: list[Grant], text: str) -> None:
        """An event moved ranks; `text` says which, in a line."""

    def training_ends(self) -> None:
        """No step follows."""


class Lines(Progress):
    """A few plain lines, as a log keeps them."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.tell = tell
        self._tenth = 0
        self._begun_at = (0, time.monotonic())

    def say(self, text: str) -> None:
        """The sentence."""
        self.tell(text)

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """`loading embedded ...`."""
        self.say(f"{what} ...")
        yield

    def training_begins(self, step: int, of: int) -> None:
        """Start the clock."""
        self._tenth = PLAIN_LINES * step // max(1, of)
        self._begun_at = (step, time.monotonic())

    def logged(self, step: int, of: int, logs: dict[str, Any]) -> None:
        """`step 80/800, epoch 0.4, loss 1.696, 2:31 min left`, once every tenth of the run."""
        tenth = PLAIN_LINES * step // of
        if "loss" not in logs or tenth <= self._tenth:
            return
        self._tenth = tenth
        parts = [f"step {step}/{of}"]
        if logs.get("epoch") is not None:
            parts.append(f"epoch {logs['epoch']:.2f}")
        parts.append(f"loss {logs['loss']:.3f}")
        if left := self.time_left(step, of):
            parts.append(left)
        self.say(", ".join(parts))

    def time_left(self, step: int, of: int) -> str:
        """`1:05 min left`, by the mean of the steps so far; nothing before the first one."""
        first, started = self._begun_at
        done, due = step - first, of - step
        if done < 1 or due < 1:
            return ""
        return f"{duration((time.monotonic() - started) / done * due)} left"


def progress_from(given: Progress | Callable[[str], object] | None) -> Progress:
    """A Progress as it is; a function, such as print, is told plain lines; None is told nothing."""
    if given is None or isinstance(given, Progress):
        return given or Progress()
    return Lines(given)


class TellProgress(TrainerCallback):
    """Tells a Progress what the Trainer does.

    Attributes:
        dynamics: of the run, once there are any.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.dynamics: RankDynamics | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step that the run begins or resumes at, and what growth is planned to be."""
        if self.dynamics is not None and self.dynamics.event_steps:
            self.progress.say(f"growth: {self.dynamics.schedule}")
        self.progress.training_begins(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more."""
        self.progress.step_done(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Of training; not the entries of evaluations."""
        if logs is not None and "loss" in logs:
            self.progress.logged(state.global_step, state.max_steps, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The end."""
        self.progress.training_ends()

    def show_growth(self, grants: list[Grant]) -> None:
        """One event; for the callback's `on_growth`."""
        if self.dynamics is not None:
            self.progress.grew(grants, growth_line(grants, self.dynamics))


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
    return (
        f"step {grants[0].step}: {', '.join(changes)}{most and f', most to {most}'}; the largest "
        f"has {max(g.rank for g in grants)}; {dynamics.growth.done_share:.0%} of the "
        f"{dynamics.growth.noun} is done"
    )
