"""Tiles of sorted rows, and their sizes, for the `triton` engine.

Every expert's rows are cut into tiles of one size. Which tile belongs to whom is found on the
device; the host only knows that at most S // rows-per-tile + min(E, S) of them can be in use.

Shape letters: S routed rows, E experts, Q tiles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from torch.nn import functional as F

from drlora.ops.routing import Routing


class Tiles(NamedTuple):
    """Sizes of one program's work in the matrix products."""

    columns: int
    depth: int
    warps: int
    stages: int


# Keyed by bytes per element, rows per tile, and whether the chip is of Hopper's class, which gives
# a program 200 KiB of shared memory or more. Chosen so that, with sizes divisible by 16 and without
# dropout, no bfloat16 product spills registers on sm_80, sm_89 or sm_90; not timed. To tune, put
# `Tiles` into an entry and time the layer, entry by entry. For `triton.autotune`, wrap a kernel in
# `triton_launch` with configs that name BLOCK_N, BLOCK_K, num_warps and num_stages (key=["K", "N"],
# and the grid as a function of the config), and leave those four out of its launch. The rows per
# tile cannot vary by kernel: all kernels of a layer share one map of tiles.
TILES: dict[tuple[int, int, bool], Tiles] = {
    (2, 128, True): Tiles(columns=256, depth=64, warps=8, stages=3),
    (2, 64, True): Tiles(columns=128, depth=64, warps=4, stages=4),
    (2, 32, True): Tiles(columns=128, depth=64, warps=4, stages=4),
    (2, 16, True): Tiles(columns=128, depth=64, warps=4, stages=4),
    (2, 128, False): Tiles(columns=128, depth=32, warps=8, stages=3),
    (2, 64, False): Tiles(columns=128, depth=32, warps=4, stages=3),
    (2, 32, False): Tiles(columns=128, depth=32, warps=4, stages=4),
    (2, 16, False): Tiles(columns=64, depth=64, warps=4, stages=4),
    **{
        (4, rows, hopper): Tiles(columns=64, depth=32, warps=8, stages=2)
        for rows in (16, 32, 64)
        for hopper in (True, False)
    },
}
_HOPPER_SHARED_BYTES = 200 * 1024


class Sorted(NamedTuple):
    """Rows in the order of the experts, as the kernels read them.

    Attributes:
        order_S: position of each sorted row in the flattened (T * K) routing.
        token_S: the token of each sorted row.
        bound_E1: (E + 1,) int32; expert e's rows are `bound_E1[e] : bound_E1[e + 1]`.
        tile_expert_Q: int32 expert of each tile; E for tiles that are not used.
        tile_row_Q: int32 first row of each tile.
        tile_rows: rows per tile.
        tiles: sizes of the products.
    """

    order_S: Tensor
    token_S: Tensor
    bound_E1: Tensor
    tile_expert_Q: Tensor
    tile_row_Q: Tensor
    tile_rows: int
    tiles: Tiles

    @property
    def num_rows(self) -> int:
        """S."""
        return self.order_S.numel()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.bound_E1.numel() - 1


def sorted_rows(routing: Routing, like: Tensor) -> Sorted:
    """Cut each expert's rows into tiles, on the device."""
    rows, experts = routing.order_S.numel(), routing.counts_E.numel()
    tile_rows = _rows_per_tile(rows, experts, like.element_size())
    bound_E1 = F.pad(routing.counts_E.cumsum(0), (1, 0))
    tiles_E = (routing.counts_E + tile_rows - 1) // tile_rows
    tile_bound_E1 = F.pad(tiles_E.cumsum(0), (1, 0))
    tile_Q = torch.arange(rows // tile_rows + min(experts, rows), device=bound_E1.device)
    expert_Q = torch.searchsorted(tile_bound_E1[1:], tile_Q, right=True)
    known_Q = expert_Q.clamp(max=experts - 1)
    row_Q = bound_E1[known_Q] + (tile_Q - tile_bound_E1[known_Q]) * tile_rows
    return Sorted(
        routing.order_S,
        routing.token_S,
        bound_E1.to(torch.int32),
        expert_Q.to(torch.int32),
        row_Q.to(torch.int32),
        tile_rows,
        TILES[like.element_size(), tile_rows, _is_hopper_class(like.device)],
    )


def _rows_per_tile(rows: int, experts: int, element_bytes: int) -> int:
    """A power of two near the mean number of an expert's rows, so that tiles are mostly full."""
    largest = 128 if element_bytes == 2 else 64
    return max(16, min(largest, triton.next_power_of_2(-(-rows // experts))))


@lru_cache(maxsize=32)
def _is_hopper_class(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= _HOPPER_SHARED_BYTES
