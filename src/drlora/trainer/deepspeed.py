"""What transformers' Trainer is told of DeepSpeed, looked at before the first step.

DeepSpeed is not imported here: its configuration is a dictionary by then.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from drlora.errors import ConfigError


def refuse_unfit_deepspeed(args: TrainingArguments) -> None:
    """Refuse what ranks cannot grow with; what only ZeRO's optimizer knows, `watch` refuses.

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
    if zero.get("stage") == 3 and args.torch_compile:
        raise ConfigError(
            "torch_compile cannot work with an adapter on experts under ZeRO-3: what is compiled "
            "reads weights that ZeRO has not brought together. Set torch_compile to false, or use "
            "ZeRO-2."
        )


def _config_of(args: TrainingArguments) -> dict[str, Any]:
    """As the Trainer has read and filled it in; empty without DeepSpeed."""
    read: Any = getattr(args, "hf_deepspeed_config", None)
    return dict(getattr(read, "config", None) or {})
