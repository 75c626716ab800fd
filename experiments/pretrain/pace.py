"""A learning rate schedule that follows the clock, so that a run ends on time on a busy machine.

Imported by `pretrain.py`.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WARM_UP, DECAY_FROM = 0.02, 0.65


@dataclass
class Schedule:
    """Warm-up, stable, decay over `length` units (seconds or steps) of which `done` are over.

    An instance rather than a function, so that LambdaLR saves `done` with its state.
    """

    length: float
    done: float = 0.0

    def __call__(self, step: int) -> float:
        """The factor on the peak learning rate."""
        progress = min(self.done / self.length, 1.0)
        if progress < WARM_UP:
            # The first steps would otherwise be lost: no time has passed yet at step 0.
            return max(progress / WARM_UP, 0.01)
        return min(1.0, 1 - math.sqrt(max(progress - DECAY_FROM, 0) / (1 - DECAY_FROM)))


class Pace(TrainerCallback):
    """Move the schedule on by the clock or the steps, alike in every process; stop at its end."""

    def __init__(self, schedule: Schedule, by_clock: bool) -> None:
        self.schedule = schedule
        self.by_clock = by_clock
        self.length = schedule.length

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        # A checkpoint's scheduler state has overwritten the length by now.
        self.schedule.length = self.length
        self.origin = time.monotonic() - self.schedule.done

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        done = time.monotonic() - self.origin if self.by_clock else float(state.global_step)
        self.schedule.done = from_first_process(done)
        if self.schedule.done >= self.schedule.length:
            control.should_training_stop = control.should_save = control.should_evaluate = True


def from_first_process(value: float) -> float:
    """The first process's value in all of them: unequal learning rates would part the replicas."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return shared.item()
