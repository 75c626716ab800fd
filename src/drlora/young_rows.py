"""What the optimizer is told about a row that wakes up late.

Adam divides its moments by 1 - beta ** t, with one step count t for a whole parameter. A row that
is claimed after step b has moments that start from zero at b; with t instead of n = t - b its steps
are too large: by (1 - b1) / sqrt(1 - b2) = 3.16 at its first step, and by up to 6.5 in the tenth to
twentieth if its gradient keeps its sign. Two ways to put that right:

    inherit   its second moment starts at the mean of its expert's older rows, whose bias is that
              of the shared count; its first moment starts at zero, a warm-up of some ten steps.
              Written once, at the event.
    own       it gets the update of an Adam of its own that started at b, exactly: what the shared
              count made of it is taken back and replaced after each step.

Parameters may be sharded by rows (FSDP2): each process then handles the rows it holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Adam, AdamW, Optimizer

# Beyond this the two corrections differ by less than 5e-5 and the row is grown up.
_NEGLIGIBLE_BIAS = 1e-4


def unwrap_optimizer(optimizer: object) -> object:
    """The innermost optimizer under wrappers such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def is_adam(optimizer: object) -> bool:
    """Whether the optimizer's update is torch's Adam or AdamW, which `own` computes again."""
    return isinstance(optimizer, (Adam, AdamW))


def parameter_groups(optimizer: Optimizer) -> dict[Tensor, dict]:
    """Parameter -> the optimizer's group that holds it."""
    return {p: group for group in optimizer.param_groups for p in group["params"]}


def decays_weights(groups: Iterable[dict]) -> bool:
    """Whether any of the groups has weight decay, which also acts on rows that nobody owns."""
    return any(group.get("weight_decay", 0) for group in groups)


class HeldRows(NamedTuple):
    """The part of some rows of a parameter that this process holds.

    Attributes:
        chosen: which of the asked-for rows these are, as an index into them.
        local: their row numbers in the local shard.
    """

    chosen: Tensor
    local: Tensor


def held_rows(parameter: Tensor, rows: Tensor) -> HeldRows:
    """All of `rows` for an ordinary parameter; those of the local shard for a DTensor."""
    first, count = 0, parameter.shape[0]
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        first, count = offset[0], shape[0]
    chosen = ((rows >= first) & (rows < first + count)).nonzero().squeeze(1)
    return HeldRows(chosen, rows[chosen] - first)


def local_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or the local shard of a DTensor (same storage)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def forget_rows(parameter: Tensor, state: dict, rows: Tensor) -> None:
    """Zero every per-element state (moments, momentum) of some rows.

    They are zero already unless the optimizer fed weight decay into its moments. Quantised states
    are left alone: code 0 does not stand for zero there.
    """
    held = held_rows(parameter, rows)
    for value in state.values():
        if (
            isinstance(value, Tensor)
            and value.shape == parameter.shape
            and value.is_floating_point()
        ):
            local_part(value)[held.local] = 0


@torch.no_grad()
def inherit_second_moment(
    parameter: Tensor, state: dict, owner_R: Tensor, num_experts: int, rows: Tensor
) -> bool:
    """Start the second moment of just claimed rows at the mean of their expert's older rows.

    Args:
        parameter: (R, anything).
        state: the optimizer's state of it.
        owner_R: (R,) the expert of each row, -1 if free; `rows` are owned already.
        num_experts: E.
        rows: the claimed rows.

    Returns:
        Whether the state has a second moment per element (`exp_avg_sq`, as Adam's); nothing is
        done if not.
    """
    moments = [
        state[key]
        for key in ("exp_avg_sq", "max_exp_avg_sq")
        if isinstance(state.get(key), Tensor) and state[key].shape == parameter.shape
    ]
    older_R = owner_R.clone()
    older_R[rows] = -1
    bins_R = older_R.long() % (num_experts + 1)  # the last bin takes what does not count
    counts_E1 = torch.bincount(bins_R, minlength=num_experts + 1).clamp(min=1)[:, None]
    everything = held_rows(parameter, torch.arange(len(owner_R), device=owner_R.device))
    held = held_rows(parameter, rows)
    for moment in moments:
        local = local_part(moment)
        sums_E1 = local.new_zeros(num_experts + 1, *local.shape[1:])
        sums_E1.index_add_(0, bins_R[everything.chosen], local)
        if isinstance(moment, DTensor):
            dist.all_reduce(sums_E1, group=moment.device_mesh.get_group())
        local[held.local] = (sums_E1 / counts_E1)[owner_R[rows[held.chosen]].long()]
    return bool(moments)


@torch.no_grad()
def correct_young_rows(
    parameter: Tensor, state: dict, group: dict, birth_R: Tensor, rows: Tensor, step: int
) -> None:
    """Turn the update that Adam just made of some rows into that of an Adam started at their birth.

    Args:
        parameter: (R, anything), just updated; changed in place in `rows`.
        state: the optimizer's state of it, with `exp_avg` and `exp_avg_sq`.
        group: its parameter group, with `lr`, `betas`, `eps` as they were at the update.
        birth_R: (R,) optimizer step after which each row was claimed.
        rows: which rows are young, `0 < birth < step`.
        step: the optimizer's step count t after the update.
    """
    beta1, beta2 = group["betas"]
    held = held_rows(parameter, rows)
    second = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    moment = local_part(state["exp_avg"]).index_select(0, held.local)
    root = local_part(state[second]).index_select(0, held.local).sqrt_()
    age_R1 = (step - birth_R[rows[held.chosen]]).to(torch.float64)[:, None]

    def update(count_R1: Tensor) -> Tensor:
        bias1, bias2 = 1 - beta1**count_R1, 1 - beta2**count_R1
        length, scale = (group["lr"] / bias1).to(root.dtype), bias2.rsqrt().to(root.dtype)
        return length * moment / torch.addcmul(root.new_tensor(group["eps"]), root, scale)

    excess = update(torch.full_like(age_R1, step)) - update(age_R1)
    sign = -1.0 if group.get("maximize") else 1.0
    local_part(parameter).index_add_(0, held.local, excess.to(parameter.dtype), alpha=sign)


def young_rows(birth_R: Tensor, step: int, beta2: float) -> Tensor:
    """Rows that were claimed after the start and whose bias is not yet negligible."""
    age_R = step - birth_R
    young_R = (birth_R > 0) & (age_R > 0) & (beta2 ** age_R.double() > _NEGLIGIBLE_BIAS)
    return young_R.nonzero().squeeze(1)
