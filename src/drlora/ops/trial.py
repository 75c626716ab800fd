"""Which engine `auto` takes on an accelerator: of those that are right there, the faster one.

A kernel can be wrong on a card it was not written on, or fail to compile there, and which is faster
depends on the card, the shape and the ranks. So the first training pass of each shape tries all
`CANDIDATES` on its own batch: their output and every gradient are held against the definition
(`naive`, in float32, a few experts at a time), those that agree are timed, and the faster one
computes all calls of that shape from then on. What fails or is wrong is never used, and is warned
of. Calls without gradients take what was found for their layer, or the plain choice.

What is found is kept for the process (`found`); a checkpoint of the Trainer carries it on, because
engines differ in the last bits and a resumed run is to have those of a straight one. With torch's
deterministic algorithms nothing is timed: the first candidate that is right is taken.

Letters as in `drlora.ops.parts`.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from drlora.config.registry import ENGINES
from drlora.errors import ConfigError, first_line
from drlora.ops.engine import Engine, Run
from drlora.ops.naive import experts_naive
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing
from drlora.ops.storage.widened import Widened
from drlora.ops.weights import ExpertWeights

# Kind of device -> names of engines, those first that are preferred where nothing is timed.
CANDIDATES: dict[str, tuple[str, ...]] = {"cuda": ("triton", "grouped")}
# Cards before these have no tensor cores in Triton: its kernels compile for minutes, and lose.
LEAST_CAPABILITY = {"triton": (8, 0)}
REPEATS = 3
EXPERTS_AT_ONCE = 8  # that are wide in the definition
SLACK = 3.0  # times the error that the definition itself makes in the experts' dtype
# What an error may be at least: a row of a tensor, relative to its norm.
LEAST_ALLOWED = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_FOUND: dict[str, str] = {}
logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """What an engine is given; see `drlora.ops.adapted_experts`."""

    x_TH: Tensor
    weight_TK: Tensor
    routing: Routing
    base: ExpertWeights
    pieces: list[LoraPiece]
    masks: DropoutMasks

    @property
    def names(self) -> list[str]:
        """Of the output and of every gradient."""
        factors = [f"d{f} {number}" for number in range(len(self.pieces)) for f in "AB"]
        return ["output", "dX", "dweight", *factors]

    @property
    def layer(self) -> str:
        """What does not change from batch to batch, in words: device, sizes, dtype, storage."""
        base = self.base
        pieces = ", ".join(f"{p.matrix}+{p.start}:{p.b_RO.shape[1]}" for p in self.pieces)
        sizes = f"{base.num_experts} experts {self.x_TH.shape[1]} x {base.width}"
        kept = f"{base.gate_up.name}, {str(base.dtype).removeprefix('torch.')}"
        return f"{_card(self.x_TH.device)}: {sizes} ({kept}), {pieces}"

    @property
    def shape(self) -> str:
        """The layer with rows and largest rank, both rounded up to powers of two."""
        rank = max((_largest(piece.offsets) for piece in self.pieces), default=0)
        rows = 1 << (self.routing.order_S.numel() - 1).bit_length()
        return f"{self.layer}, {rows} rows, rank {1 << max(0, rank - 1).bit_length()}"

    @property
    def is_trained(self) -> bool:
        """Whether there will be a backward pass."""
        return torch.is_grad_enabled() and any(p.a_RI.requires_grad for p in self.pieces)


@lru_cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=512)
def _largest(offsets: tuple[int, ...]) -> int:
    return max(end - start for start, end in pairwise(offsets))


def found() -> dict[str, str]:
    """Shape -> the engine that computes it."""
    return dict(_FOUND)


def remember(engines: dict[str, str]) -> None:
    """Take what another process found, as `found` gave it; names that are not known are left."""
    _FOUND.update({shape: name for shape, name in engines.items() if name in ENGINES})


def engine_by_trial(call: Call) -> Engine | None:
    """The engine for a call, or None where the plain choice stands."""
    names = CANDIDATES.get(call.x_TH.device.type, ())
    if not names or call.routing.order_S.numel() == 0:
        return None
    shape = call.shape
    if shape not in _FOUND:
        if not call.is_trained:
            layer = f"{call.layer}, "
            of_layer = (name for known, name in _FOUND.items() if known.startswith(layer))
            return next((ENGINES[name] for name in of_layer), None)
        able = [name for name in names if _can(name, call)]
        if not able:
            return None
        try:
            _FOUND[shape] = _try_all(_with_numbers(call), able)
        except torch.OutOfMemoryError:  # of the trial, which keeps results in float32 beside
            _FOUND[shape] = able[-1]
            warnings.warn(
                f"there is no memory to try engines for {shape}; {able[-1]!r} computes, unchecked.",
                stacklevel=2,
            )
    return ENGINES[_FOUND[shape]]


def _can(name: str, call: Call) -> bool:
    device, least = call.x_TH.device, LEAST_CAPABILITY.get(name)
    if device.type == "cuda" and least and torch.cuda.get_device_capability(device) < least:
        return False
    try:
        return ENGINES[name].refuses(call.base) is None
    except ConfigError:  # not installed
        return False


def _try_all(call: Call, names: list[str]) -> str:
    """The name of the fastest candidate that is right; `naive` if none is."""
    # Checkpointing counts what is kept of a pass, and this is none of it.
    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.enable_grad(), keep, _in_full_precision():
        grad_TH = _random_like(call.x_TH)
        wanted = _definition(call, grad_TH, torch.float32)
        rounded = _definition(call, grad_TH, call.x_TH.dtype)
        least = LEAST_ALLOWED.get(call.x_TH.dtype, 1e-3)
        allowed = [
            max(least, SLACK * row_error(r, w)) for r, w in zip(rounded, wanted, strict=True)
        ]
        seconds = {}
        for name in names:
            fault = _fault(ENGINES[name].run, call, grad_TH, wanted, allowed)
            if fault is not None:
                _refuse_dead(call.x_TH.device, name, fault)
                warnings.warn(
                    f"engine {name!r} is not used for {call.shape}: {fault}.", stacklevel=2
                )
                continue
            if torch.are_deterministic_algorithms_enabled():
                return name
            again = partial(_results, ENGINES[name].run, call, grad_TH)
            seconds[name] = _seconds(again, call.x_TH.device)
    chosen = min(seconds, key=lambda name: seconds[name], default="naive")
    told = ", ".join(f"{name} {1e3 * taken:.2f} ms" for name, taken in seconds.items())
    logger.info("%s: %s computes (%s)", call.shape, chosen, told or "no other engine is right")
    return chosen


def _with_numbers(call: Call) -> Call:
    """The call with numbers in rows of factors that are zero, as B is before the first step.

    With B = 0 the update, dz and dA are zero whatever an engine makes of them.
    """

    def filled(factor_RO: Tensor, rank: int) -> Tensor:
        factor_RO = factor_RO.detach()
        is_zero_R1 = (factor_RO == 0).all(dim=1, keepdim=True)
        return torch.where(is_zero_R1, _random_like(factor_RO) / max(1, rank) ** 0.5, factor_RO)

    pieces = []
    for piece in call.pieces:
        rank = _largest(piece.offsets)
        a_RI, b_RO = filled(piece.a_RI, rank), filled(piece.b_RO, rank)
        pieces.append(piece._replace(a_RI=a_RI, b_RO=b_RO))
    return call._replace(pieces=pieces)


@contextmanager
def _in_full_precision() -> Iterator[None]:
    """Products in float32 without TF32, in which the definition would be off itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _refuse_dead(device: torch.device, name: str, fault: str) -> None:
    """Raises:
    ConfigError: if the device computes nothing any more, as after a wrong access to its memory.
    """
    try:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    except Exception as error:
        others = [other for other in CANDIDATES[device.type] if other != name]
        raise ConfigError(
            f"engine {name!r} has left {device} unusable ({fault}); start again with "
            f"engine={others[0] if others else 'naive'!r}."
        ) from error


def _random_like(x_TH: Tensor) -> Tensor:
    """Normal numbers, always the same, without touching the generators of the run."""
    draw = torch.Generator(x_TH.device).manual_seed(0)
    return torch.randn(x_TH.shape, generator=draw, device=x_TH.device).to(x_TH.dtype)


def _fault(
    run: Run, call: Call, grad_TH: Tensor, wanted: list[Tensor], allowed: list[float]
) -> str | None:
    """What is wrong with an engine here, as a clause; None if nothing is."""
    try:
        got = _results(run, call, grad_TH)
        errors = [row_error(g, w) for g, w in zip(got, wanted, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # compilers and drivers raise what they like
        return f"it fails: {type(problem).__name__}: {first_line(problem)}"
    for name, error, bound in zip(call.names, errors, allowed, strict=True):
        if not error <= bound:  # NaN is wrong too
            return f"its {name} is off by {error:.1e} in a row, more than {bound:.1e}"
    return None


def row_error(got: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a row; rows much smaller than the mean count as such.

    By rows, so that one wrong expert among many cannot hide in a norm over all of them.
    """
    if wanted.numel() == 0:
        return 0.0 if got.shape == wanted.shape else float("inf")
    size = wanted.norm(dim=-1)
    error = (got.float() - wanted).norm(dim=-1) / size.clamp(min=0.01 * size.mean() + 1e-20)
    return float(error.max())


def _results(run: Run, call: Call, grad_TH: Tensor) -> list[Tensor]:
    """Output and every gradient; the routing weights' in one row, for each alone may cancel."""
    fresh, leaves = _leaves(call, call.x_TH.dtype, call.weight_TK.dtype)
    out_TH = run(*fresh)
    grads = torch.autograd.grad(out_TH, leaves, grad_TH, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return _in_rows([out_TH.detach(), *filled])


def _definition(call: Call, grad_TH: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same by `naive` in another dtype, a few experts at a time, which is all that is wide."""
    fresh, leaves = _leaves(call, dtype, dtype)
    base = call.base
    wide = fresh._replace(
        base=replace(
            base,
            gate_up=Widened(base.gate_up, dtype),
            down=Widened(base.down, dtype),
            gate_up_bias_EG=_to(base.gate_up_bias_EG, dtype),
            down_bias_EH=_to(base.down_bias_EH, dtype),
        ),
        masks=DropoutMasks(*(_to(mask, dtype) for mask in call.masks)),
    )
    totals = [torch.zeros_like(leaf) for leaf in (leaves[0], *leaves)]
    ends = [0, *call.routing.counts_E.cumsum(0).tolist()]
    for low in range(0, base.num_experts, EXPERTS_AT_ONCE):
        high = min(low + EXPERTS_AT_ONCE, base.num_experts)
        if ends[low] == ends[high]:
            continue
        out_TH = experts_naive(*_of_experts(wide, low, high, slice(ends[low], ends[high])))
        grads = torch.autograd.grad(out_TH, leaves, grad_TH.to(dtype), allow_unused=True)
        for total, part in zip(totals, (out_TH.detach(), *grads), strict=True):
            if part is not None:
                total += part
    return _in_rows(totals)


def _of_experts(call: Call, low: int, high: int, rows: slice) -> Call:
    """The call with the rows of some experts alone."""
    routing = call.routing
    counts_E = torch.zeros_like(routing.counts_E)
    counts_E[low:high] = routing.counts_E[low:high]
    return call._replace(
        routing=Routing(routing.order_S[rows], routing.token_S[rows], counts_E),
        masks=DropoutMasks(*(None if mask is None else mask[rows] for mask in call.masks)),
    )


def _leaves(call: Call, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    """The call with inputs of its own, and these: x_TH, weight_TK, A and B of each piece."""

    def own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_()

    x_TH, weight_TK = own(call.x_TH, dtype), own(call.weight_TK, weight_dtype)
    pieces = [p._replace(a_RI=own(p.a_RI, dtype), b_RO=own(p.b_RO, dtype)) for p in call.pieces]
    factors = [factor for piece in pieces for factor in (piece.a_RI, piece.b_RO)]
    changed = call._replace(x_TH=x_TH, weight_TK=weight_TK, pieces=pieces)
    return changed, [x_TH, weight_TK, *factors]


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _in_rows(results: list[Tensor]) -> list[Tensor]:
    return [t.float().reshape(1, -1) if n == 2 else t.float() for n, t in enumerate(results)]


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median of a few calls, the device waited for."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    taken = []
    for _ in range(REPEATS):
        wait()
        started = time.perf_counter()
        function()
        wait()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
