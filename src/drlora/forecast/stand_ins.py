"""What stands for operators that need numbers: attention without a matrix, and the adapted experts.

Each takes the memory that the real one takes, keeps for the backward pass what that keeps, and says
how much it would compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, promote_types
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from drlora.adapter.layer import DrLoraExperts
from drlora.adapter.pool import RankPool
from drlora.forecast.counting import Counting
from drlora.ops.grouped import experts_grouped
from drlora.ops.loop.tasks import FEWEST_ROWS, MOST_ROWS, TASKS_PER_THREAD
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import sort_by_expert
from drlora.ops.scratch import LARGEST_KEPT
from drlora.ops.weights import MATRICES, ExpertWeights

ATTENTION = "drlora_on_paper"
CPU_ATTENTION = "drlora_on_paper_of_a_cpu"
WITHOUT_MATRIX = ("sdpa", "flash_attention_2", "flash_attention_3")
_counting: list[Counting] = []
_kept: dict[str, Tensor] = {}  # scratch of the pass under way


class _Attention(torch.autograd.Function):
    """Fused attention: no (L, L) matrix, forwards or backwards."""

    @staticmethod
    def forward(ctx: Any, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor) -> Tensor:
        batch, heads, length, _ = query_BHLD.shape
        groups = heads // key_BGLD.shape[1]
        if groups > 1:  # transformers repeats keys and values where a mask is given
            key_BGLD = key_BGLD.repeat_interleave(groups, dim=1)
            value_BGLD = value_BGLD.repeat_interleave(groups, dim=1)
        out_BLHD = query_BHLD.new_empty(batch, length, heads, value_BGLD.shape[-1])
        sums_BHL = query_BHLD.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query_BHLD, key_BGLD, value_BGLD, out_BLHD, sums_BHL)
        ctx.groups = groups
        _work_attention(query_BHLD, value_BGLD, 1.0)
        return out_BLHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        _work_attention(query, value, 2.5)
        made = [torch.empty_like(x) for x in (query, key, value)]
        if ctx.groups > 1:
            made[1:] = [x.unflatten(1, (-1, ctx.groups)).sum(2) for x in made[1:]]
        return tuple(made)


def _work_attention(query_BHLD: Tensor, value_BHLD: Tensor, times: float) -> None:
    batch, heads, length, width = query_BHLD.shape
    pairs = batch * heads * length * length / 2  # a token looks back only
    products = 2.0 * pairs * (width + value_BHLD.shape[-1])
    _counting[-1].more_work(times * products)


def attention_on_paper(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """As transformers calls attention: (B, H, L, D) to (B, L, H, D)."""
    return _Attention.apply(query, key, value), None


def cpu_attention_on_paper(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """The same on a CPU, where torch fuses only values as wide as queries, without dropout.

    Others, as those of DeepSeek's latent attention, get the matrix, in float32.
    """
    dropout = settings.get("dropout", 0.0)
    if query.shape[-1] == value.shape[-1] and not dropout:
        return attention_on_paper(module, query, key, value, attention_mask)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out_BHLD = scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
    return out_BHLD.transpose(1, 2).contiguous(), None


for _name, _attention in (
    (ATTENTION, attention_on_paper),
    (CPU_ATTENTION, cpu_attention_on_paper),
):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, lambda *_, **__: None)


class _Loop(torch.autograd.Function):
    """The `loop` engine (`drlora.ops.loop.engine`), tensor for tensor."""

    @staticmethod
    def forward(
        ctx: Any, shape: _Shape, x_TH: Tensor, weight_TK: Tensor, place_TK: Tensor, *factors: Tensor
    ) -> Tensor:
        rows = weight_TK.numel()
        gate_up_SG = x_TH.new_empty(rows, shape.gate_up)
        wide_x_TH = x_TH.to(shape.dtype)
        sum_dtype = promote_types(shape.dtype, weight_TK.dtype)
        y_SH = _scratch("routed rows", x_TH, rows, x_TH.shape[1], sum_dtype)
        _work_in(x_TH, shape, rows, ("x", "h") if sum_dtype == shape.dtype else ("x", "h", "y"))
        shrunk = [x_TH.new_empty(round(rows * rank), dtype=shape.dtype) for rank in shape.ranks]
        wide = [factor.to(shape.dtype) for factor in factors]
        out_TH = x_TH.new_empty(x_TH.shape, dtype=sum_dtype)
        del y_SH, wide, wide_x_TH
        ctx.save_for_backward(x_TH, weight_TK, place_TK, gate_up_SG, *shrunk, *factors)
        ctx.shape = shape
        shape.work(rows, 1.0, 1.0)
        return out_TH.to(x_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shape: _Shape = ctx.shape
        x_TH, weight_TK, _, _, *rest = ctx.saved_tensors
        shrunk, factors = rest[: len(shape.ranks)], rest[len(shape.ranks) :]
        wide = [x_TH.to(shape.dtype), grads[0].to(shape.dtype)]
        rows = weight_TK.numel()
        grad_x_SH = _scratch("routed rows", x_TH, rows, x_TH.shape[1], x_TH.dtype)
        _work_in(x_TH, shape, rows, ("g", "h", "act", "dh", "dgate_up"))
        made = [torch.empty_like(factor, dtype=shape.dtype) for factor in factors]
        kept = [torch.empty_like(z) for z in shrunk]
        del wide, kept
        grad_x_TH = torch.empty_like(x_TH)
        del grad_x_SH
        out = [grad.to(factor.dtype) for grad, factor in zip(made, factors, strict=True)]
        shape.work(weight_TK.numel(), 1.0, 2.0)
        return None, grad_x_TH, torch.empty_like(weight_TK), None, *out


def _scratch(name: str, like: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
    """As `drlora.ops.scratch`: a thread keeps what is small and uses it again."""
    size = rows * width * dtype.itemsize
    if size > LARGEST_KEPT:
        return like.new_empty(rows, width, dtype=dtype)
    if name not in _kept or _kept[name].numel() < size:
        _kept[name] = like.new_empty(size, dtype=torch.uint8)
    return None


def _work_in(x_TH: Tensor, shape: _Shape, rows: int, names: Iterable[str]) -> None:
    """The buffers for the rows of a task."""
    widths = {"x": x_TH.shape[1], "g": x_TH.shape[1], "y": x_TH.shape[1], "dgate_up": shape.gate_up}
    at_once = min(rows, shape.rows_at_once(rows))
    for name in names:
        _scratch(name, x_TH, at_once, widths.get(name, shape.width), shape.dtype)


class _Shape:
    """What of the experts and their adapters decides over memory and work."""

    def __init__(self, base: ExpertWeights, pools: list[RankPool], dtype: torch.dtype) -> None:
        self.gate_up, self.width = base.out_features("gate_up"), base.width
        self.dtype, self.experts = dtype, base.num_experts
        self.ranks = [pool.lora_A.shape[0] / base.num_experts for pool in pools]
        self.of_base = sum(base.in_features(m) * base.out_features(m) for m in MATRICES)
        self.of_pieces = sum(
            rank * (pool.in_features + pool.out_features)
            for rank, pool in zip(self.ranks, pools, strict=True)
        )
        self.moved = 3 * self.gate_up * dtype.itemsize

    def rows_at_once(self, rows: int) -> int:
        """The largest task: an expert's rows come to what is enough already, or are cut."""
        share = rows // (TASKS_PER_THREAD * torch.get_num_threads())
        enough = min(max(share, FEWEST_ROWS), MOST_ROWS)
        return enough + min(enough, rows // self.experts)

    def work(self, rows: int, of_base: float, of_pieces: float) -> None:
        """Of so many rows, in multiples of one product with each."""
        products = 2.0 * rows * (of_base * self.of_base + of_pieces * self.of_pieces)
        _counting[-1].more_work(products, rows * self.moved)


def _experts(layer: DrLoraExperts, dtype: torch.dtype, engine: str) -> Any:
    def run(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **_: Any) -> Tensor:
        base = layer.base_weights
        x_TH = hidden_states.to(base.dtype)
        pools = [p for name in layer._names() for p in layer.adapter(name).rank_pools.values()]
        if engine == "grouped":  # which runs on paper itself
            pieces = [p for name in layer._names() for p in _pieces(layer, name, x_TH.dtype)]
            routing = sort_by_expert(top_k_index, base.num_experts)
            masks = DropoutMasks(None, None)
            out_TH = experts_grouped(x_TH, top_k_weights, routing, base, pieces, masks)
            return out_TH.to(hidden_states.dtype)
        factors = [factor for pool in pools for factor in _rows_in_use(pool, x_TH.dtype)]
        shape = _Shape(base, pools, dtype)
        place_TK = torch.empty_like(top_k_index, dtype=torch.int64)
        out_TH = _Loop.apply(shape, x_TH, top_k_weights, place_TK, *factors)
        assert isinstance(out_TH, Tensor)
        return out_TH.to(hidden_states.dtype)

    return run


def _rows_in_use(pool: RankPool, dtype: torch.dtype) -> Iterator[Tensor]:
    """All rows, as at the end of growth; they are found through an index."""
    index_R = pool.lora_A.new_empty(pool.lora_A.shape[0], dtype=torch.int64)
    for factor_RO in (pool.lora_A, pool.lora_B):
        yield factor_RO.index_select(0, index_R).to(dtype)


def _pieces(layer: DrLoraExperts, name: str, dtype: torch.dtype) -> Iterator[LoraPiece]:
    """With as many rows for each expert."""
    adapter = layer.adapter(name)
    for projection, pool in adapter.rank_pools.items():
        matrix, start, step = layer.block.place_of(projection)
        a_RI, b_RO = _rows_in_use(pool, dtype)
        rank = a_RI.shape[0] // layer.block.num_experts
        offsets = tuple(range(0, rank * layer.block.num_experts + 1, rank))
        yield LoraPiece(matrix, start, a_RI, b_RO, offsets, adapter.config.scaling, step)


@contextmanager
def on_paper(
    model: nn.Module,
    counting: Counting,
    dtype: torch.dtype,
    engine: str = "loop",
    reads_mask: bool = False,
) -> Iterator[None]:
    """While it lasts, the model runs without numbers.

    Args:
        model: on the device `meta`, with its adapter.
        counting: what stand-ins tell of their work.
        dtype: that experts compute in.
        engine: `loop`, or `grouped`, as `auto` has it on a GPU.
        reads_mask: whether attention has its matrix, for models that read its mask themselves.
    """
    layers = [m for m in model.modules() if isinstance(m, DrLoraExperts)]
    config: Any = model.get_base_model().config.get_text_config()  # type: ignore[operator]
    before = config._attn_implementation
    if reads_mask:
        config._attn_implementation = "eager"
    elif before in WITHOUT_MATRIX:
        config._attn_implementation = CPU_ATTENTION if engine == "loop" else ATTENTION
    _counting.append(counting)
    for layer in layers:
        layer.__dict__["_run"] = _experts(layer, dtype, engine)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_run"]
        _counting.pop()
        _kept.clear()
        config._attn_implementation = before
