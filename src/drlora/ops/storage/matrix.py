"""One matrix of all experts, whatever it is kept as: what engines, merging and export may ask.

An engine asks for as much as it needs: `dense` is one tensor, `views` are E tensors, and `read`
always works. Numbers that are stored in fewer bits are made wide by `read` alone, one expert at a
time, so no more than one wide expert has to exist.

Letters: E experts, O output features, I input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from drlora.errors import ConfigError


class Coded(NamedTuple):
    """Matrices of few bits as a kernel reads them.

    w[e, r, c] = table[code of (e, r, c)] * scale[e, r // rows, c // columns], for r of R stored
    rows and c of C columns.

    Attributes:
        codes: (E, R * C * bits / 8) uint8 in the order of rows.
        bits: of a code: 8, or 4 and then two lie in a byte.
        is_high_first: of 4 bits, whether the high half of a byte is the first of its two.
        table: (256,) or (16,) float32.
        scale_EPQ: (E, R / rows, C / columns) float32, both rounded up.
        rows, columns: numbers that share a scale.
        shape: (R, C).
        is_turned: whether stored rows are in-features.
    """

    codes: Tensor
    bits: int
    is_high_first: bool
    table: Tensor
    scale_EPQ: Tensor
    rows: int
    columns: int
    shape: tuple[int, int]
    is_turned: bool = False


class ExpertMatrix(ABC):
    """The same matrix (O, I) of all E experts.

    Attributes:
        fixed: why its numbers cannot be changed, as the end of a sentence; None if they can, and
            then `write`, `snapshot` and `restore` are there.
        is_plain: whether it is made of ordinary tensors, which the model itself can compute with.
        is_transposed: whether what is stored of an expert is (I, O).
        name: of the way in which it is stored.
    """

    name: str = "numbers of their own dtype"

    fixed: str | None = None
    is_plain: bool = False
    is_transposed: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I), as it is computed with."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What its numbers are computed in; they may be stored in fewer bits."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of everything that is stored."""

    @abstractmethod
    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        """(O, I), the numbers of one expert.

        Args:
            expert: in [0, E).
            out: (O, I) of any float dtype, to be filled and returned. Without it the answer is of
                the matrix's dtype: a view where an expert is stored so, else a new tensor.
        """

    def bits_of(self, expert: int) -> Mapping[str, Tensor]:
        """What is stored of one expert, by name, where that is other than its numbers."""
        return {}

    def dense(self) -> Tensor | None:
        """(E, O, I), a view of all that is stored, where that is one tensor."""
        return None

    def views(self) -> Sequence[Tensor] | None:
        """E views (O, I), where each expert is stored as it is computed with."""
        return None

    def traced(self) -> tuple[list[Tensor], str] | None:
        """What a compiler may be given in its place: tensors, and words for what they are.

        `drlora.ops.storage.from_traced` makes the same matrix of them. The words are the same for
        all blocks of a model, so that a compiled block serves all. None where there is no such way.
        """
        return None

    def coded(self) -> Coded | None:
        """All of it as a kernel reads it; None where numbers are stored in another way."""
        return None

    def late_scales(self) -> Tensor | None:
        """(E, O) float32, where W is numbers of few bits and one scale for each row of them.

        x W^T is then the product with `read_unscaled`, times the scales: fewer numbers are scaled.
        """
        return None

    def read_unscaled(self, expert: int, out: Tensor) -> Tensor:
        """As `read`, without `late_scales`; only where there are some."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[ExpertMatrix, ...]:
        """The matrices that side by side, in the order of output features, make it up."""
        return (self,)

    def write(self, expert: int, w_OI: Tensor) -> None:
        """Put numbers, of the matrix's dtype, in the place of an expert's.

        Raises:
            ConfigError: if they cannot be changed (`fixed`).
        """
        raise ConfigError(f"weights of experts cannot be changed: {self.fixed}.")

    def snapshot(self) -> Any:
        """A copy for `restore`."""
        raise ConfigError(f"weights of experts cannot be changed: {self.fixed}.")

    def restore(self, kept: Any) -> None:
        """Make every stored bit what it was at `snapshot`."""
        raise ConfigError(f"weights of experts cannot be changed: {self.fixed}.")


class Storage(ExpertMatrix):
    """A way to keep such a matrix, that recognises what it has kept."""

    @classmethod
    @abstractmethod
    def recognises(cls, stored: object) -> bool:
        """Whether `stored` is of this kind.

        It is whatever a model has in the place of the matrix: a tensor, a parameter or a module of
        all experts, or a sequence of one for each expert, or one of that sequence.
        """

    @abstractmethod
    def __init__(self, stored: Any, transposed: bool = False) -> None:
        """The matrices in `stored`, which are (I, O) if `transposed`. Called in each forward."""


STORAGES: list[type[Storage]] = []
_Kind = TypeVar("_Kind", bound=type[Storage])


def register_storage(kind: _Kind) -> _Kind:
    """Have `as_matrix` ask `kind` too, before those that were registered earlier."""
    if kind not in STORAGES:
        STORAGES.insert(0, kind)
    return kind


def storage_of(stored: object) -> type[Storage] | None:
    """The storage that recognises `stored`, or None."""
    return next((kind for kind in STORAGES if kind.recognises(stored)), None)


def has_own_storage(stored: object) -> bool:
    """Whether a storage other than the plain ones recognises `stored`."""
    kind = storage_of(stored)
    return kind is not None and not kind.is_plain


def as_matrix(stored: Any, transposed: bool = False) -> ExpertMatrix:
    """What a model keeps of a matrix, as engines read it.

    Args:
        stored: a tensor (E, O, I), E tensors (O, I), or what a registered storage recognises.
        transposed: whether (I, O) is stored in the place of (O, I).

    Raises:
        ConfigError: if no storage recognises it.
    """
    kind = storage_of(stored)
    if kind is None:
        raise ConfigError(
            f"experts are kept as {type(stored).__module__}.{type(stored).__name__}, which no "
            f"storage recognises; drlora.ops.storage.register_storage adds one."
        )
    return kind(stored, transposed)
