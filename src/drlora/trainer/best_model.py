"""The best checkpoint of an adapter with a name of its own, under `load_best_model_at_end`.

PEFT saves the adapter `default` into the checkpoint itself and any other one folder deeper, where
transformers' Trainer does not look when it loads the best checkpoint: it goes on with the last
weights, or with those of `default`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import TrainerState, TrainingArguments

from drlora.errors import ConfigError
from drlora.io.run_files import ADAPTER_WEIGHTS

_IN_CHECKPOINT = "default"


def refuse_mixed_up(args: TrainingArguments, model: Any, adapter: str) -> None:
    """Refuse where the Trainer would load another adapter's weights, before training.

    Raises:
        ConfigError: naming the two.
    """
    others = getattr(model, "peft_config", {})
    if args.load_best_model_at_end and adapter != _IN_CHECKPOINT and _IN_CHECKPOINT in others:
        raise ConfigError(
            f"load_best_model_at_end=True with two adapters: the Trainer would load the weights of "
            f"{_IN_CHECKPOINT!r} into {adapter!r}, which is trained. Give the trained adapter the "
            f"name {_IN_CHECKPOINT!r}, or leave load_best_model_at_end out and load the folder "
            f"{adapter} of the best checkpoint yourself."
        )


def load_best(args: TrainingArguments, state: TrainerState, model: Any, adapter: str) -> None:
    """Load the adapter from the best checkpoint, where the Trainer has not."""
    best = state.best_model_checkpoint
    if not (args.load_best_model_at_end and best and isinstance(model, PeftModel)):
        return
    folder = Path(best) / adapter
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if adapter != _IN_CHECKPOINT and not is_sharded and _has_adapter(folder):
        model.load_adapter(str(folder), adapter)


def _has_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_WEIGHTS).is_file()
