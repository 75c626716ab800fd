"""What every engine must do: equal `naive`, in the output and in every gradient.

    from drlora.ops.contract import check_engine

    check_engine(Engine("mine", experts_mine))

The cases are small, and are what went wrong once or might: ranks that differ and are 0, experts
without rows, one expert with all of them, sizes that no tile divides, dropout, 16 bits, and the
ways in which models keep their experts. What an engine refuses is left out, and said.

Letters as in `drlora.ops.parts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from drlora.config.registry import ENGINES
from drlora.ops.engine import Engine
from drlora.ops.parts import LoraPiece, draw_dropout
from drlora.ops.routing import sort_by_expert
from drlora.ops.storage import Apart, as_matrix
from drlora.ops.weights import ExpertWeights

# Largest relative error of a tensor, by what the experts compute in.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}
LAYOUTS = ("transposed", "apart", "lists", "biases", "interleaved", "no gate", "norm")
_DROPOUT = 0.4


class Case(NamedTuple):
    """Experts with adapters, and rows for them.

    Attributes:
        base: the frozen experts.
        pieces: the adapters, whose factors are among `leaves`.
        leaves: x_TH, weight_TK, then A and B of each piece; all ask for gradients.
        index_TK: experts of each token.
    """

    base: ExpertWeights
    pieces: list[LoraPiece]
    leaves: list[Tensor]
    index_TK: Tensor

    @property
    def names(self) -> list[str]:
        """Of the output and of the gradient of each leaf."""
        factors = [f"d{f}{number}" for number in range(len(self.pieces)) for f in "AB"]
        return ["out", "dX", "dweight", *factors]


def silu_gate(gate_up_nG: Tensor) -> Tensor:
    """The gate of most models."""
    gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
    return F.silu(gate_nI) * up_nI


def gelu_gate(gate_up_nG: Tensor) -> Tensor:
    """One that no engine knows by name."""
    gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
    return F.gelu(gate_nI) * up_nI


def clamped_gate(gate_up_nG: Tensor) -> Tensor:
    """GPT-OSS's: gate and up alternate."""
    gate_nI = gate_up_nG[..., ::2].clamp(max=0.5)
    up_nI = gate_up_nG[..., 1::2].clamp(-0.5, 0.5)
    return (up_nI + 1) * gate_nI * torch.sigmoid(gate_nI * 1.7)


def make_case(
    ranks: Sequence[int],
    projections: Sequence[str] = ("gate_up", "down"),
    dtype: torch.dtype = torch.float32,
    hidden: int = 16,
    width: int = 8,
    tokens: int = 9,
    top_k: int = 2,
    index: Tensor | None = None,
    gate: Any = silu_gate,
    seed: int = 0,
) -> Case:
    """Random numbers for experts of the given ranks; sets torch's seed.

    Args:
        ranks: of each expert, in every projection.
        projections: which of `gate_up`, `gate`, `up` and `down` are adapted.
        dtype: of everything.
        hidden: H.
        width: I.
        tokens: T.
        top_k: K.
        index: (T, K), instead of K different experts by lot.
        gate: from gate and up to what goes down.
        seed: of all draws.
    """
    torch.manual_seed(seed)
    experts = len(ranks)
    base = ExpertWeights(
        as_matrix((0.3 * torch.randn(experts, 2 * width, hidden)).to(dtype)),
        as_matrix((0.3 * torch.randn(experts, hidden, width)).to(dtype)),
        gate,
        is_silu=gate is silu_gate,
    )
    shapes = {
        "gate_up": (hidden, 2 * width, 0),
        "gate": (hidden, width, 0),
        "up": (hidden, width, width),
        "down": (width, hidden, 0),
    }
    offsets = tuple([0, *torch.tensor(ranks).cumsum(0).tolist()])
    pieces, factors = [], []
    for projection in projections:
        inputs, outputs, start = shapes[projection]
        a_RI = torch.randn(offsets[-1], inputs, dtype=dtype, requires_grad=True)
        b_RO = torch.randn(offsets[-1], outputs, dtype=dtype, requires_grad=True)
        factors += [a_RI, b_RO]
        is_down = projection == "down"
        pieces.append(LoraPiece("down" if is_down else "gate_up", start, a_RI, b_RO, offsets, 0.7))
    x_TH = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    if index is None:
        index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    weight_TK = torch.rand(index.shape, dtype=dtype).requires_grad_()
    return Case(base, pieces, [x_TH, weight_TK, *factors], index)


def change_layout(case: Case, layout: str) -> Case:
    """The same numbers, kept in another way; or what few models have. One of `LAYOUTS`."""
    base, pieces = case.base, case.pieces
    gate_up_EGH, down_EHI = base.gate_up_EGH, base.down_EHI
    experts, _, hidden = gate_up_EGH.shape
    if layout == "transposed":
        first, second = (
            as_matrix(w_EOI.transpose(1, 2).contiguous(), transposed=True)
            for w_EOI in (gate_up_EGH, down_EHI)
        )
        base = replace(base, gate_up=first, down=second)
    elif layout in ("apart", "lists"):
        gate, up = (as_kept(half.clone(), layout) for half in gate_up_EGH.chunk(2, dim=1))
        base = replace(base, gate_up=Apart(gate, up), down=as_kept(down_EHI, layout))
    elif layout == "biases":
        base = replace(
            base,
            gate_up_bias_EG=torch.randn(experts, 2 * base.width).to(base.dtype),
            down_bias_EH=torch.randn(experts, hidden).to(base.dtype),
        )
    elif layout == "interleaved":
        pieces = [
            p._replace(start=min(p.start, 1), step=2) if p.matrix == "gate_up" else p
            for p in pieces
        ]
        base = replace(base, apply_gate=clamped_gate, is_silu=False)
    elif layout == "no gate":
        first = as_matrix(gate_up_EGH[:, : base.width])
        base = replace(base, gate_up=first, apply_gate=F.gelu, is_silu=False)
        pieces = [p._replace(start=0) for p in pieces]
    elif layout == "norm":
        base = replace(base, post_norm=lambda y_nH: F.rms_norm(y_nH, y_nH.shape[-1:]))
    else:
        raise ValueError(f"layout={layout!r} is not one of {LAYOUTS}.")
    return case._replace(base=base, pieces=pieces)


def as_kept(w_EOI: Tensor, layout: str) -> Any:
    """One tensor, or for the layout `lists` one for each expert."""
    return as_matrix(list(w_EOI) if layout == "lists" else w_EOI)


def run_engine(engine: Engine, case: Case, dropout: float = 0.0) -> list[Tensor]:
    """The output and the gradient of each leaf, for one random gradient; sets torch's seed."""
    x_TH, weight_TK = case.leaves[:2]
    routing = sort_by_expert(case.index_TK, case.base.num_experts)
    torch.manual_seed(1)
    masks = draw_dropout(case.pieces, routing.order_S.numel(), dropout, x_TH)
    out_TH = engine.run(x_TH, weight_TK, routing, case.base, case.pieces, masks)
    torch.manual_seed(2)
    grads = torch.autograd.grad(out_TH, case.leaves, torch.randn(out_TH.shape, dtype=out_TH.dtype))
    return [out_TH.detach(), *grads]


def cases(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Case, float]]:
    """(what it is, the case, dropout), for all that `check_engine` tries."""
    all_on_one = torch.ones(9, 1, dtype=torch.int64)
    none_for_some = torch.tensor([[0, 3], [3, 0]]).repeat(9, 1)
    plain: dict[str, dict[str, Any]] = {
        "ranks that differ": dict(ranks=[3, 0, 9, 1, 4], tokens=30),
        "a single rank": dict(ranks=[0, 0, 1, 0]),
        "equal ranks": dict(ranks=[8, 8, 8]),
        "no rank at all": dict(ranks=[0, 0, 0]),
        "one token": dict(ranks=[1, 1], tokens=1),
        "all tokens on one expert": dict(ranks=[3, 4, 0], index=all_on_one),
        "experts without tokens": dict(ranks=[4, 5, 0, 2], index=none_for_some, tokens=18),
        "gate, up and down": dict(ranks=[3, 0, 5, 1], projections=("gate", "up", "down")),
        "up and down": dict(ranks=[3, 0, 5, 1], projections=("up", "down")),
        "gate_up alone": dict(ranks=[3, 0, 5, 1], projections=("gate_up",)),
        "down alone": dict(ranks=[3, 0, 5, 1], projections=("down",)),
        "odd sizes": dict(ranks=[3, 2, 7], hidden=13, width=5, tokens=11),
        "another gate": dict(ranks=[3, 2, 4], gate=gelu_gate),
    }
    for name, settings in plain.items():
        yield name, make_case(dtype=dtype, **settings), 0.0
    yield "dropout", make_case([3, 2, 4], dtype=dtype), _DROPOUT
    if dtype in (torch.bfloat16, torch.float16):
        case = make_case([3, 2, 4], dtype=dtype)
        case.leaves[1] = case.leaves[1].detach().float().requires_grad_()
        yield "routing weights in float32", case, 0.0
        return
    for layout in LAYOUTS:
        projections = ("up", "down") if layout == "no gate" else ("gate", "up", "down")
        for dropout in (0.0, _DROPOUT):
            case = make_case([3, 0, 5, 1], projections, dtype, tokens=300)
            name = f"layout {layout}" + (", dropout" if dropout else "")
            yield name, change_layout(case, layout), dropout


def check_engine(
    engine: Engine,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    device: str | torch.device = "cpu",
) -> dict[str, str]:
    """Run `engine` through all cases and compare it with `naive`; torch's seed is put back.

    Args:
        engine: it need not be registered.
        dtypes: what the experts compute in.
        device: where.

    Returns:
        What it refused: case -> reason.

    Raises:
        AssertionError: naming the case, the tensor and the error where it is off; or if it refused
            every case.
    """
    refused, number = {}, 0
    with torch.random.fork_rng(), torch.device(device):
        for dtype in dtypes:
            for what, case, dropout in cases(dtype):
                name, number = f"{what} ({dtype})", number + 1
                reason = engine.refuses(case.base)
                if reason is None:
                    _compare(engine, case, dropout, name, TOLERANCES[dtype])
                else:
                    refused[name] = reason
    assert len(refused) < number, f"{engine.name} refused every case: {set(refused.values())}"
    return refused


def _compare(engine: Engine, case: Case, dropout: float, name: str, tolerance: float) -> None:
    wanted = run_engine(ENGINES["naive"], case, dropout)
    got = run_engine(engine, case, dropout)
    for tensor, w, g in zip(case.names, wanted, got, strict=True):
        said = f"engine {engine.name!r}, case {name}: {tensor}"
        assert g.dtype == w.dtype, f"{said} is of {g.dtype}, not {w.dtype}"
        assert g.shape == w.shape, f"{said} has the shape {tuple(g.shape)}, not {tuple(w.shape)}"
        error = float((g.double() - w.double()).norm() / w.double().norm().clamp(min=1e-12))
        assert error < tolerance, f"{said} is off by {error:.1e} of its norm, over {tolerance:.0e}"
