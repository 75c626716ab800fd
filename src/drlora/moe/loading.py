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
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from drlora.errors import ConfigError
from drlora.moe.families import family_of
from drlora.moe.families.interface import InterfaceExperts
from drlora.moe.packing import matrices_of, put_in, refuse_unfit
from drlora.ops.storage.arranged import PackedPair
from drlora.ops.storage.packed import Packed, packed_format

METHOD = "drlora_experts"


@register_quantization_config(METHOD)
class QuantisedExperts(QuantizationConfigMixin):
    """`quantization_config` of `from_pretrained`: experts in few bits, the rest as it is.

    Args:
        storage: `nf4`, `nf4-nested`, `int8`, `mxfp4` or `fp8`.

    Raises:
        ConfigError: if there is no such storage.
    """

    def __init__(self, storage: str = "nf4", **kwargs: Any) -> None:
        packed_format(storage)
        self.quant_method: Any = METHOD
        self.storage = storage


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):
    """What transformers asks while it loads."""

    quantization_config: QuantisedExperts

    def __init__(self, quantization_config: QuantisedExperts, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.kind = packed_format(quantization_config.storage)
        self.packed: dict[str, Packed | PackedPair] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Matrices of experts alone."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(family_of(module), InterfaceExperts) and name in matrices_of(module)

    def get_quantize_ops(self) -> ConversionOps:
        """Called for each such matrix."""
        return _Pack(self)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes a number, for what is reserved on a device."""
        is_packed = self.param_needs_quantization(model, param_name)
        return self.kind.bits / 8 if is_packed else param.element_size()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Refuse, before anything is read, what could not be packed."""
        found = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(family_of(module), InterfaceExperts)
        ]
        if not found:
            raise ConfigError(
                f"{type(model).__name__} has no experts that follow transformers' experts "
                f"interface, so QuantisedExperts has nothing to pack; leave it out."
            )
        for name, module in found:
            refuse_unfit(name, module, self.kind)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Packed matrices take the places that were kept for them."""
        by_module: dict[str, dict[str, Packed | PackedPair]] = {}
        for name, packed in self.packed.items():
            owner, _, key = name.rpartition(".")
            by_module.setdefault(owner, {})[key] = packed
        for owner, found in by_module.items():
            put_in(model.get_submodule(owner), found)
        self.packed = {}
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


class _Pack(ConversionOps):
    """One matrix of all experts of a block, as it comes from the file."""

    def __init__(self, quantizer: ExpertsQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Keep it packed, and leave an empty parameter in its place until all is loaded."""
        full_layer_name = kwargs["full_layer_name"]
        (value,) = input_dict.values()
        w_EOI = value[0] if isinstance(value, list) else value
        self.quantizer.packed[full_layer_name] = Packed.of(w_EOI, self.quantizer.kind)
        return {full_layer_name: nn.Parameter(w_EOI.new_empty(0), requires_grad=False)}
