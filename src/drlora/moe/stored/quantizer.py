"""What transformers asks while it loads a checkpoint whose experts stay as they are there.

Experts' tensors are stacked and put in the places of the parameters, undecoded. Of everything else,
what is in few bits stays so where bitsandbytes is installed and made it; all other layers are
decoded to 16 bits, attention among them.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantizer,
)
from transformers.utils import is_bitsandbytes_available

from drlora.errors import ConfigError, counted
from drlora.moe.blocks import find_blocks
from drlora.moe.loading import ExpertsQuantizer
from drlora.moe.packing import refuse_unfit
from drlora.moe.stored.base import StoredForm
from drlora.moe.stored.config import METHOD, StoredExperts
from drlora.moe.stored.conversion import KeepList, KeepStack, PackAgain, Rest
from drlora.ops.storage.arranged import InPlace

_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


@register_quantizer(METHOD)
class StoredQuantizer(ExpertsQuantizer):
    """Of `StoredExperts`."""

    quantization_config: StoredExperts  # type: ignore[assignment]

    def __init__(self, quantization_config: StoredExperts, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]
        self.form = quantization_config.form
        # transformers' own, of the linear layers that stay packed, or of all where it decodes.
        self.of_transformers = _of_transformers(self.form)
        self.rest = None if self.form.is_decoded else self.of_transformers
        self.routers: tuple[str, ...] = ()
        self.plain: set[str] = set()  # matrices of experts that are in 16 bits in the checkpoint
        self.widened_bytes = 0  # of other layers, decoded
        # Those of a checkpoint that is not quantised, each with what it has become here.
        self.conversions: list[tuple[Any, Any]] = []

    def keep(self, name: str, matrix: InPlace) -> dict[str, Tensor]:
        """Take a matrix of experts; what is left in its place until all is loaded."""
        self.packed[name] = matrix
        return self.nothing(name)

    def nothing(self, name: str) -> dict[str, Tensor]:
        """An empty parameter."""
        return {name: nn.Parameter(torch.empty(0), requires_grad=False)}

    def is_of_router(self, name: str) -> bool:
        """Whether a parameter is a router's."""
        return name.rpartition(".")[0] in self.routers

    # What transformers calls, in this order.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.of_transformers is not None:
            self.of_transformers.validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        found = self.find_places(model)
        if not found or any(place.flat_experts for _, place in self.places.values()):
            raise ConfigError(
                f"{type(model).__name__} has no experts that follow transformers' experts "
                f"interface, so packed_config has nothing to keep; leave it out."
            )
        for name, module in found if not self.form.is_upright else ():
            refuse_unfit(name, module, self.kind)
        blocks = find_blocks(model)
        self.routers = tuple(b.router_name for b in blocks if b.router_name is not None)
        if self.of_transformers is not None:
            self.of_transformers._process_model_before_weight_loading(model, **kwargs)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """How tensors of the file become parameters: ours for experts and for what is decoded."""
        plain = copy.deepcopy(weight_conversions)
        if self.form.is_decoded:
            self.conversions = [(conversion, None) for conversion in plain]
            found = self.of_transformers.update_weight_conversions(weight_conversions, model)
            return [self._packed_again(conversion) for conversion in found]
        own = [self._kept(conversion) for conversion in weight_conversions]
        self.conversions = list(zip(plain, own, strict=True))
        for key in _MATRICES if self.form.fused_ends else ():
            patterns = {rf"experts\.{key}{_escaped(end)}$": end for end in self.form.fused_ends}
            own.append(
                WeightConverter(list(patterns), f"experts.{key}", [KeepStack(self, patterns)])
            )
        if len(self.form.names) > 1:
            own.append(WeightConverter(list(self.form.names), "weight", [Rest(self)]))
        return own

    def stays_packed(self, model: Any, name: str) -> bool:
        """Whether transformers' own quantizer takes a parameter's tensors as they are."""
        return self.rest is not None and bool(self.rest.param_needs_quantization(model, name))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self._refuse_missing()
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.of_transformers is not None:
            self.of_transformers._process_model_after_weight_loading(model, **kwargs)
        self._tell()
        return model

    # Ours.

    def _kept(self, conversion: Any) -> Any:
        if not _puts_experts_together(conversion):
            return conversion
        sources: list[str] = conversion._original_source_patterns
        patterns = {
            source.removesuffix("weight") + name: (source, name)
            for source in sources
            for name in self.form.names
        }
        operation = KeepList(self, patterns, conversion)
        return conversion.copy(
            list(patterns), conversion._original_target_patterns, operations=[operation]
        )

    def _packed_again(self, conversion: Any) -> Any:
        if _puts_experts_together(conversion):
            conversion.operations = [*conversion.operations, PackAgain(self)]
        return conversion

    def _refuse_missing(self) -> None:
        for name in self.places:
            if name not in self.packed and name not in self.plain:
                raise ConfigError(
                    f"the checkpoint has no experts for {name}, or under names that are not "
                    f"known: it would be random numbers."
                )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Also names its tensors as a checkpoint does that is not quantised, when it is saved."""
        model = super()._dequantize(model, dtype)
        model._weight_conversions = [
            plain for plain, own in self.conversions if own is None or own.was_used()
        ]
        return model

    def _tell(self) -> None:
        own = self.form.storage
        if self.kind.name != own:
            warnings.warn(
                f"experts were rounded twice: the checkpoint keeps them in "
                f"{own or self.form.method}, they are packed as {self.kind.name} now.",
                stacklevel=2,
            )
        if self.plain:
            warnings.warn(
                f"experts stand in 16 bits in this checkpoint in "
                f"{counted(len(self.plain), 'place')} and were left so, first in "
                f"{min(self.plain)}.",
                stacklevel=2,
            )
        if self.widened_bytes and self.form.method.startswith("bitsandbytes"):
            warnings.warn(
                f"bitsandbytes is not installed, so layers other than experts were decoded to 16 "
                f"bits: {self.widened_bytes / 1e9:.2f} GB instead of a quarter or half of it.",
                stacklevel=2,
            )


def _of_transformers(form: StoredForm) -> Any:
    """transformers' own quantizer for the rest of the checkpoint, where it is asked."""
    is_bnb = form.method.startswith("bitsandbytes")
    if not form.is_decoded and not (is_bnb and is_bitsandbytes_available()):
        return None
    settings = AutoQuantizationConfig.from_dict(dict(form.settings))
    if form.is_decoded:
        settings.dequantize = True
    try:
        return AutoHfQuantizer.from_config(settings, pre_quantized=True)
    except ImportError as error:
        raise ConfigError(
            f"a checkpoint in {form.method} is decoded by the package of that name, which is not "
            f"installed ({error}): pip install {form.method}."
        ) from error


def _puts_experts_together(conversion: Any) -> bool:
    """Whether it makes a matrix of all experts of one for each."""
    if not isinstance(conversion, WeightConverter):
        return False
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    is_matrix = len(targets) == 1 and targets[0].rpartition(".")[2] in _MATRICES
    return is_matrix and all(s.rpartition(".")[2].startswith("weight") for s in sources)


def _escaped(end: str) -> str:
    return end.replace(".", r"\.")
