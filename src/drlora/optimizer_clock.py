"""Adam's bias correction for rows that wake up late.

Adam divides its moments by 1 - beta ** t, with one step count t for a whole parameter. A row that
is claimed after step b has moments that started from zero at b, so with t instead of n = t - b its
steps are too large: by (1 - b1) / sqrt(1 - b2) = 3.16 at its first step, and by up to 6.5 in the
tenth to twentieth if its gradient keeps its sign. Here each such row gets the update it would have
had from an Adam of its own that started at b: the moments are right as they are, only the
correction of the bias is not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

# Beyond this the two corrections differ by less than 5e-5 and the row is grown up.
_NEGLIGIBLE_BIAS = 1e-4


def unwrap_optimizer(optimizer: object) -> object:
    """The innermost optimizer under wrappers such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def keeps_adam_moments(optimizer: object) -> bool:
    """Whether the optimizer's step is Adam's and its moments can be read row by row."""
    return isinstance(optimizer, (Adam, AdamW))


def parameter_groups(optimizer: Optimizer) -> dict[Tensor, dict]:
    """Parameter -> the optimizer's group that holds it."""
    return {p: group for group in optimizer.param_groups for p in group["params"]}


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
    moment = state["exp_avg"].index_select(0, rows)
    denominator = _second_moment(state, group, rows).sqrt_()
    age_R1 = (step - birth_R.index_select(0, rows)).to(torch.float64)[:, None]

    def factors(count: Tensor) -> tuple[Tensor, Tensor]:
        bias1, bias2 = 1 - beta1**count, 1 - beta2**count
        return (group["lr"] / bias1).to(moment.dtype), bias2.sqrt().to(moment.dtype)

    shared_lr, shared_root = factors(torch.full_like(age_R1, step))
    own_lr, own_root = factors(age_R1)
    made = shared_lr * moment / (denominator / shared_root).add_(group["eps"])
    wanted = own_lr * moment / (denominator / own_root).add_(group["eps"])
    sign = -1.0 if group.get("maximize") else 1.0
    parameter.index_add_(0, rows, (made - wanted).to(parameter.dtype), alpha=sign)


def _second_moment(state: dict, group: dict, rows: Tensor) -> Tensor:
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    return state[key].index_select(0, rows)


def young_rows(birth_R: Tensor, step: int, beta2: float) -> Tensor:
    """Rows that were claimed after the start and whose bias is not yet negligible."""
    age_R = step - birth_R
    young_R = (birth_R > 0) & (age_R > 0) & (beta2 ** age_R.double() > _NEGLIGIBLE_BIAS)
    return young_R.nonzero().squeeze(1)
