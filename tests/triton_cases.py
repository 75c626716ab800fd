"""The cases of tests/ops/test_triton.py, and programs that need a process of their own for them.

    TRITON_INTERPRET=1 python tests/triton_cases.py interpret    {case: {name: relative error}}
    python tests/triton_cases.py compile                         {kernel variant: {what: how many}}

Triton reads TRITON_INTERPRET when it is imported, once for the whole process. The interpreter takes
much that the compiler refuses, hence the second program: it compiles for Hopper without a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch

from drlora.ops import ExpertWeights, adapted_experts, as_matrix
from drlora.ops.contract import gelu_gate, make_case
from drlora.ops.storage.packed import Packed, packed_format

BF16 = torch.bfloat16
ONE_EXPERT = torch.ones(21, 1, dtype=torch.int64)
ONLY_0_AND_3 = torch.tensor([[0, 3], [3, 0]]).repeat(9, 1)

# Sizes that are no multiple of a tile, with more than one tile of rows, columns, depth and ranks.
CASES = {
    "unequal ranks": dict(ranks=[3, 17, 0, 1], tokens=24, hidden=70, width=35),
    "ranks over one block": dict(ranks=[33, 0, 70], hidden=20, width=18),
    "no tokens for some": dict(ranks=[4, 5, 0, 2], tokens=18, index=ONLY_0_AND_3),
    "all tokens on one": dict(ranks=[3, 18, 0], tokens=21, index=ONE_EXPERT),
    "one token": dict(ranks=[1, 1], tokens=1),
    "no ranks": dict(ranks=[0, 0, 0]),
    "one rank": dict(ranks=[0, 0, 1, 0], tokens=20),
    "odd sizes": dict(ranks=[3, 2, 7], hidden=13, width=5, tokens=11),
    "even sizes": dict(ranks=[16, 16], hidden=32, width=32, tokens=16),
    "gate, up and down": dict(ranks=[3, 0, 17], projections=("gate", "up", "down"), width=35),
    "up and down": dict(ranks=[3, 0, 5, 1], projections=("up", "down"), width=35),
    "gate_up alone": dict(ranks=[3, 0, 5, 1], projections=("gate_up",)),
    "down alone": dict(ranks=[3, 0, 5, 1], projections=("down",)),
    "three pieces on a matrix": dict(ranks=[3, 1], projections=("gate", "gate_up", "up", "down")),
    "no pieces": dict(ranks=[0, 0, 0], projections=()),
    "another activation": dict(ranks=[3, 2, 4], gate=gelu_gate),
    "dropout": dict(ranks=[3, 17, 4], projections=("gate", "up", "down"), dropout=0.4),
    "bfloat16": dict(ranks=[3, 17, 1], dtype=BF16, hidden=35, width=18),
    "bfloat16, dropout": dict(ranks=[3, 2], dtype=BF16, dropout=0.3),
    "float32 routing weights": dict(ranks=[3, 2, 4], dtype=BF16, weight_dtype=torch.float32),
    "float16": dict(ranks=[3, 17, 1], dtype=torch.float16, hidden=40, width=24),
    **{
        f"{storage}{', turned' * turned}": dict(
            ranks=[3, 17, 0], hidden=128, width=64, tokens=20, storage=storage, turned=turned
        )
        for storage in ("nf4", "nf4-nested", "int8", "mxfp4", "fp8")
        for turned in (False, True)
    },
    "nf4, bfloat16": dict(ranks=[3, 5], dtype=BF16, hidden=64, width=64, storage="nf4"),
    "fp8, cut tiles": dict(ranks=[3, 5], hidden=150, width=70, storage="fp8"),
}
# For a real device: tiles of 16, 32, 64 and 128 rows, as the mean number of rows per expert asks.
RAGGED = [8, 64, 0, 16, 33, 1, 24, 16]
LARGE = {
    f"{name}, {str(dtype).removeprefix('torch.')}": dict(case, dtype=dtype)
    for dtype in (BF16, torch.float32)
    for name, case in {
        "OLMoE": dict(ranks=RAGGED, hidden=2048, width=1024, tokens=1000),
        "odd sizes": dict(ranks=RAGGED, hidden=515, width=333, tokens=199),
        "gate, up and down": dict(
            ranks=[8, 130, 0, 16], projections=("gate", "up", "down"), hidden=512, tokens=500
        ),
        "dropout": dict(ranks=RAGGED, hidden=512, width=256, tokens=120, dropout=0.1),
        "NF4": dict(ranks=RAGGED, hidden=512, width=256, tokens=300, storage="nf4-nested"),
        "few tokens": dict(ranks=RAGGED * 4, hidden=512, width=256, tokens=100),
    }.items()
}


def relative_errors(case: dict, device: str = "cpu") -> dict[str, float]:
    """Relative error of the output and of every gradient, against `naive`."""
    base, pieces, leaves, index, dropout = prepare(case, device)
    wanted = run("naive", base, pieces, leaves, index, dropout)
    with uninitialised_memory_is_nan():
        got = run("triton", base, pieces, leaves, index, dropout)
    factors = [f"d{factor}{i}" for i in range(len(pieces)) for factor in "AB"]
    errors = {}
    for name, w, g in zip(["out", "dX", "dweight", *factors], wanted, got, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape, name
        difference = (g.double() - w.double()).norm()
        errors[name] = float(difference / w.double().norm().clamp(min=1e-12))
    return errors


def prepare(case: dict, device: str) -> tuple:
    """What `run` needs, on the device."""
    settings = dict(case)
    dropout, weight_dtype = settings.pop("dropout", 0.0), settings.pop("weight_dtype", None)
    own = {key: value for key, value in settings.items() if key not in ("storage", "turned")}
    base, pieces, leaves, index = make_case(**own)
    storage, turned = settings.get("storage"), settings.get("turned", False)
    weights = [stored(w.to(device), storage, turned) for w in (base.gate_up_EGH, base.down_EHI)]
    base = ExpertWeights(*weights, base.apply_gate, base.is_silu)
    if weight_dtype is not None:
        leaves[1] = leaves[1].to(weight_dtype)
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    pairs = zip(pieces, leaves[2::2], leaves[3::2], strict=True)
    pieces = [piece._replace(a_RI=a, b_RO=b) for piece, a, b in pairs]
    return base, pieces, leaves, index.to(device), dropout


def stored(w_EOI, storage, turned):
    """A matrix as numbers, or packed as (E, O, I) or (E, I, O)."""
    if storage is None:
        return as_matrix(w_EOI)
    kept = w_EOI.transpose(1, 2).contiguous() if turned else w_EOI
    return as_matrix(Packed.of(kept, packed_format(storage)), turned)


def run(engine, base, pieces, leaves, index, dropout):
    """Output and every gradient."""
    torch.manual_seed(1)
    x, weight = leaves[:2]
    out = adapted_experts(x, index, weight, base, pieces, dropout=dropout, engine=engine)
    torch.manual_seed(2)
    # Small, so that float16 sums do not overflow.
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out) / 64)
    return [out.detach(), *grads]


@contextmanager
def uninitialised_memory_is_nan():
    """Fill with NaN what `torch.empty`, `empty_like` and `Tensor.new_empty` return.

    A kernel that reads what nobody wrote then cannot pass.
    """
    places = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in places]

    def filled(original: Callable) -> Callable:
        def make(*args, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make

    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, filled(original))
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def interpret() -> dict[str, dict[str, float]]:
    """Errors of every small case, in Triton's interpreter."""
    assert "drlora.ops.triton.engine" not in sys.modules, "imported before it was chosen"
    return {name: relative_errors(case) for name, case in CASES.items()}


class _Hopper:
    """Stands for a driver: enough for Triton to compile for a chip that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class _Compiled:
    """Compiles a kernel where it would be launched, and notes what it takes."""

    def __init__(self, kernel, found: dict[str, dict[str, int]]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            code = compiled.asm["ttgir"]
            self.found[f"{self.kernel.__name__} {len(self.found)}"] = {
                "shared_bytes": compiled.metadata.shared,
                "products": code.count("ttng.warp_group_dot"),
                "asynchronous copies": code.count("ttg.async_copy_global_to_local"),
            }

        return launch


def compile_for_hopper() -> dict[str, dict[str, int]]:
    """Compile all kernels of a forward and a backward pass, with the tiles of a Hopper chip."""
    from triton.runtime import driver

    import drlora.ops.triton.engine as engine
    import drlora.ops.triton.tiles as tiles
    from drlora.ops.triton import kernels as triton_kernels
    from drlora.ops.triton import rowwise as triton_rowwise

    driver.set_active(_Hopper())
    found: dict[str, dict[str, int]] = {}
    for module in (triton_kernels, triton_rowwise):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, _Compiled(getattr(module, name), found))
    engine._check_fits = lambda x_TH: None
    tiles._is_hopper_class = lambda device: True
    case = dict(ranks=[8, 40], dtype=BF16, hidden=128, width=64, tokens=140)
    run("triton", *prepare(case, "cpu"))
    for storage in ("nf4", "int8"):
        run("triton", *prepare({**case, "storage": storage}, "cpu"))
    return found


if __name__ == "__main__":
    program = {"interpret": interpret, "compile": compile_for_hopper}[sys.argv[1]]
    print(json.dumps(program()))
