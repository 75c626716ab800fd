"""The life of ranks over a run: observe, score, allocate, grow.

    dynamics = RankDynamics(model, total_steps=n)
    loss.backward()
    dynamics.before_optimizer_step()           # signals, from the gradients at hand
    optimizer.step()
    dynamics.after_optimizer_step(optimizer)   # growth, before the scheduler steps

One step of a grant: the blocks' meters and gradients (observe) become f and g (saliency), these
become grants (allocator) when the plan says so (schedule), and the pools claim rows (layer).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from drlora.allocator import allocate
from drlora.config import DrLoraConfig
from drlora.errors import CheckpointError, ConfigError
from drlora.inject import active_adapter, adapted_layers
from drlora.layer import ExpertsAdapter, RankPool
from drlora.saliency import RULES, Signals, ema, expert_sums, rank_importance, routed_share
from drlora.schedule import GrowthPlan, plan_growth
from drlora.young_rows import (
    OwnClocks,
    decays_weights,
    forget_rows,
    inherit_second_moment,
    is_adam,
    unwrap_optimizer,
)


@dataclass(frozen=True)
class Grant:
    """Ranks that one expert was given at an event, and the signals that decided it.

    `projection` names the projections that grew together, joined by "+"; `rank` is the rank after
    the grant; `routing`, `importance` and `saliency` are f, g and S just before it.
    """

    step: int
    block: str
    projection: str
    expert: int
    granted: int
    rank: int
    routing: float
    importance: float
    saliency: float


@dataclass(frozen=True)
class _Group:
    """Pools of one block whose experts share a rank and compete for one quota."""

    block: str
    adapter: ExpertsAdapter
    projections: tuple[str, ...]
    plan: GrowthPlan

    @property
    def pools(self) -> list[RankPool]:
        return [self.adapter.rank_pools[name] for name in self.projections]

    def ranks(self) -> list[int]:
        return self.pools[0].book.ranks().tolist()

    def importance(self) -> Tensor:
        """(E,) g_i: the mean over the rows that the expert owns in all of the group's pools."""
        num_experts = self.adapter.block.num_experts
        sums = [expert_sums(p.importance, p.owner, num_experts) for p in self.pools]
        counts = torch.tensor(self.ranks(), device=sums[0].device) * len(self.pools)
        return sum(sums[1:], start=sums[0]) / counts.clamp(min=1)


class RankDynamics:
    """Grows the ranks of one adapter over a run of `total_steps` optimizer steps.

    Args:
        model: a PeftModel (or any model with injected adapters) that carries a DR-LoRA adapter.
        total_steps: optimizer steps of the whole run.
        adapter: its name; by default the model's active adapter.

    Attributes:
        step: optimizer steps taken so far.

    Raises:
        ConfigError: if the model has no such adapter, or the settings cannot reach the budget.
    """

    def __init__(self, model: nn.Module, total_steps: int, adapter: str | None = None) -> None:
        self.adapter_name = adapter or active_adapter(model)
        self.config = _config_of(model, self.adapter_name)
        self.total_steps = total_steps
        self.step = 0
        self.adapters: dict[str, ExpertsAdapter] = {
            name: layer.adapter(self.adapter_name)
            for name, layer in adapted_layers(model, self.adapter_name).items()
        }
        _refuse_unplaced(self.config, self.budget()[0])
        self.groups = list(self._make_groups())
        self.warmup_steps = self.config.resolve_warmup(total_steps)
        self._router_parameters = list(_router_parameters(model, self.adapters, self.adapter_name))
        self._hooks = [p.register_hook(self._hold_router) for p in self._router_parameters]
        self._clocks = OwnClocks()
        self._warned: set[str] = set()

    @property
    def event_steps(self) -> tuple[int, ...]:
        """The steps after which ranks grow."""
        return self.groups[0].plan.event_steps

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Take the signals of this step; call it when all gradients are in place, once a step.

        Under gradient accumulation that is after the last backward pass, under a GradScaler after
        `unscale_`. Gradients that are not finite leave the averages as they were.
        """
        self._update_frequencies()
        for pool in self._pools():
            self._update_importance(pool)
        if self.step < self.warmup_steps:
            for parameter in self._router_parameters:
                # Not a zero gradient: weight decay and Adam's step count must not run either.
                parameter.grad = None

    @torch.no_grad()
    def after_optimizer_step(
        self, optimizer: object = None, *, skipped: bool = False
    ) -> list[Grant]:
        """Count the step and, if it is an event, grow; call it before the scheduler steps.

        Args:
            optimizer: the optimizer that stepped; its Adam moments correct the updates of young
                rows. Without it they keep the shared step count.
            skipped: whether a GradScaler skipped the step; then it does not count.

        Returns:
            The grants of this step, empty if it was no event.
        """
        if skipped:
            return []
        if self.step == 0:
            # Births of an earlier run that the adapter was saved from; its optimizer is not this.
            for pool in self._pools():
                pool.birth.zero_()
        self.step += 1
        inner = unwrap_optimizer(optimizer)
        if self.config.young_rows == "own" and is_adam(inner):
            self._clocks.correct(inner, self._pools(), self.step)
        return [grant for group in self.groups for grant in self._grow(group, optimizer)]

    def release(self) -> None:
        """Let go of the model: nothing of this object acts on it any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def ranks(self) -> dict[str, dict[str, list[int]]]:
        """Block -> projection -> rank of each expert."""
        return {name: adapter.ranks() for name, adapter in self.adapters.items()}

    def budget(self) -> tuple[int, int]:
        """Ranks owned, and rows stored, over all blocks and projections."""
        stored = sum(len(pool.book.owner_R) for pool in self._pools())
        return stored - sum(pool.book.free for pool in self._pools()), stored

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that growth depends on, as tensors: step, owners and running averages."""
        return {"step": torch.tensor(self.step)} | {
            key: buffer.detach().clone() for key, buffer in self._buffers()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: if the state belongs to other blocks, projections or sizes; nothing
                is changed then.
        """
        buffers = dict(self._buffers())
        if set(state) != {"step", *buffers}:
            odd = sorted(set(state) ^ {"step", *buffers})[:4]
            raise CheckpointError(
                f"the state belongs to another adapter: {odd} do not match. Make RankDynamics for "
                f"the model and configuration that the state was saved with."
            )
        for key, buffer in buffers.items():
            if state[key].shape != buffer.shape:
                raise CheckpointError(
                    f"{key} has shape {tuple(state[key].shape)} in the state but "
                    f"{tuple(buffer.shape)} in this model."
                )
        for key, buffer in buffers.items():
            buffer.copy_(state[key])
        for pool in self._pools():
            pool.read_owners()
        self.step = int(state["step"])

    def _make_groups(self) -> Iterator[_Group]:
        for name, adapter in self.adapters.items():
            projections = tuple(adapter.pools)
            together = self.config.rank_per == "expert"
            for group in [projections] if together else [(one,) for one in projections]:
                start = _start_of(adapter.rank_pools[group[0]])
                experts = adapter.block.num_experts
                plan = plan_growth(self.config, experts, self.total_steps, start)
                yield _Group(name, adapter, group, plan)

    def _pools(self) -> list[RankPool]:
        return [pool for a in self.adapters.values() for pool in a.rank_pools.values()]

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, adapter in self.adapters.items():
            yield f"{name}.frequency", adapter.frequency
            for projection, pool in adapter.rank_pools.items():
                for key in ("owner", "importance", "birth", "seed"):
                    yield f"{name}.{projection}.{key}", getattr(pool, key)

    def _update_frequencies(self) -> None:
        """f of every block, from sums over the tokens of all micro-batches and processes."""
        adapters = list(self.adapters.values())
        device = adapters[0].meter.sum_E.device
        sums = torch.cat(
            [torch.cat([a.meter.sum_E, a.meter.num_tokens[None]]).to(device) for a in adapters]
        )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        for adapter, sums_E1 in zip(
            adapters, sums.split([a.block.num_experts + 1 for a in adapters]), strict=True
        ):
            share_E = routed_share(sums_E1[:-1], sums_E1[-1]).to(adapter.frequency.device)
            adapter.frequency.copy_(ema(adapter.frequency, share_E, self.config.beta))
            adapter.meter.reset()

    def _update_importance(self, pool: RankPool) -> None:
        if pool.lora_A.grad is None or pool.lora_B.grad is None:
            return
        importance_R = rank_importance(pool.lora_A, pool.lora_A.grad, pool.lora_B, pool.lora_B.grad)
        if hasattr(importance_R, "full_tensor"):  # sharded parameters (FSDP2)
            importance_R = importance_R.full_tensor()
        pool.importance.copy_(ema(pool.importance, importance_R, self.config.beta))

    def _grow(self, group: _Group, optimizer: object) -> list[Grant]:
        event = group.plan.event_number(self.step)
        if not event:
            return []
        frequency_E, importance_E = group.adapter.frequency, group.importance()
        before = group.ranks()
        ranks_E = torch.tensor(before, device=frequency_E.device)
        seed = int(group.pools[0].seed) + self.step
        signals = Signals(frequency_E, importance_E, ranks_E, self.config.gamma, seed)
        saliency_E = RULES[self.config.saliency](signals).tolist()
        if not any(saliency_E):
            self._warn_once(
                f"{group.block}: at step {self.step} no expert has any saliency, so ranks go by "
                f"expert number. Was the model in training mode, and before_optimizer_step called "
                f"before the gradients were cleared?"
            )
        spent = sum(before) - len(before) * self.config.r_init
        grants = allocate(
            saliency_E,
            ranks=before,
            quota=group.plan.due(event) - spent,
            cap=self.config.grant_cap,
            r_max=self.config.r_max,
        )
        for pool in group.pools:
            rows = pool.grant(grants, self.step)
            self._restart_importance(pool, grants)
            self._start_rows(pool, rows, unwrap_optimizer(optimizer))
        return [
            Grant(self.step, group.block, "+".join(group.projections), expert, granted,
                  before[expert] + granted, f, g, s)
            for expert, (granted, f, g, s) in enumerate(
                zip(grants, frequency_E.tolist(), importance_E.tolist(), saliency_E, strict=True)
            )
            if granted
        ]  # fmt: skip

    def _start_rows(self, pool: RankPool, rows: Tensor, optimizer: object) -> None:
        """Claimed rows begin like those of a new adapter, whatever weight decay did to them."""
        if not isinstance(optimizer, torch.optim.Optimizer) or not len(rows):
            return
        for parameter in (pool.lora_A, pool.lora_B):
            state = optimizer.state.get(parameter, {})
            forget_rows(parameter, state, rows)
            if self._rows_inherit(optimizer) and not inherit_second_moment(
                parameter, state, pool.owner, pool.book.num_experts, rows
            ):
                self._warn_unknown(optimizer)
        if decays_weights(optimizer.param_groups):
            pool.redraw(rows, self.step)

    def _restart_importance(self, pool: RankPool, grants: list[int]) -> None:
        if self.config.importance_reset == "all":
            pool.importance.zero_()
            return
        # The extra last entry stands for the free rows, whose owner is -1.
        grown_E1 = torch.tensor([*(granted > 0 for granted in grants), False])
        pool.importance[grown_E1.to(pool.owner.device)[pool.owner.long()]] = 0.0

    def _rows_inherit(self, optimizer: object) -> bool:
        mode = self.config.young_rows
        return mode == "inherit" or (mode == "own" and not is_adam(optimizer))

    def _warn_unknown(self, optimizer: object) -> None:
        if type(optimizer).__name__ != "SGD":
            self._warn_once(
                f"{type(optimizer).__name__} has no second moment per element (exp_avg_sq): with "
                f"young_rows={self.config.young_rows!r} rows that wake up late are treated as "
                f"with 'shared', and may take larger first steps."
            )

    def _warn_once(self, message: str) -> None:
        kind = message.split(":")[-1]
        if kind not in self._warned:
            warnings.warn(message, stacklevel=4)
        self._warned.add(kind)

    def _hold_router(self, grad: Tensor) -> Tensor:
        """During the warm-up the router's gradient must not weigh in gradient clipping either."""
        return torch.zeros_like(grad) if self.step < self.warmup_steps else grad


def _refuse_unplaced(config: DrLoraConfig, owned: int) -> None:
    if config.start != "uniform" and not owned:
        raise ConfigError(
            f"start={config.start!r}, but no ranks are placed yet; call "
            f"drlora.place_ranks(model, batches) with a few batches of the training data first."
        )


def _start_of(pool: RankPool) -> list[int] | None:
    """The ranks of a run that begins; None where one is under way, which was checked then."""
    return None if pool.importance.any() else pool.book.ranks().tolist()


def _config_of(model: nn.Module, adapter: str) -> DrLoraConfig:
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter)
    if not isinstance(config, DrLoraConfig):
        kinds = {name: type(c).__name__ for name, c in configs.items()}
        raise ConfigError(
            f"adapter {adapter!r} is no DR-LoRA adapter; the model's adapters are {kinds}."
        )
    return config


def _router_parameters(
    model: nn.Module, adapters: Mapping[str, ExpertsAdapter], adapter_name: str
) -> Iterator[nn.Parameter]:
    """The trained copies of the routers of the adapted blocks."""
    routers = {a.block.router_name for a in adapters.values() if a.config.router == "train"}
    inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in inner.named_modules():
        if name in routers and isinstance(module, ModulesToSaveWrapper):
            yield from module.modules_to_save[adapter_name].parameters()
