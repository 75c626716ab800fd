"""How a claimed row starts: what is known of it, what the optimizer keeps of it, where A points.

A row begins like one of a new adapter, whatever weight decay or an earlier owner did to it. What an
Adam makes of it afterwards, step by step, is corrected in young_rows.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.optim import Optimizer

from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.config.registry import ALLOCATIONS
from drlora.distributed.held import trained_tensor
from drlora.ranks.directions import lay_missing, point_along_gradient, turn_apart
from drlora.ranks.eight_bits import has_eight_bits
from drlora.ranks.event_probe import Sketches
from drlora.ranks.optimizer_rows import (
    decays_weights,
    forget_rows,
    inherit_second_moment,
    is_adam,
    restart_weights,
    state_of,
    unwrap_optimizer,
)
from drlora.ranks.policies.policy import ROW_OPTIONS
from drlora.ranks.schedule import StepCounts


class RowStarter:
    """Starts the rows that are claimed over a run, as its settings say.

    Args:
        config: the settings.
        optimizer: that of the run. Without one, or with one that is none of torch's, only what is
            known of the rows starts anew.

    Attributes:
        sketches: pool -> (E, P, I) sketches of the gradient, with young_a=probe.
    """

    def __init__(self, config: DrLoraConfig, optimizer: object) -> None:
        self.config = config
        inner = unwrap_optimizer(optimizer)
        self.optimizer = inner if isinstance(inner, Optimizer) else None
        self.sketches: Sketches = {}
        self._warned: set[str] = set()

    def start(self, pool: RankPool, rows: Tensor, now: StepCounts) -> None:
        """Start rows that were just claimed.

        Args:
            pool: theirs.
            rows: int64, the claimed rows; none where no expert was granted any.
            now: where the run is.
        """
        self._restart_importance(pool, rows)
        if self.optimizer is None or not len(rows):
            return
        self.forget(pool, rows)
        if self._rows_inherit:
            self._inherit(pool, rows)
        states = [self._state_of(parameter) for parameter in (pool.lora_A, pool.lora_B)]
        if decays_weights(self.optimizer.param_groups) or any(map(has_eight_bits, states)):
            pool.redraw(rows, now.run)
        young_a = self.config.options.get("young_a")
        if young_a == "gradient":
            self._point_rows(pool, rows)
        elif young_a == "probe":
            sketch_EPI = self.sketches[pool].cpu()
            lay_missing(
                pool.lora_A, pool.owner, rows, self._length(pool), lambda e, _: sketch_EPI[e]
            )
        elif young_a == "orthogonal":
            pool.redraw(rows, now.run)
            turn_apart(pool.lora_A, pool.owner, rows, self._length(pool))
        self._restart_weights(pool, rows)

    def forget(self, pool: RankPool, rows: Tensor) -> None:
        """Have the optimizer know nothing of rows but what they hold now."""
        unknown: set[str] = set()
        for parameter in (pool.lora_A, pool.lora_B) if self.optimizer else ():
            unknown |= {*forget_rows(parameter, self._state_of(parameter), rows)}
        self._restart_weights(pool, rows)
        if unknown:
            self._warn_once(
                "state",
                f"{type(self.optimizer).__name__} keeps {sorted(unknown)} for each weight, which "
                f"drlora does not know: rows that change hands begin with zeros there, as is right "
                f"for averages of gradients. If they are weights, train with another optimizer.",
            )

    def _restart_weights(self, pool: RankPool, rows: Tensor) -> None:
        for parameter in (pool.lora_A, pool.lora_B) if self.optimizer else ():
            restart_weights(parameter, self._state_of(parameter), rows)

    def _restart_importance(self, pool: RankPool, rows: Tensor) -> None:
        """The averages of all rows that the grown experts own, or of all, begin at 0 again."""
        if self.config.options.get("importance_reset") == "all":
            pool.importance.zero_()
            return
        # The extra last entry stands for the free rows, whose owner is -1.
        grown_E1 = torch.zeros(pool.book.num_experts + 1, dtype=torch.bool)
        grown_E1[pool.book.owner_R[rows.cpu().numpy()]] = True
        pool.importance[grown_E1.to(pool.owner.device)[pool.owner.long()]] = 0.0

    @property
    def _rows_inherit(self) -> bool:
        mode = self.config.young_rows
        return mode == "inherit" or (mode == "own" and not is_adam(self.optimizer))

    def _inherit(self, pool: RankPool, rows: Tensor) -> None:
        for parameter in (pool.lora_A, pool.lora_B):
            state, num_experts = self._state_of(parameter), pool.book.num_experts
            if not inherit_second_moment(parameter, state, pool.owner, num_experts, rows):
                self._warn_of_no_second_moment()

    def _point_rows(self, pool: RankPool, rows: Tensor) -> None:
        """An average of the gradient, where the optimizer keeps one; else that of this step."""
        state, trained = self._state_of(pool.lora_A), trained_tensor(pool.lora_A)
        gradient = state.get("exp_avg", state.get("momentum_buffer", pool.lora_A.grad))
        if (
            not isinstance(gradient, Tensor)
            or trained is not None
            and (gradient.shape != trained.shape)
        ):
            self._warn_once(
                "young_a",
                f"young_a='gradient' found no gradient of rows in {type(self.optimizer).__name__}: "
                f"young rows of A stay random.",
            )
            return
        held = None if trained is None else gradient
        point_along_gradient(pool.lora_A, held, pool.owner, rows, self._length(pool))

    def _length(self, pool: RankPool) -> float:
        return pool.row_norm * float(self.config.option("young_a_scale"))

    def _state_of(self, parameter: Tensor) -> dict:
        assert self.optimizer is not None
        return state_of(self.optimizer, parameter)

    def _warn_of_no_second_moment(self) -> None:
        name = type(self.optimizer).__name__
        if name != "SGD":
            self._warn_once(
                "optimizer",
                f"{name} has no second moment per element (exp_avg_sq): with "
                f"young_rows={self.config.young_rows!r} rows that wake up late are treated as "
                f"with 'shared', and may take larger first steps.",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            warnings.warn(message, stacklevel=8)
        self._warned.add(kind)


def warn_of_idle_options(config: DrLoraConfig) -> None:
    """Name what is asked of rows that wake up late where none does."""
    if ALLOCATIONS[config.allocation].changes_ranks(config):
        return
    idle = [
        f"{name}={config.options[name]!r}"
        for name, option in ROW_OPTIONS.items()
        if config.options.get(name, option.default) != option.default
    ]
    if idle:
        warnings.warn(
            f"options {', '.join(idle)} change nothing: no rank grows with r_init="
            f"{config.r_init}, r_target={config.r_target} and move_share=0.",
            stacklevel=4,
        )
