"""NF4 read by bitsandbytes' own functions, where it is installed: five times as fast on a CPU.

What they fill must be what `drlora.ops.storage.nf4` fills, to the bit: that is tried once, on some
numbers of each dtype and device, and they are used only where it holds.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Fill = Callable[[Tensor, Tensor, Tensor, int], None]
"""Codes (uint8), scales (float32, one for each block), what is filled, and numbers a block."""

_ON_CPU = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
logger = logging.getLogger(__name__)


@cache
def filler(dtype: torch.dtype, device_type: str) -> Fill | None:
    """What fills a tensor of NF4 numbers; None where bitsandbytes is missing or cannot."""
    if find_spec("bitsandbytes") is None or dtype not in _ON_CPU:
        return None
    try:
        found = _on_cpu(dtype) if device_type == "cpu" else _by_operator
        return found if found is not None and _is_exact(found, dtype, device_type) else None
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        logger.warning("bitsandbytes does not read NF4 here (%s); torch does", error)
        return None


def _on_cpu(dtype: torch.dtype) -> Fill | None:
    """Its C function: the operator has no `out` on a CPU, and a new tensor takes as long again."""
    library: Any = import_module("bitsandbytes.cextension").lib
    function = getattr(library, f"cdequantize_blockwise_cpu_nf4_{_ON_CPU[dtype]}", None)
    if function is None:
        return None

    def fill(codes: Tensor, scale: Tensor, out_OI: Tensor, block: int) -> None:
        sizes = [ctypes.c_longlong(size) for size in (block, *out_OI.shape)]
        where = [ctypes.c_void_p(t.data_ptr()) for t in (codes, scale, out_OI)]
        function(*where, *sizes)

    return fill


def _by_operator(codes: Tensor, scale: Tensor, out_OI: Tensor, block: int) -> None:
    torch.ops.bitsandbytes.dequantize_4bit.out(
        codes.view(-1, 1), scale.view(-1), block, "nf4", out_OI.shape, out_OI.dtype, out=out_OI
    )


def _is_exact(fill: Fill, dtype: torch.dtype, device_type: str) -> bool:
    import_module("bitsandbytes")
    from drlora.ops.storage.nf4 import Nf4, read_by_table

    w_OI = torch.linspace(-3, 3, 96 * 256, device=device_type).sin().view(96, 256)
    parts = Nf4().encode(w_OI)
    wanted = torch.empty(w_OI.shape, dtype=dtype, device=device_type)
    got = torch.zeros_like(wanted)
    read_by_table(parts["codes"], parts["scale"], wanted)
    fill(parts["codes"], parts["scale"].contiguous(), got, Nf4.block)
    if not torch.equal(got, wanted):
        logger.warning("bitsandbytes reads other numbers than it should here; torch reads NF4")
        return False
    return True
