"""What the optimizer is told about a row that wakes up late.

Adam divides its moments by 1 - beta ** t, with one step count t for a whole parameter. A row that
is claimed after step b has moments that start from zero at b; with t instead of n = t - b its steps
are too large: by (1 - b1) / sqrt(1 - b2) = 3.16 at its first step, and by up to 6.5 in the tenth to
twentieth if its gradient keeps its sign. Two ways to put that right:

    inherit   its second moment starts at the mean of its expert's older rows, whose bias is that
              of the shared count; its first moment starts at zero, a warm-up of some ten steps.
              Written once, at the event (optimizer_rows).
    own       it gets the update of an Adam of its own that started at b, exactly: what the shared
              count made of it is taken back and replaced after each step. This module does that.

Where an engine has split parameters (FSDP2, ZeRO), each process handles the rows it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from drlora.distributed.held import Block, blocks_of, row_width, trained_tensor
from drlora.ranks.optimizer_rows import parameter_groups

# Beyond this the two corrections differ by less than 5e-5 and the row is grown up.
_NEGLIGIBLE_BIAS = 1e-4

# Where young rows lie in more pieces than this they are gathered, corrected together and put back.
_MOST_SPANS = 3

# Elements corrected at a time: a CPU keeps the buffers in its cache, others save launches.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 2**18, 2**23


# Neighbouring rows, or the numbers of rows wherever they are.
Rows = range | Tensor


class Cohort(NamedTuple):
    """Neighbouring rows `first` to `end - 1` of a pool that were claimed after the same step."""

    first: int
    end: int
    birth: int


def read_cohorts(birth_R: Tensor) -> list[Cohort]:
    """All cohorts in the order of their rows; rows owned or free from the start have birth 0."""
    births = birth_R.cpu().numpy()
    bounds = [0, *(np.flatnonzero(np.diff(births)) + 1).tolist(), len(births)]
    return [Cohort(i, j, int(births[i])) for i, j in zip(bounds, bounds[1:], strict=False) if i < j]


class Clock(NamedTuple):
    """An Adam's constants and step count t of a parameter.

    With c(n) = sqrt(1 - b2 ** n) its update at count n is

        lr * m * (c(n) / (1 - b1 ** n)) / (sqrt(v) + eps * c(n))
    """

    step: int
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def of(cls, group: dict[str, Any], state: dict[str, Any], step: int) -> Clock:
        """From the optimizer's group and state; `step` is our own count of its steps.

        Reading the count from an accelerator would make the host wait, and ours is the same.
        """
        count = state["step"]
        if not isinstance(count, Tensor) or count.device.type == "cpu":
            step = int(count)
        beta1, beta2 = group["betas"]
        return cls(step, float(beta1), float(beta2), float(group["eps"]))

    def fractions(self) -> tuple[float, float]:
        """c(t) / (1 - b1 ** t) and eps * c(t)."""
        root = math.sqrt(1 - self.beta2**self.step)
        return root / (1 - self.beta1**self.step), self.eps * root

    def own_fractions(self, birth_N: Tensor) -> tuple[Tensor, Tensor]:
        """The same at each row's own count t - birth: two float64 columns, (N, 1)."""
        age_N1 = self.step - birth_N[:, None].double()
        root_N1 = (1 - self.beta2**age_N1).sqrt_()
        return root_N1 / (1 - self.beta1**age_N1), root_N1 * self.eps


def young_spans(cohorts: Iterable[Cohort], clock: Clock) -> list[range]:
    """Rows that were claimed after the start and whose bias is not yet negligible.

    Rows are claimed from the lowest free one up, so young rows are neighbours: one range, if any.

    >>> clock = Clock(step=25, beta1=0.9, beta2=0.999, eps=1e-8)
    >>> young_spans([Cohort(0, 4, 0), Cohort(4, 6, 10), Cohort(6, 7, 20)], clock)
    [range(4, 7)]
    """
    spans: list[range] = []
    for first, end, birth in cohorts:
        age = clock.step - birth
        if 0 < birth < clock.step and clock.beta2**age > _NEGLIGIBLE_BIAS:
            if spans and spans[-1].stop == first:
                first = spans.pop().start
            spans.append(range(first, end))
    return spans


class Pool(Protocol):
    """What `OwnClocks` needs of a rank pool: two parameters that share births."""

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    birth: Tensor


class OwnClocks:
    """Gives young rows the updates of an Adam that started at their birth.

    Who is young is known on the host, from the births as last read; asking the device each step
    would make the host wait for it. Scratch space is kept: fresh memory would cost as much as the
    arithmetic.
    """

    def __init__(self) -> None:
        self._read: dict[int, tuple[Tensor, int, list[Cohort]]] = {}
        self._scattered: dict[int, tuple[list[range], Tensor]] = {}
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def correct(self, optimizer: Optimizer, pools: Iterable[Pool], step: int) -> None:
        """Correct the update that an Adam has just made of all pools; `step` is its count.

        Parameters that it does not hold, or has not updated yet, are left alone.
        """
        groups = parameter_groups(optimizer)
        for number, pool in enumerate(pools):
            fractions: dict[tuple[Rows, Clock], tuple[Tensor, Tensor]] = {}
            for parameter in (pool.lora_A, pool.lora_B):
                trained = trained_tensor(parameter)
                state = optimizer.state.get(trained) if trained is not None else None
                if trained is None or not state or trained not in groups:
                    continue
                group = groups[trained]
                clock = Clock.of(group, state, step)
                for rows in self._young(number, pool.birth, clock):
                    key = rows, clock  # those of lora_A and lora_B are nearly always the same
                    if key not in fractions:
                        fractions[key] = clock.own_fractions(pool.birth[_index(rows)])
                    buffer = self.buffer(trained, row_width(parameter))
                    args = rows, clock, fractions[key], buffer
                    correct_young_rows(parameter, state, group, *args)

    def _young(self, number: int, birth_R: Tensor, clock: Clock) -> Sequence[Rows]:
        """The young rows of a pool: a few ranges, or one tensor where they are scattered."""
        spans = young_spans(self._cohorts(number, birth_R), clock)
        if len(spans) <= _MOST_SPANS:
            return spans
        kept, rows = self._scattered.get(number, ([], birth_R))
        if kept != spans:  # a copy to the device, so not in every step
            rows = torch.cat([torch.arange(span.start, span.stop) for span in spans])
            rows = rows.to(birth_R.device)
            self._scattered[number] = spans, rows
        return [rows]

    def _cohorts(self, number: int, birth_R: Tensor) -> list[Cohort]:
        seen, version, cohorts = self._read.get(number, (None, 0, []))
        if seen is not birth_R or version != birth_R._version:
            cohorts = read_cohorts(birth_R)
            self._read[number] = birth_R, birth_R._version, cohorts
        return cohorts

    def buffer(self, like: Tensor, width: int) -> Tensor:
        """Scratch space for `correct_young_rows`, for a tensor like this one and its row width."""
        key = like.device, torch.promote_types(like.dtype, torch.float32)
        if key not in self._scratch:
            size = _CPU_BLOCK if like.device.type == "cpu" else _ACCELERATOR_BLOCK
            self._scratch[key] = torch.empty(2, max(size, width), device=key[0], dtype=key[1])
        return self._scratch[key]


@torch.no_grad()
def correct_young_rows(
    parameter: Tensor,
    state: dict,
    group: dict,
    rows: Rows,
    clock: Clock,
    own_fractions: tuple[Tensor, Tensor],
    buffer: Tensor,
) -> None:
    """Turn the update that Adam just made of some rows into that of an Adam started at their birth.

    What the shared count made of them is added back, and what their own makes is subtracted.

    Args:
        parameter: (R, anything), just updated where it is trained; changed there in `rows`.
        state: the optimizer's state of it, with `exp_avg` and `exp_avg_sq`.
        group: its parameter group, with `lr` as it was at the update.
        rows: which; a range is changed where it lies, scattered rows are gathered and put back,
            with the same result to the bit.
        clock: the count that they shared.
        own_fractions: `clock.own_fractions` of these rows.
        buffer: (2, n) scratch space of the precision to compute in, at least a row wide.
    """
    trained = trained_tensor(parameter)
    second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    at_once = max(1, buffer.shape[1] // row_width(parameter))
    for block in blocks_of(parameter):
        assert trained is not None
        local, chosen = _held(block, rows, buffer.device)
        weight = block.of(trained)
        # Indexing a tensor by a slice gives a view of it, by a tensor a copy.
        changed = weight[local]
        for piece, moment, square, own_scale, own_eps in zip(
            changed.split(at_once),
            *(block.of(t)[local].split(at_once) for t in (state["exp_avg"], second)),
            *(t[chosen].to(buffer).split(at_once) for t in own_fractions),
            strict=True,
        ):
            own = own_scale, own_eps
            _correct_piece(piece, moment, square, own, clock, group["lr"], buffer)
        if isinstance(local, Tensor):
            weight.index_copy_(0, local, changed)


def _correct_piece(
    weight: Tensor,
    moment: Tensor,
    square: Tensor,
    own_fractions: tuple[Tensor, Tensor],
    clock: Clock,
    lr: float | Tensor,
    buffer: Tensor,
) -> None:
    """Rows of a parameter, its two moments and their own fractions; `weight` is changed."""
    (scale, eps), (own_scale, own_eps) = clock.fractions(), own_fractions
    shared, own = (flat[: weight.numel()].view(weight.shape) for flat in buffer)
    torch.sqrt(square.to(buffer.dtype), out=shared)
    torch.add(shared, own_eps, out=own)
    torch.div(own_scale, own, out=own)
    shared.add_(eps).reciprocal_()
    torch.sub(own, shared, alpha=scale, out=shared)
    if isinstance(lr, Tensor):
        weight.sub_(shared.mul_(moment).mul_(lr))
    else:
        weight.addcmul_(shared, moment, value=-lr)


def _index(rows: Rows) -> slice | Tensor:
    return slice(rows.start, rows.stop) if isinstance(rows, range) else rows


def _held(block: Block, rows: Rows, device: torch.device) -> tuple[slice | Tensor, slice | Tensor]:
    """Of `rows`, those that a block holds: in it, and among `rows`."""
    if isinstance(rows, range):
        return block.span(rows)
    held = block.held(rows)
    return held.local.to(device), held.chosen
