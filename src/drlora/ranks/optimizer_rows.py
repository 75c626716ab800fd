"""What an optimizer keeps of rows, and how that is changed when rows change hands.

The optimizers are torch's own interface: `state` holds tensors of the shape of a parameter
(momentum, Adam's moments) beside numbers for the whole parameter, `param_groups` its settings.
Where an engine has split parameters (FSDP2, ZeRO), each process handles the rows it holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from drlora.adapter.row_book import IntArray, in_turns
from drlora.distributed.held import (
    Block,
    add_up_rows,
    blocks_of,
    row_width,
    trained_tensor,
)
from drlora.distributed.zero import is_partitioned, zero_of
from drlora.ranks.eight_bits import FIRST, SECOND, numbers_of

# Names under which optimizers keep, for each weight, what they have observed of its gradient ...
MOMENTS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"),
        *("grad_avg", "acc_delta", "sum", "prev", "exp_avg_diff", "pre_grad", "hessian", "s"),
        *("exp_avg_res", "exp_avg_var", "mu_product", FIRST, SECOND),
    }
)
# ... and weights: other iterates, averages of them, copies in more bits, and where they began.
WEIGHTS = frozenset(
    {
        *("z", "ax", "p0", "slow_buffer", "slow_param", "slow_params", "slow_weights", "ema"),
        *("master_param", "master_params", "master_weight", "master_weights", "fp32_param"),
    }
)

_STEP_SIZE = "step_size"  # of Rprop, for each weight; that of a free row is as it began


def unwrap_optimizer(optimizer: object) -> object:
    """The innermost optimizer under wrappers such as accelerate's and DeepSpeed's."""
    if (zero := zero_of(optimizer)) is not None:
        optimizer = zero.optimizer
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


def state_of(optimizer: Optimizer, parameter: Tensor) -> dict:
    """What an optimizer keeps of a parameter, laid out as the tensor that it trains.

    Under ZeRO that is of several parameters; and of others, where it trains nothing of this one,
    so that every process knows what there is.
    """
    trained = trained_tensor(parameter)
    if trained is None:
        return next(iter(optimizer.state.values()), {})
    return optimizer.state.get(trained, {})


def steps_taken(optimizer: object, parameter: Tensor) -> int:
    """How many steps an optimizer says it took of a parameter; 0 where it does not count them."""
    if not isinstance(optimizer, Optimizer):
        return 0
    count = state_of(optimizer, parameter).get("step", 0)
    return int(count) if isinstance(count, (int, float, Tensor)) else 0


@torch.no_grad()
def forget_rows(parameter: Tensor, state: dict, rows: Tensor) -> list[str]:
    """Zero what an optimizer has observed of some rows (moments, momentum), per element.

    Those of free rows are zero already unless the optimizer fed weight decay into its moments.
    What is no observation but weights (`WEIGHTS`) is left to `restart_weights`.

    Returns:
        Names that are known as neither, and were not zero.
    """
    blocks, unknown = blocks_of(parameter), []
    for name, value in state.items():
        if name in WEIGHTS or name == _STEP_SIZE:
            continue
        if not (_is_of(value, parameter) and value.is_floating_point()):
            continue
        if name not in MOMENTS and any(bool(_rows_of(b, value, rows).any()) for b in blocks):
            unknown.append(name)
        _forget(blocks, value, rows)
    for name in (FIRST, SECOND):
        if _is_of(state.get(name), parameter) and not state[name].is_floating_point():
            with numbers_of(state, name) as moment:
                if moment is not None:
                    _forget(blocks, moment, rows)
    return unknown


@torch.no_grad()
def restart_weights(parameter: Tensor, state: dict, rows: Tensor) -> None:
    """Set what an optimizer keeps as weights to what some rows hold: they begin there."""
    trained = trained_tensor(parameter)
    for name in WEIGHTS & state.keys():
        value = state[name]
        if trained is None or not (_is_of(value, parameter) and value.is_floating_point()):
            continue
        for block in blocks_of(parameter):
            own, local = _rows_of(block, trained, rows), block.of(value)
            local[block.held(rows).local.to(local.device)] = own.to(local)


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
    blocks, width = blocks_of(parameter), row_width(parameter)

    def inherit(moment: Tensor) -> None:
        sums_EO = torch.zeros(num_experts, width, device=owner_R.device, dtype=moment.dtype)
        for block in blocks:
            _add_up(sums_EO, block, block.of(moment), older)
        add_up_rows(parameter, sums_EO)
        means_EO = sums_EO / counts_E1
        for block in blocks:
            local, held = block.of(moment), block.held(rows)
            inherited = means_EO[owner_R[rows[held.chosen]].long()][:, block.columns]
            local[held.local.to(local.device)] = inherited.to(local.device).view_as(
                local[held.local.to(local.device)]
            )

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
    if not isinstance(value, Tensor) or not is_plain:
        return False
    if is_partitioned(parameter):  # a flat tensor's, of any length where nothing of it is here
        trained = trained_tensor(parameter)
        return value.dim() == 1 if trained is None else value.shape == trained.shape
    return value.shape == parameter.shape


def _rows_of(block: Block, value: Tensor, rows: Tensor) -> Tensor:
    local = block.of(value)
    return local[block.held(rows).local.to(local.device)]


def _forget(blocks: Iterable[Block], value: Tensor, rows: Tensor) -> None:
    for block in blocks:
        local = block.of(value)
        local[block.held(rows).local.to(local.device)] = 0


def _add_up(sums_EO: Tensor, block: Block, local_NO: Tensor, owner_R: IntArray) -> None:
    """Add the rows of each expert that are held in a block to its sums, in the order of the rows.

    Turn by turn, so that the order is the same on every device; `index_add_` leaves it open.
    """
    for experts, rows in in_turns(owner_R[block.first : block.end]):
        to = torch.from_numpy(experts).to(sums_EO.device)
        of = torch.from_numpy(rows).to(local_NO.device)
        added = local_NO[of].to(sums_EO.device).flatten(1)
        sums_EO[to, block.columns] += added  # none of them twice
