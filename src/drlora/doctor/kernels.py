"""Engines and storages, each tried on a tiny layer against the definition."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from drlora.config.registry import ENGINES
from drlora.doctor.findings import Finding, works
from drlora.errors import ConfigError, first_line
from drlora.ops.contract import TOLERANCES, make_case
from drlora.ops.experts import adapted_experts
from drlora.ops.storage.packed import FORMATS, Packed

SAME = "the same as the definition, output and gradients"
REPORT = "tell it to the project, with drlora doctor --json"
RANKS = (4, 0, 8, 2)
# Of packed numbers, the largest relative error of a matrix of normal numbers.
ROUNDED = 0.2


def engines() -> Iterator[Finding]:
    """Each engine on the CPU, and on a GPU where there is one."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in ENGINES:
        for device in devices:
            yield _engine(name, device)


def _engine(name: str, device: str) -> Finding:
    what = f"engine {name}, {device}"
    try:
        engine = ENGINES[name]
        refused = engine.refuses(make_case(RANKS).base)
        if refused:
            return Finding(what, "absent", refused, "engine: auto takes another")
        off = max(_error(name, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    except ConfigError as error:  # such as kernels of a GPU, where there is none
        return Finding(what, "absent", first_line(error), "engine: auto takes another")
    except Exception as error:  # whatever a kernel makes of this machine
        return Finding(what, "fails", first_line(error), f"engine: auto, or naive; {REPORT}")
    if off > 1:
        said = f"differs from the definition by {off:.1f} times what rounding explains"
        return Finding(what, "fails", said, f"engine: naive; {REPORT}")
    return works(what, SAME)


def _error(name: str, device: str, dtype: torch.dtype) -> float:
    """Largest difference to `naive`, over what is allowed."""
    found = {one: _run(one, device, dtype) for one in (name, "naive")}
    pairs = zip(found[name], found["naive"], strict=True)
    errors = [(one - other).norm() / other.norm().clamp(min=1e-6) for one, other in pairs]
    return float(max(errors)) / TOLERANCES[dtype]


def _run(name: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    with torch.random.fork_rng(), torch.device(device):
        case = make_case(RANKS, dtype=dtype, hidden=32, width=16, tokens=12)
        x_TH, weight_TK = case.leaves[:2]
        out = adapted_experts(x_TH, case.index_TK, weight_TK, case.base, case.pieces, engine=name)
        gradients = torch.autograd.grad(out.float().square().sum(), case.leaves)
    return [tensor.detach().float() for tensor in (out, *gradients)]


def storages() -> Iterator[Finding]:
    """Each way to keep experts in few bits, packed and read."""
    for name, kind in FORMATS.items():
        what = f"storage {name}"
        try:
            generator = torch.Generator().manual_seed(0)
            w_EOI = torch.randn(2, 64, 128, generator=generator)
            read_EOI = Packed.of(w_EOI, kind).wide()
        except Exception as error:  # whatever is missing here
            yield Finding(what, "fails", first_line(error), f"another storage; {REPORT}")
            continue
        off = float((read_EOI - w_EOI).norm() / w_EOI.norm())
        if off > ROUNDED:
            yield Finding(what, "fails", f"off by {off:.0%}", f"another storage; {REPORT}")
        else:
            yield works(what, f"{kind.bits:.2f} bits a number, rounded by {off:.1%}")
