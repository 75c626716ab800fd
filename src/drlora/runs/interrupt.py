"""Ctrl-C and SIGTERM: a training ends after its step, anything else at once."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from drlora.distributed import are_several
from drlora.errors import Terminated
from drlora.runs.progress import Progress


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

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
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
        self.progress.say("stopping after this step; Ctrl-C again stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer for a checkpoint and the end."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
            if args.save_strategy == SaveStrategy.BEST:  # or an evaluation would decide on it
                args.save_strategy = SaveStrategy.STEPS

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch that was broken off has not ended; what a whole one brings is saved with it."""
        if self.interrupted:
            is_whole = math.isclose(state.epoch or 0.0, round(state.epoch or 0.0), abs_tol=1e-9)
            control.should_evaluate &= is_whole
            control.should_save = control.should_evaluate
