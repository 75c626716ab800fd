"""What transformers' Trainer is told of DeepSpeed, looked at before the first step.

DeepSpeed is not imported here: its configuration is a dictionary by then.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from drlora.adapter.layer import DrLoraExperts
from drlora.distributed.zero import whole_shapes
from drlora.errors import ConfigError

PACKED_UNDER_ZERO_3 = (
    "ZeRO-3 would split experts in few bits, which are read whole. Set the stage to 2: they are "
    "small, and it shares out what is trained."
)


def refuse_unfit_deepspeed(args: TrainingArguments, model: nn.Module | None = None) -> None:
    """Refuse what ranks cannot grow with; what only ZeRO's optimizer knows, `watch` refuses.

    Args:
        args: as the Trainer has them.
        model: that is to be trained, with adapters; None before it is loaded.

    Raises:
        ConfigError: naming the setting and the way out.
    """
    config = _config_of(args)
    if (config.get("expert_parallel") or {}).get("enabled"):
        raise ConfigError(
            "DeepSpeed's expert_parallel replaces the MoE blocks, and the adapters with them. "
            "Leave expert_parallel out of its configuration."
        )
    zero = config.get("zero_optimization") or {}
    for key in ("mics_shard_size", "zero_hpz_partition_size"):
        if (size := zero.get(key)) is not None and isinstance(size, int) and size > 1:
            raise ConfigError(
                f"ranks cannot grow under DeepSpeed with {key}={size}, which keeps weights at a "
                f"second place. Leave it out of zero_optimization."
            )
    if zero.get("zenflow"):
        raise ConfigError(
            "ranks cannot grow under DeepSpeed with zenflow, which steps on some of the elements "
            "at other times. Leave it out of zero_optimization."
        )
    if asks_for_zero_3(args) and args.torch_compile:
        raise ConfigError(
            "torch_compile cannot work with an adapter on experts under ZeRO-3: what is compiled "
            "reads weights that ZeRO has not brought together. Set torch_compile to false, or use "
            "ZeRO-2."
        )

    if asks_for_zero_3(args) and model is not None:
        layers = [module for module in model.modules() if isinstance(module, DrLoraExperts)]
        with whole_shapes(model):  # the engine has split the weights by now
            reasons = [layer.base_weights.fixed for layer in layers]
        if reason := next(filter(None, reasons), None):
            raise ConfigError(f"{reason}: {PACKED_UNDER_ZERO_3}")


def asks_for_zero_3(args: TrainingArguments) -> bool:
    """Whether the model is to be split by DeepSpeed."""
    return (_config_of(args).get("zero_optimization") or {}).get("stage") == 3


def _config_of(args: TrainingArguments) -> dict[str, Any]:
    """As the Trainer has read and filled it in; empty without DeepSpeed."""
    read: Any = getattr(args, "hf_deepspeed_config", None)
    return dict(getattr(read, "config", None) or {})
