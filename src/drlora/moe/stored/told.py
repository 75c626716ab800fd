"""What is said of a model whose quantiser did not do with experts and routers what it seems to.

Most quantisers replace `nn.Linear` and nothing else, so experts in one tensor stay in 16 bits
without a word, though they are nearly all of the weights. Some decode them while they load. And
where a checkpoint has them packed one by one, and nothing reads them, they are random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from drlora.errors import ConfigError
from drlora.moe.blocks import MoEBlock
from drlora.moe.families import family_of
from drlora.moe.refusals import is_plain
from drlora.moe.stored.base import FORMS, StoredForm
from drlora.moe.stored.config import stored_settings
from drlora.moe.stored.refused import LOSES_EXPERTS, REFUSED, method_of
from drlora.ops.storage.packed import packed_format
from drlora.ops.weights import MATRICES

_STORAGE = "nf4"  # that is advised


def refuse_lost_experts(model: nn.Module) -> None:
    """Refuse a checkpoint whose experts transformers cannot have read.

    Raises:
        ConfigError: naming how it is quantised.
    """
    config: Any = getattr(model, "config", None)
    settings = stored_settings(config) if hasattr(config, "get_text_config") else None
    if settings is None or not getattr(getattr(model, "hf_quantizer", None), "pre_quantized", True):
        return
    method = method_of(settings)
    if method in LOSES_EXPERTS:
        raise ConfigError(
            f"{type(model).__name__} is of a checkpoint quantised with {REFUSED[method]} "
            f"(quant_method {method!r}), of which experts in one tensor are not read: they would "
            f"be random numbers. Load the model's 16-bit checkpoint with quantization_config="
            f"drlora.QuantisedExperts({_STORAGE!r})."
        )


def refuse_packed_routers(model: nn.Module, blocks: Sequence[MoEBlock]) -> None:
    """Refuse a router in few bits: it sends tokens to other experts than it was trained to.

    Raises:
        ConfigError: naming it.
    """
    for block in blocks:
        if block.router_name is None:
            continue
        for key, weight in model.get_submodule(block.router_name).named_parameters():
            if not is_plain(weight) or weight.dtype.itemsize < 2:
                raise ConfigError(
                    f"the router {block.router_name} is quantised ({key} is a "
                    f"{type(weight).__name__} of {weight.dtype}), so it sends tokens to other "
                    f"experts; keep it in 16 bits, for bitsandbytes with "
                    f"llm_int8_skip_modules=['lm_head', {block.router_name.rpartition('.')[2]!r}]."
                )


def tell_of_wide_experts(model: nn.Module, blocks: Sequence[MoEBlock]) -> None:
    """Warn of experts in 16 bits in a model that is quantised, or whose checkpoint was."""
    matrices = list(_plain_matrices(model, blocks))
    if not matrices:
        return
    numbers = sum(m.shape[0] * m.shape[1] * m.shape[2] for m in matrices)
    held = sum(m.num_bytes for m in matrices)
    kind = str(matrices[0].dtype).removeprefix("torch.")
    if (settings := _decoded_from(model)) is not None:
        form = _form_of(settings)
        name = form.storage if form is not None and form.storage else method_of(settings)
        own = f" instead of {numbers * form.kind.bits / 8e9:.2f} GB" if form is not None and (
            form.storage
        ) else ""  # fmt: skip
        ask = "name" if own else f"name, {_STORAGE!r}"
        warnings.warn(
            f"the checkpoint keeps its experts in {name}, and transformers made {kind} of them: "
            f"{held / 1e9:.2f} GB{own}. Load it with config=drlora.packed_config({ask}) to keep "
            f"them in few bits.",
            stacklevel=2,
        )
    elif (quantiser := _quantiser_of(model)) is not None:
        share = numbers / max(1, sum(_numbers_of(p) for p in model.parameters()))
        packed = numbers * packed_format(_STORAGE).bits / 8e9
        warnings.warn(
            f"{quantiser} leaves experts as they are: {100 * share:.0f} % of the weights are still "
            f"{kind}, {held / 1e9:.2f} GB. drlora.quantise_experts(model, {_STORAGE!r}) makes "
            f"{packed:.2f} GB of them.",
            stacklevel=2,
        )


def _plain_matrices(model: nn.Module, blocks: Sequence[MoEBlock]) -> Iterator[Any]:
    """Of blocks without an adapter: what was said once is not said again."""
    for block in blocks:
        experts = model.get_submodule(block.experts_name)
        family = None if isinstance(experts, BaseTunerLayer) else family_of(experts)
        if family is not None:
            weights = family.weights(experts)
            yield from (m for m in map(weights.matrix, MATRICES) if m.is_plain)


def _decoded_from(model: Any) -> dict[str, Any] | None:
    """`quantization_config` of the checkpoint, where its experts were decoded while loading."""
    for conversion in getattr(model, "_weight_conversions", None) or ():
        ends = {target.rpartition(".")[2] for target in conversion.target_patterns}
        for step in getattr(conversion, "operations", ()):
            quantizer: Any = getattr(step, "hf_quantizer", None)
            is_of_experts = ends & {"gate_up_proj", "up_proj", "down_proj"}
            if type(step).__name__.endswith("Dequantize") and quantizer and is_of_experts:
                return dict(quantizer.quantization_config.to_dict())
    return None


def _form_of(settings: dict[str, Any]) -> StoredForm | None:
    try:
        return FORMS[method_of(settings)](settings)
    except (KeyError, ConfigError):
        return None


def _quantiser_of(model: Any) -> str | None:
    """What has quantised the other layers; None for a model that is not quantised."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if config is not None:
        is_own = str(getattr(config, "quant_method", "")).startswith("drlora_")
        return None if is_own else type(config).__name__
    layers = {type(m).__name__ for m in model.modules()} & {"Linear4bit", "Linear8bitLt"}
    return f"bitsandbytes ({min(layers)})" if layers else None


def _numbers_of(weight: Tensor) -> int:
    """How many a parameter stands for; bitsandbytes has two in a byte."""
    return weight.numel() * (2 if type(weight).__name__ == "Params4bit" else 1)
