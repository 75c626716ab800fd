"""The log entries of a run's training, in metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drlora.io.jsonl import append_lines
from drlora.io.writing import sync


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
