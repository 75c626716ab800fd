"""Experts packed while a model is loaded, so that they are never all wide at once.

    base = AutoModelForCausalLM.from_pretrained(name, quantization_config=QuantisedExperts("nf4"))

transformers reads one matrix of all experts of a block at a time and hands it to the quantizer
below, which packs it; everything else is loaded as ever. What comes of it is what
`quantise_experts` makes of the model in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from drlora.errors import ConfigError
from drlora.moe.blocks import find_blocks, has_experts
from drlora.moe.families import Place
from drlora.moe.packing import (
    is_packed,
    places_of,
    prepare_around,
    put_in,
    refuse_unfit,
    stacked,
    take_out,
)
from drlora.moe.rest import RESTS, keep_trainable, quantizer_of_rest, refuse_without_bitsandbytes
from drlora.ops.storage.arranged import InPlace
from drlora.ops.storage.packed import FORMATS, Packed, packed_format

METHOD = "drlora_experts"


@register_quantization_config(METHOD)
class QuantisedExperts(QuantizationConfigMixin):
    """`quantization_config` of `from_pretrained`: experts in few bits, the rest as it is.

    Args:
        storage: `nf4`, `nf4-nested`, `int8`, `mxfp4` or `fp8`.
        nested: whether the scales of `nf4` are of eight bits themselves, which is `nf4-nested`.
        rest: `nf4` to have bitsandbytes quantise linear layers outside the experts too: those of
            attention, and dense MLPs. Routers, gates, the head and embeddings stay as they are.
        shared: whether shared experts go with the rest.

    Raises:
        ConfigError: if there is no such storage, or a setting has no effect on it.
    """

    def __init__(
        self,
        storage: str = "nf4",
        nested: bool = False,
        rest: str | None = None,
        shared: bool = False,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.storage = storage_named(storage, nested)
        self.rest, self.shared = rest, shared
        if rest not in (None, *RESTS):
            raise ConfigError(f"rest={rest!r} is not known; leave it out, or choose {list(RESTS)}.")
        if shared and rest is None:
            raise ConfigError("shared=True has no effect without rest; set rest='nf4' too.")


def storage_named(storage: str, nested: bool = False) -> str:
    """The name of a storage, or of the same with nested scales.

    Raises:
        ConfigError: if there is none.
    """
    packed_format(storage)
    if not nested or storage.endswith("-nested"):
        return storage
    if f"{storage}-nested" not in FORMATS:
        raise ConfigError(f"nested=True has no effect on {storage!r}; leave it out, or take 'nf4'.")
    return f"{storage}-nested"


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):
    """What transformers asks while it loads."""

    quantization_config: QuantisedExperts

    def __init__(self, quantization_config: QuantisedExperts, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.kind = packed_format(quantization_config.storage)
        self.packed: dict[str, InPlace] = {}
        # Full name -> (of the experts module, what can be packed), once there is a model.
        self.places: dict[str, tuple[str, Place]] = {}
        self.refusal: ConfigError | None = None  # the loader would swallow it
        self.rest: Any = None  # transformers' quantizer of the linear layers, once there is a model

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises:
        ConfigError: if what is needed is not installed.
        """
        self._load_kwargs = kwargs
        refuse_without_bitsandbytes(self.quantization_config.rest)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Matrices of experts, and what the rest's quantizer asks for."""
        if self.is_of_experts(model, param_name):
            return True
        return self.rest is not None and self.rest.param_needs_quantization(model, param_name)

    def is_of_experts(self, model: Any, param_name: str) -> bool:
        """Whether a parameter is a matrix of experts."""
        return param_name in self.places

    def find_places(self, model: Any) -> list[tuple[str, nn.Module]]:
        """The experts modules of a model, by name; `places` are filled."""
        names = [b.experts_name for b in find_blocks(model)] if has_experts(model) else []
        found = [(name, model.get_submodule(name)) for name in names]
        self.places = {
            f"{name}.{place.path}": (name, place)
            for name, module in found
            for place in places_of(module)
        }
        return found

    def get_quantize_ops(self) -> ConversionOps:
        """Called for each of them."""
        return _Pack(self)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes a number, for what is reserved on a device."""
        if self.is_of_experts(model, param_name):
            return self.kind.bits / 8
        if self.rest is not None and self.rest.param_needs_quantization(model, param_name):
            return float(self.rest.quantized_element_size)
        return param.element_size()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Refuse, before anything is read, what could not be packed."""
        found = self.find_places(model)
        if not found:
            raise ConfigError(
                f"{type(model).__name__} has no experts that are known, so QuantisedExperts has "
                f"nothing to pack; leave it out."
            )
        for name, module in found:
            refuse_unfit(name, module, self.kind)
        config = self.quantization_config
        if config.rest:
            self.rest = quantizer_of_rest(model, config.shared, "nested" in self.kind.name)
            self.rest.validate_environment(**self._load_kwargs)
            self.rest._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Packed matrices take the places that were kept for them.

        Raises:
            ConfigError: what was refused while they were read.
        """
        if self.refusal is not None:
            raise self.refusal
        by_module: dict[str, dict[str, InPlace]] = {}
        for name, packed in self.packed.items():
            experts, place = self.places[name]
            by_module.setdefault(experts, {})[place.path] = packed
        for experts, found in by_module.items():
            put_in(model.get_submodule(experts), found)
            prepare_around(model, experts)
        self.packed = {}
        keep_trainable(model)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Asked where a model is saved as a checkpoint.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"experts packed as {self.kind.name} are not saved as a checkpoint, which could not be "
            f"read back; save the adapter alone, and pack the base again when it is loaded."
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()`: experts of ordinary numbers again, those that were packed."""
        for module in list(model.modules()):
            if is_packed(module):
                take_out(module, dtype)
        return model if self.rest is None else self.rest._dequantize(model, dtype)


class _Pack(ConversionOps):
    """One matrix of all experts of a block, as it comes from the file."""

    def __init__(self, quantizer: ExpertsQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Keep it packed, and leave an empty parameter in its place until all is loaded."""
        full_layer_name = kwargs["full_layer_name"]
        if not self.quantizer.is_of_experts(kwargs["model"], full_layer_name):
            found: dict[str, Any] = self.quantizer.rest.get_quantize_ops().convert(
                input_dict, *args, **kwargs
            )
            return found
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        w_EOI = stacked(weight, self.quantizer.places[full_layer_name][1])
        try:
            self.quantizer.packed[full_layer_name] = Packed.of(w_EOI, self.quantizer.kind)
        except ConfigError as error:
            self.quantizer.refusal = ConfigError(f"{full_layer_name}: {error}")
        return {full_layer_name: nn.Parameter(w_EOI.new_empty(0), requires_grad=False)}
