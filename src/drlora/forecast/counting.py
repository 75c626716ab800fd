"""Memory and work of whatever runs on tensors without memory.

    with Counting() as counted:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    counted.peak_bytes, counted.work

Each operator of torch comes by here, those of the backward pass too. Memory is that of storages: it
begins when an operator returns a storage that was not seen before, and ends with the storage.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "_grouped_mm", "convolution")


@dataclass
class Work:
    """What an operator or many do.

    Attributes:
        products: floating-point operations of matrix products.
        moved_bytes: what all others read and write.
        calls: operators that were called.
    """

    products: float = 0.0
    moved_bytes: float = 0.0
    calls: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.moved_bytes + other.moved_bytes,
            self.calls + other.calls,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.products - other.products,
            self.moved_bytes - other.moved_bytes,
            self.calls - other.calls,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.products * factor, self.moved_bytes * factor, round(self.calls * factor))


class Counting(TorchDispatchMode):
    """Counts while it lasts; tensors that were there before cost nothing.

    Attributes:
        bytes: in use now.
        peak_bytes: most that were in use.
        work: done so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self.work = Work()
        self._known: dict[int, int] = {}

    def ignore(self, tensors: Any) -> None:
        """Tensors whose storage is counted elsewhere."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._keep(tensor, 0)

    def more_work(self, products: float, moved_bytes: float = 0.0) -> None:
        """What a stand-in does not do itself."""
        self.work.products += products
        self.work.moved_bytes += moved_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].dtype == torch.bool:
            return True  # asked is whether a mask is all ones, or positions are those of one text
        if name == "_grouped_mm":  # torch has it on paper in bfloat16 alone
            offsets = (kwargs or {}).get("offs", args[2] if len(args) > 2 else None)
            result: Any = _grouped(args[0], args[1], offsets)
        else:
            result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for tensor in made:
            self._keep(tensor, tensor.untyped_storage().nbytes())
        self._count(func, name, given, made)
        return result

    def _keep(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = size
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._known.pop(key)

    def _count(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        if func.is_view or name in ("empty", "empty_like", "new_empty", "detach", "empty_strided"):
            return
        self.work.calls += 1
        if name in _PRODUCTS:
            self.work.products += _product(name, given, made)
            return
        seen = {id(x): x for x in (*given, *made)}
        self.work.moved_bytes += sum(_touched(x) for x in seen.values())


def _product(name: str, given: list[Tensor], made: list[Tensor]) -> float:
    """2 x m x n x k of (m, k) times (k, n)."""
    factors = given[1:] if name.startswith("add") or name == "baddbmm" else given
    out = made[0]
    # Rows of both factors are grouped: each group has its own part of what is summed over.
    is_split = name == "_grouped_mm" and out.dim() == 3
    return 2.0 * out.numel() * factors[0].shape[-1] / (len(out) if is_split else 1)


def _grouped(x_SK: Tensor, w_EKN: Tensor, offsets: Any) -> Tensor:
    """(S, N) of rows that are grouped; (E, S, N) where both are, of what is summed over."""
    if w_EKN.dim() == 3:
        return x_SK.new_empty(x_SK.shape[0], w_EKN.shape[2])
    return x_SK.new_empty(len(offsets), x_SK.shape[0], w_EKN.shape[1])


def _touched(tensor: Tensor) -> int:
    """Bytes of its numbers; a number that is repeated (stride 0) is one."""
    sizes = [s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()


def bytes_of(tensors: Any) -> int:
    """Of their numbers."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def is_on_paper(tensor: Tensor) -> bool:
    """Whether it has a shape and no memory."""
    return tensor.device == torch.device("meta")
