"""Random experts with ragged adapters on them, and what an engine makes of them."""

from __future__ import annotations

import torch

from drlora.ops import adapted_experts

FAST = ["loop", "grouped"]


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
