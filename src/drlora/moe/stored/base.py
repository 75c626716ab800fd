"""What a checkpoint keeps of a matrix in few bits, read as the parts of a storage of ours.

A form of storing is one small file beside this one. It says under which names the tensors of a
matrix stand in a file, and what they are here. No number is decoded: the bytes stay what they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from drlora.errors import ConfigError
from drlora.ops.storage.packed import PackedFormat, packed_format


class Kept(NamedTuple):
    """The parts of one matrix (O, ...), or of all experts' (E, O, ...)."""

    kind: PackedFormat
    parts: dict[str, Tensor]


class StoredForm(ABC):
    """How one kind of quantised checkpoint keeps its matrices.

    Attributes:
        method: `quant_method` in the checkpoint's configuration.
        names: what stands in a file in the place of `weight`, for each tensor of a matrix; the
            numbers themselves first.
        fused_ends: what follows the name of a parameter of all experts, for each of its tensors.
        is_upright: whether a parameter of all experts lies there as (E, O, I), also in a model that
            keeps (E, I, O).
        is_decoded: whether transformers decodes it to 16 bits, since no storage here has its bytes.
    """

    method: ClassVar[str]
    names: ClassVar[tuple[str, ...]] = ("weight",)
    fused_ends: ClassVar[tuple[str, ...]] = ()
    is_upright: ClassVar[bool] = False
    is_decoded: bool = False

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Args:
        settings: `quantization_config` of the checkpoint.

        Raises:
            ConfigError: if it is of a variant that cannot be kept.
        """
        self.settings = dict(settings)

    @property
    @abstractmethod
    def storage(self) -> str:
        """The storage that has the same bytes."""

    @property
    def kind(self) -> PackedFormat:
        """Its format."""
        return packed_format(self.storage)

    @abstractmethod
    def is_packed(self, tensors: Mapping[str, Any]) -> bool:
        """Whether the tensors, by `names` or `fused_ends`, are in few bits; a layer may be not."""

    @abstractmethod
    def matrix(self, tensors: Mapping[str, Tensor]) -> Kept:
        """One matrix, of tensors by `names`.

        Raises:
            ConfigError: if this one is of another variant than the configuration says.
        """

    def fill(self, tensors: Mapping[str, Tensor], out_OI: Tensor) -> Tensor:
        """The numbers of one matrix that is no expert's, in `out_OI`, which is returned."""
        kept = self.matrix(tensors)
        return kept.kind.decode(kept.parts, out_OI)

    def stack(self, tensors: Mapping[str, Tensor]) -> Kept:
        """All experts' matrices, of tensors by `fused_ends`."""
        raise ConfigError(f"{self.method}: one tensor of all experts is not known.")


FORMS: dict[str, type[StoredForm]] = {}


def register_form(kind: type[StoredForm]) -> type[StoredForm]:
    """Have checkpoints of this method kept as they are."""
    return FORMS.setdefault(kind.method, kind)
