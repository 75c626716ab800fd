"""What an optimizer keeps of rows, and how that is changed when rows change hands.

The optimizers are torch's own interface: `state` holds tensors of the shape of a parameter
(momentum, Adam's moments) beside numbers for the whole parameter, `param_groups` its settings.
Parameters may be sharded by rows (FSDP2): each process then handles the rows it holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from drlora.adapter.row_book import IntArray, in_turns
from drlora.distributed import held_range, held_rows, local_part
from drlora.ranks.eight_bits import FIRST, SECOND, numbers_of


def unwrap_optimizer(optimizer: object) -> object:
    """The innermost optimizer under wrappers such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def is_adam(optimizer: object) -> TypeGuard[Optimizer]:
    """Whether the optimizer's update is torch's Adam or AdamW, which `own` computes again."""
    return isinstance(optimizer, (Adam, AdamW))


def parameter_groups(optimizer: Optimizer) -> dict[Tensor, dict]:
    """Parameter -> the optimizer's group that holds it."""
    return {p: group for group in optimizer.param_groups for p in group["params"]}


def decays_weights(groups: Iterable[dict]) -> bool:
    """Whether any of the groups has weight decay, which also acts on rows that nobody owns."""
    return any(group.get("weight_decay", 0) for group in groups)


def steps_taken(optimizer: object, parameter: Tensor) -> int:
    """How many steps an optimizer says it took of a parameter; 0 where it does not count them."""
    if not isinstance(optimizer, Optimizer):
        return 0
    count = optimizer.state.get(parameter, {}).get("step", 0)
    return int(count) if isinstance(count, (int, float, Tensor)) else 0


@torch.no_grad()
def forget_rows(parameter: Tensor, state: dict, rows: Tensor) -> None:
    """Zero every per-element state (moments, momentum) of some rows.

    Those of free rows are zero already unless the optimizer fed weight decay into its moments.
    """
    held = held_rows(parameter, rows)
    for value in state.values():
        if _is_of(value, parameter) and value.is_floating_point():
            local_part(value)[held.local] = 0
    for name in (FIRST, SECOND):
        if _is_of(state.get(name), parameter) and not state[name].is_floating_point():
            with numbers_of(state, name) as moment:
                if moment is not None:
                    moment[held.local] = 0


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
        Whether the state has a second moment per element (`exp_avg_sq`, as Adam's, or the second
        one of bitsandbytes'); nothing is done if not.
    """
    older_R = owner_R.clone()
    older_R[rows] = -1
    older = older_R.cpu().numpy()
    counts = np.bincount(older[older >= 0], minlength=num_experts).clip(min=1)
    counts_E1 = torch.from_numpy(counts).to(owner_R.device)[:, None]
    held = held_rows(parameter, rows)

    def inherit(moment: Tensor) -> None:
        local = local_part(moment)
        sums_EO = _expert_sums(local, held_range(parameter), older, num_experts)
        if isinstance(moment, DTensor):
            dist.all_reduce(sums_EO, group=moment.device_mesh.get_group())
        local[held.local] = (sums_EO / counts_E1)[owner_R[rows[held.chosen]].long()]

    names = [n for n in ("exp_avg_sq", "max_exp_avg_sq") if _is_of(state.get(n), parameter)]
    for name in names:
        inherit(state[name])
    if not names and _is_of(state.get(SECOND), parameter):
        with numbers_of(state, SECOND) as moment:
            if moment is not None:
                inherit(moment)
                names.append(SECOND)
    return bool(names)


def _is_of(value: object, parameter: Tensor) -> TypeGuard[Tensor]:
    """Whether a state has a number for each of a parameter; quantisers' own tensors do not count.

    Those of torchao say that they are float32 and cannot be written to row by row.
    """
    is_plain = type(value) in (Tensor, DTensor)
    return isinstance(value, Tensor) and is_plain and value.shape == parameter.shape


def _expert_sums(
    local_NO: Tensor, held: tuple[int, int], owner_R: IntArray, num_experts: int
) -> Tensor:
    """(E, O): sums over the rows of each expert that are held here, in the order of the rows.

    Turn by turn, so that the order is the same on every device; `index_add_` leaves it open.
    """
    sums_EO = local_NO.new_zeros(num_experts, *local_NO.shape[1:])
    first, end = held
    for experts, rows in in_turns(owner_R[first:end]):
        to, of = (torch.from_numpy(index).to(local_NO.device) for index in (experts, rows))
        sums_EO[to] += local_NO[of]  # none of them twice
    return sums_EO
