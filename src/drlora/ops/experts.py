"""The adapted experts of one block, computed by the engine that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from drlora.ops.compiled import TracedPiece, experts_traced
from drlora.ops.engine import AUTO, choose_engine
from drlora.ops.parts import LoraPiece, draw_dropout
from drlora.ops.routing import sort_by_expert
from drlora.ops.trial import Call, engine_by_trial
from drlora.ops.weights import ExpertWeights


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
        engine: `auto`, or the name of an engine: `naive`, `loop`, `grouped`, `triton`, or one that
            was registered.

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
    call = Call(x_TH, weight_TK, routing, base, pieces, masks)
    tried = engine_by_trial(call) if engine == AUTO else None
    return (tried or choose_engine(engine, base)).run(*call)


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
        engine: it runs as grouped products or as a loop over experts, as `Engine.traced` says;
            `auto` as `choose_engine` has it.
    """
    routing = sort_by_expert(index_TK, base.num_experts)
    # Of a piece, the draw reads the matrix and the width alone.
    masks = draw_dropout(pieces, routing.order_S.numel(), dropout, x_TH)  # type: ignore[arg-type]
    return experts_traced(x_TH, weight_TK, routing, base, pieces, masks, engine)
