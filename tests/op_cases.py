"""Random experts with ragged adapters on them, and what an engine makes of them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from drlora.ops import (
    ENGINES,
    ExpertWeights,
    LoraPiece,
    adapted_experts,
)

FAST = [name for name in ENGINES if name != "naive"]


def silu_gate(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_gate(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


def make_pool(ranks, inputs, outputs, dtype):
    rows = sum(ranks)
    offsets = tuple([0, *torch.tensor(ranks).cumsum(0).tolist()])
    a = torch.randn(rows, inputs, dtype=dtype, requires_grad=True)
    b = torch.randn(rows, outputs, dtype=dtype, requires_grad=True)
    return a, b, offsets


def make_case(ranks, projections=("gate_up", "down"), dtype=torch.float32, hidden=16, width=8,
              tokens=9, top_k=2, index=None, gate=silu_gate, seed=0):  # fmt: skip
    torch.manual_seed(seed)
    experts = len(ranks)
    scale = 0.3
    base = ExpertWeights(
        (scale * torch.randn(experts, 2 * width, hidden)).to(dtype),
        (scale * torch.randn(experts, hidden, width)).to(dtype),
        gate,
        is_silu=gate is silu_gate,
    )
    shapes = {"gate_up": (hidden, 2 * width, 0), "gate": (hidden, width, 0),
              "up": (hidden, width, width), "down": (width, hidden, 0)}  # fmt: skip
    pieces, leaves = [], []
    for projection in projections:
        inputs, outputs, start = shapes[projection]
        a, b, offsets = make_pool(ranks, inputs, outputs, dtype)
        leaves += [a, b]
        matrix = "down" if projection == "down" else "gate_up"
        pieces.append(LoraPiece(matrix, start, a, b, offsets, 0.7))
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    if index is None:
        index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    weight = torch.rand(index.shape, dtype=dtype).requires_grad_()
    return base, pieces, [x, weight, *leaves], index


def run(engine, case, dropout=0.0):
    base, pieces, leaves, index = case
    torch.manual_seed(1)
    out = adapted_experts(leaves[0], index, leaves[1], base, pieces, dropout=dropout, engine=engine)
    torch.manual_seed(2)
    grads = torch.autograd.grad(out, leaves, torch.randn(out.shape, dtype=out.dtype))
    return [out.detach(), *grads]


def assert_engines_agree(case, engine, tolerance=2e-5, dropout=0.0):
    names = ["out", "dX", "dweight", *(f"d{f}{i}" for i in range(len(case[1])) for f in "AB")]
    wanted = run("naive", case, dropout)
    got = run(engine, case, dropout)
    for name, w, g in zip(names, wanted, got, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape, name
        error = (g.double() - w.double()).norm() / w.double().norm().clamp(min=1e-12)
        assert error < tolerance, f"{engine}: relative error of {name} is {error:.2e}"


def looped_grouped_mm(x_SI, w_EIO, *, offs):
    """What torch's grouped product computes, in any dtype: torch's own has no float64."""
    starts = [0, *offs.tolist()]
    return torch.cat([x_SI[a:b] @ w for a, b, w in zip(starts, starts[1:], w_EIO, strict=False)])
