"""Ragged LoRA on grouped experts: `naive` defines it, `loop`, `grouped` and `triton` are fast.

All engines take the same arguments and agree in the output and in every gradient (tests/test_ops,
tests/test_triton). `triton` is imported only when it is asked for: it needs a package that torch
brings on Linux with CUDA and nowhere else. Under torch.compile `compiled` takes their place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drlora.errors import ConfigError
from drlora.ops.compiled import TracedPiece, experts_traced
from drlora.ops.grouped import experts_grouped, grouped_fits, grouped_misfit
from drlora.ops.loop.engine import experts_loop
from drlora.ops.naive import experts_naive
from drlora.ops.parts import (
    Apart,
    DropoutMasks,
    ExpertWeights,
    LoraPiece,
    Matrix,
    Routing,
    Stack,
    draw_dropout,
    sort_by_expert,
)
from drlora.ops.stand_ins import tell_once

__all__ = [
    "Apart",
    "DropoutMasks",
    "ENGINES",
    "ExpertWeights",
    "LoraPiece",
    "Matrix",
    "Routing",
    "Stack",
    "TracedPiece",
    "adapted_experts",
    "choose_engine",
    "draw_dropout",
    "sort_by_expert",
    "traced_experts",
]

Engine = Callable[
    [Tensor, Tensor, Routing, ExpertWeights, list[LoraPiece], DropoutMasks],
    Tensor,
]

ENGINES: dict[str, Engine] = {
    "naive": experts_naive,
    "loop": experts_loop,
    "grouped": experts_grouped,
}


def choose_engine(name: str, base: ExpertWeights) -> Engine:
    """The engine called `name`; `auto` takes `loop` on the CPU and `grouped` elsewhere.

    Where an engine cannot take the weights another stands in: `grouped` for `triton`, `loop` for
    `grouped`, and `grouped` or `naive` for `loop`. Of one that was asked for by name that is said
    once.

    Raises:
        ConfigError: if `triton` is asked for and not installed.
    """
    wanted = ("loop" if base.sample.device.type == "cpu" else "grouped") if name == "auto" else name
    engines = ENGINES if wanted != "triton" else {**ENGINES, "triton": _triton_engine()}
    reasons = []
    while (reason := _misfit(wanted, base)) is not None:
        reasons.append(reason)
        wanted = _stand_in(wanted, base)
    if reasons and name != "auto":
        tell_once(name, wanted, "; ".join(dict.fromkeys(reasons)))
    return engines[wanted]


def _misfit(name: str, base: ExpertWeights) -> str | None:
    """Why the engine cannot take these weights; None if it can."""
    if name == "grouped":
        return grouped_misfit(base)
    if name == "loop" and base.post_norm is not None:
        return "the experts have a norm after each, whose backward pass it does not know"
    if name == "triton" and not _is_common(base):
        return "the experts are not one contiguous tensor a matrix, without biases and norms"
    return None


def _stand_in(name: str, base: ExpertWeights) -> str:
    if name == "loop":
        return "grouped" if grouped_fits(base) else "naive"
    return {"triton": "grouped", "grouped": "loop"}[name]


def _is_common(base: ExpertWeights) -> bool:
    """The layout that the Triton kernels were written for: one stored tensor each, no extras."""
    extras = (base.gate_up_bias_EG, base.down_bias_EH, base.post_norm)
    if not base.is_fused or any(extra is not None for extra in extras):
        return False
    return base.gate_up_EGH.is_contiguous() and base.down_EHI.is_contiguous()


def _triton_engine() -> Engine:
    try:
        from drlora.ops.triton.engine import experts_triton
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise ConfigError(
            "engine='triton' needs the package triton, which cannot be imported; install the "
            "version that your torch asks for, or choose engine='auto'."
        ) from error
    return experts_triton


def adapted_experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    base: ExpertWeights,
    pieces: list[LoraPiece],
    *,
    dropout: float = 0.0,
    engine: str = "auto",
) -> Tensor:
    """Routing-weighted sum of the adapted experts' outputs.

    Args:
        x_TH: (T, H) inputs, of the base weights' dtype.
        index_TK: (T, K) the experts of each token, int64 in [0, E).
        weight_TK: (T, K) their routing weights, any float dtype.
        base: the frozen experts; their weights get no gradient.
        pieces: low-rank updates; their factors have `x_TH`'s dtype.
        dropout: probability with which the adapter's inputs are dropped.
        engine: `auto`, `naive`, `loop`, `grouped` or `triton`.

    Returns:
        (T, H), of `x_TH`'s dtype. Differentiable in `x_TH`, `weight_TK` and the pieces' factors.
    """
    if torch.is_autocast_enabled(x_TH.device.type):
        # The experts compute in the dtype of their weights, as transformers' grouped ones do.
        with torch.autocast(x_TH.device.type, enabled=False):
            return adapted_experts(
                x_TH, index_TK, weight_TK, base, pieces, dropout=dropout, engine=engine
            )
    routing = sort_by_expert(index_TK, base.num_experts)
    masks = draw_dropout(pieces, routing.order_S.numel(), dropout, x_TH)
    return choose_engine(engine, base)(x_TH, weight_TK, routing, base, pieces, masks)


def traced_experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    base: ExpertWeights,
    pieces: list[TracedPiece],
    *,
    dropout: float = 0.0,
    engine: str = "auto",
) -> Tensor:
    """`adapted_experts` inside torch.compile.

    Args:
        pieces: low-rank updates in a form that growth does not change.
        engine: `grouped` and `triton` run as grouped products, `naive` and `loop` as a loop over
            experts, `auto` as `choose_engine` has it.
    """
    routing = sort_by_expert(index_TK, base.num_experts)
    # Of a piece, the draw reads the matrix and the width alone.
    masks = draw_dropout(pieces, routing.order_S.numel(), dropout, x_TH)  # type: ignore[arg-type]
    return experts_traced(x_TH, weight_TK, routing, base, pieces, masks, engine)
