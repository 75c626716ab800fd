"""The linear layers outside the experts in four bits, by bitsandbytes' own layers.

They are few of an MoE's weights: a tenth of OLMoE's, a twentieth of Qwen3-30B-A3B's. Routers and
gates are never among them: a wrong router sends tokens to other experts.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert

from drlora.errors import ConfigError
from drlora.moe.blocks import find_blocks

RESTS = ("nf4",)


def refuse_without_bitsandbytes(rest: str | None) -> None:
    """Raises:
    ConfigError: if `rest` asks for layers of a package that is not installed.
    """
    if rest and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"rest={rest!r} needs bitsandbytes, which is not installed: pip install "
            f"'drlora[bnb]', or leave it out."
        )


def linears_of_rest(model: Any, shared: bool = False) -> list[str]:
    """Names of the linear layers that may be quantised.

    Args:
        model: with or without memory for its weights.
        shared: whether those of shared experts are among them.
    """
    kept = set(get_keys_to_not_convert(model))
    blocks = find_blocks(model)
    inside = tuple(f"{name}." for block in blocks for name in (block.name, block.experts_name))
    of_shared = tuple(f"{name}." for block in blocks for name in block.shared_names)

    def may(name: str) -> bool:
        if name in kept or any(name.startswith(f"{key}.") for key in kept):
            return False
        if of_shared and name.startswith(of_shared):
            return shared
        return not name.startswith(inside)

    return [n for n, m in model.named_modules() if type(m) is nn.Linear and may(n)]


def keep_trainable(model: nn.Module) -> None:
    """Have bitsandbytes' layers stay as they are trained with.

    On a CPU with 16-bit products a forward pass without gradients packs them anew for a function
    that has no backward pass, and training after it would go without their gradients (0.50.2).
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # puts weights that were packed so back as they were


def quantizer_of_rest(model: Any, shared: bool, nested: bool) -> Any:
    """transformers' quantizer of these layers, which it replaces with bitsandbytes'."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    chosen = set(linears_of_rest(model, shared))
    left = [n for n, m in model.named_modules() if type(m) is nn.Linear and n not in chosen]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=left,
    )
    return Bnb4BitHfQuantizer(config, pre_quantized=False)
