"""Memory that a thread's next call uses again.

Fresh memory costs a page fault and a page of zeros every 4 KB, which at the sizes of small layers
is an eighth of the whole layer's time; the C library gives large blocks back to the system as soon
as they are free. Accelerators have a caching allocator of their own, and what is large enough not
to notice is not kept.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

LARGEST_KEPT = 32 * 2**20  # bytes of one block

_own = threading.local()


def scratch(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, width), not initialised; this thread's next call with the same name overwrites it."""
    size = rows * width * dtype.itemsize
    if device.type != "cpu" or size > LARGEST_KEPT:
        return torch.empty(rows, width, dtype=dtype, device=device)
    kept: dict[str, Tensor] = _own.__dict__
    if name not in kept or kept[name].numel() < size:
        kept[name] = torch.empty(size, dtype=torch.uint8)
    return kept[name][:size].view(dtype).view(rows, width)
