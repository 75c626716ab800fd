"""The life of ranks over a run: observe, score, allocate, grow.

    dynamics = RankDynamics(model, total_steps=n)
    loss.backward()
    dynamics.before_optimizer_step()           # signals, from the gradients at hand
    optimizer.step()
    dynamics.after_optimizer_step(optimizer)   # growth, before the scheduler steps

DeepSpeed's ZeRO shows its gradients to nobody but its own step: `dynamics.watch(engine.optimizer)`
once, and both calls after `engine.step()` (zero).

One step of a grant: the blocks' meters and gradients (observe) become f and g (saliency), these
become grants (allocator) when the plan says so (schedule), and the pools claim rows (layer).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields

import torch
from torch import Tensor, nn

from drlora.adapter.experts import ExpertsAdapter, refuse_unplaced
from drlora.adapter.inject import active_adapter, adapted_layers
from drlora.adapter.pool import RankPool
from drlora.adapter.router import TrainedRouters
from drlora.config.adapter import DrLoraConfig
from drlora.distributed import refuse_differing
from drlora.distributed.zero import refuse_without_zero, zero_of
from drlora.errors import CheckpointError, ConfigError
from drlora.ranks.averages import update_frequencies, update_importances
from drlora.ranks.event import Event, Growth
from drlora.ranks.first_step import trained_beside, warn_of_equal_rates, warn_of_unreached
from drlora.ranks.groups import schedule_for
from drlora.ranks.optimizer_rows import is_adam, steps_taken, unwrap_optimizer
from drlora.ranks.row_starter import warn_of_idle_options
from drlora.ranks.saliency import RANK_IMPORTANCES
from drlora.ranks.schedule import Schedule, StepCounts
from drlora.ranks.young_rows import OwnClocks
from drlora.ranks.zero import WatchedZero


class RankDynamics:
    """Grows the ranks of one adapter over a run of `total_steps` optimizer steps.

    Args:
        model: a PeftModel (or any model with injected adapters) that carries a DR-LoRA adapter.
        total_steps: optimizer steps of the whole run.
        adapter: its name; by default the model's active adapter.
        schedule: that of the run that is continued, where it is one; by default that which the
            adapter was trained by, if it is of `total_steps`, else one that is made from the
            settings and `total_steps`.
        step: steps that the run has taken: 0 for a new one, more for one that goes on. It may be
            left out for an adapter that was never trained, and where `load_state_dict` follows.
        skipped: steps that a GradScaler left out of it.

    Attributes:
        schedule: when ranks may change, and by how much: `auto` settings as they were chosen.
        step: optimizer steps taken so far.
        skipped: steps that a GradScaler left out so far.
        routers: those that the adapter trains; they are held during the warm-up.

    Raises:
        ConfigError: if the model has no such adapter, or the settings cannot reach the budget.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        adapter: str | None = None,
        schedule: Schedule | None = None,
        step: int | None = None,
        skipped: int = 0,
    ) -> None:
        self.adapter_name = adapter or active_adapter(model)
        self.config = _config_of(model, self.adapter_name)
        self.step = step or 0
        self.skipped = skipped
        self.adapters: dict[str, ExpertsAdapter] = {
            name: layer.adapter(self.adapter_name)
            for name, layer in adapted_layers(model, self.adapter_name).items()
        }
        refuse_unplaced(self.config, self.budget()[0])
        for found in self.adapters.values():
            found.meter.reset()  # of passes that no step of this run came of
        warn_of_idle_options(self.config)
        # Of an adapter that was trained, nobody can tell whether it is by this run.
        self._waits_for_step = step is None and self._has_history()
        begins = not self.step and not self._waits_for_step
        self._follow(schedule or schedule_for(self.adapters, self.config, total_steps, begins))
        self.routers = TrainedRouters(model, self.adapter_name)
        self.routers.hold(until=lambda: self.step >= self.warmup_steps)
        self._beside = trained_beside(model, self.adapter_name, self.routers.copies)
        self._clocks = OwnClocks()
        self._watched: WatchedZero | None = None
        # Counted on the device, so that an ordinary step does not make the host wait.
        self._poisoned: Tensor | bool = False
        self._poisoned_steps: Tensor | int = 0
        self._told_of_poison = False
        self._has_agreed = False
        self._optimizer_start: int | None = None  # of an earlier run

    def _follow(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.growth = Growth(self.adapters, self.config, schedule)
        self.growth.prepare(self.plan_step + 1)
        self.config.note(schedule=asdict(schedule))  # is saved with the adapter

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run that growth was planned for."""
        return self.schedule.total_steps

    @property
    def warmup_steps(self) -> int:
        """Steps before growth, and before trained routers train."""
        return self.schedule.warmup_steps

    @property
    def event_steps(self) -> tuple[int, ...]:
        """The steps after which ranks grow."""
        return self.growth.groups[0].plan.event_steps

    @property
    def run_step(self) -> int:
        """All steps of the run so far, the skipped ones included."""
        return self.step + self.skipped

    @property
    def plan_step(self) -> int:
        """How far the plan of growth is.

        Skipped steps hold it up by at most `settle_steps`; after that it goes on without them, so
        that every event takes place within `total_steps` steps, skipped or not.
        """
        return self.step + max(0, self.skipped - self.schedule.settle_steps)

    @property
    def poisoned_steps(self) -> int:
        """Steps that the optimizer took with gradients that were not finite, since this object was
        made; reading it waits for the device.
        """
        return int(self._poisoned_steps)

    def watch(self, optimizer: object) -> None:
        """Look on while DeepSpeed's ZeRO steps, once before the first step; else nothing happens.

        Args:
            optimizer: DeepSpeed's `engine.optimizer`, or a wrapper of it.

        Raises:
            ConfigError: if rows cannot be followed in this kind of ZeRO, or DeepSpeed trains
                without ZeRO.
        """
        zero = zero_of(optimizer)
        if zero is None:
            refuse_without_zero(optimizer)
            return
        if self._watched is not None:
            self._watched.let_go()
        self._watched = WatchedZero(
            zero,
            self._pools(),
            self.routers,
            has_own_clocks=self.config.young_rows == "own",
            is_signed=RANK_IMPORTANCES[self.config.option("rank_importance")].is_signed,
            count=lambda: self.step + 1 + self._start_of(zero.optimizer),
            end_of_warmup=lambda: self.warmup_steps + self._start_of(zero.optimizer),
        )

    @property
    def is_watching(self) -> bool:
        """Whether DeepSpeed's ZeRO trains the adapter, and is watched."""
        return self._watched is not None

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Take the signals of this step; call it when all gradients are in place, once a step.

        Under gradient accumulation that is after the last backward pass, under a GradScaler after
        `unscale_`. If the gradient of any row is not finite, the importance of all rows stays as it
        was: clipping has turned the other gradients of such a step into zeros.

        Raises:
            ConfigError: if the adapter was trained before, and nothing says where this run is; or
                if DeepSpeed keeps the gradients to itself.
        """
        self._refuse_unknown_step()
        update_frequencies(list(self.adapters.values()), self.config)
        device = next(iter(self.adapters.values())).frequency.device
        sums = None if self._watched is None else self._watched.take_sums(device)
        self._poisoned = update_importances(self._pools(), self.config, sums)
        self.routers.skip_step()
        if not self.run_step and self._watched is None:
            warn_of_unreached(self._beside)

    @torch.no_grad()
    def after_optimizer_step(self, optimizer: object = None, *, skipped: bool = False) -> Event:
        """Count the step and, if the plan has an event, grow; call it before the scheduler steps.

        Args:
            optimizer: the optimizer that stepped; its Adam moments correct the updates of young
                rows. Without it they keep the shared step count.
            skipped: whether a GradScaler left the step out. It does not count then, until more
                than `settle_steps` are skipped: then the plan goes on without them.

        Returns:
            The changes of rank in this step as a sequence of `Grant`, empty if it was no event; its
            `scored` is what was known of the experts.

        Raises:
            ConfigError: if the adapter was trained before, and nothing says where this run is.
            SyncError: at the first step and at every event, if the processes of the run differ in
                ranks or in what decides them.
        """
        self._refuse_unknown_step()
        before = self.plan_step
        if skipped or (self._watched is not None and self._watched.was_skipped):
            self.skipped += 1
        else:
            self._count_step(optimizer)
        if not self._has_agreed:
            self._agree()
        if self.plan_step == before or not self.growth.is_event(self.plan_step):
            self.growth.prepare(self.plan_step + 1)
            return Event()
        self._agree()
        taken = self._optimizer_count
        event = self.growth.event(StepCounts(self.plan_step, taken, self.run_step), optimizer)
        self._agree()
        self.growth.prepare(self.plan_step + 1)
        if event.grants:
            self.warn_of_poison()
        return event

    def warn_of_poison(self) -> None:
        """Say, once, that the optimizer took steps with gradients that were not finite."""
        if not self._told_of_poison and self.poisoned_steps:
            self._told_of_poison = True
            warnings.warn(
                f"{self.poisoned_steps} of the {self.step} steps so far had gradients that are NaN "
                f"or infinite. They were left out of the importance of ranks, but the optimizer "
                f"took them, and the weights may be NaN now.",
                stacklevel=3,
            )

    @property
    def _optimizer_count(self) -> int:
        """Steps that the optimizer took, as it counts them."""
        return self.step + (self._optimizer_start or 0)

    def _has_history(self) -> bool:
        return any(bool(pool.importance.any() or pool.birth.any()) for pool in self._pools())

    def _refuse_unknown_step(self) -> None:
        if self._waits_for_step and not self.step:
            raise ConfigError(
                f"adapter {self.adapter_name!r} was trained before, and RankDynamics was not told "
                f"whether that is part of this run: give step=0 if a new run begins, step=n if it "
                f"goes on after n steps, or call load_state_dict with what state_dict gave then."
            )
        self._waits_for_step = False

    def _count_step(self, optimizer: object) -> None:
        """A step that the optimizer took."""
        inner = unwrap_optimizer(optimizer)
        start = self._start_of(inner)
        if self.step == 0:
            # Births of a run that the adapter was saved from, unless its optimizer goes on.
            for pool in self._pools() if not start else ():
                pool.forget_births()
            warn_of_equal_rates(optimizer, self._pools()[0], self.config)
        self.step += 1
        if self._watched is None and self.config.young_rows == "own" and is_adam(inner):
            self._clocks.correct(inner, self._pools(), self._optimizer_count)
        self._poisoned_steps = self._poisoned_steps + self._poisoned

    def _start_of(self, inner: object) -> int:
        """How many steps the optimizer had taken when the run began; asked after its first here.

        Less than 0 where it was made anew for a run that goes on. To its moments, rows that were
        there before it are old.
        """
        if self._optimizer_start is None:
            taken = steps_taken(inner, self._pools()[0].lora_A)
            self._optimizer_start = taken - self.step - 1 if taken else 0
            for pool in self._pools() if self._optimizer_start < 0 else ():
                pool.forget_births(after=taken - 1)
        return self._optimizer_start

    def _agree(self) -> None:
        """Refuse to go on if the processes have come apart.

        The owners are those of the host, which decide what is computed: under DDP the buffers are
        sent out anew by the first process at every step, and a difference would not show there.
        """
        pools, adapters = self._pools(), list(self.adapters.values())
        refuse_differing(
            self.run_step,
            {
                "steps": [torch.tensor([self.step, self.skipped])],
                "ranks": [torch.from_numpy(pool.book.owner_R) for pool in pools],
                "routing statistics": [adapter.frequency for adapter in adapters],
                "rank importance": [
                    s for p in pools for s in (p.importance, p.uncertainty) if s is not None
                ],
                "births and seeds of rows": [b for p in pools for b in (p.birth, p.seed)],
            },
            adapters[0].frequency.device,
        )
        self._has_agreed = True

    def release(self) -> None:
        """Let go of the model: nothing of this object acts on it any more."""
        self.routers.let_go()
        self.growth.release()
        if self._watched is not None:
            self._watched.let_go()
            self._watched = None

    def ranks(self) -> dict[str, dict[str, list[int]]]:
        """Block -> projection -> rank of each expert."""
        return {name: adapter.ranks() for name, adapter in self.adapters.items()}

    def budget(self) -> tuple[int, int]:
        """Ranks owned, and rows stored, over all blocks and projections."""
        stored = sum(len(pool.book.owner_R) for pool in self._pools())
        return stored - sum(pool.book.free for pool in self._pools()), stored

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that growth depends on, as tensors: step, owners and running averages."""
        steps = {"step": torch.tensor(self.step), "skipped": torch.tensor(self.skipped)}
        steps["schedule"] = torch.tensor([*asdict(self.schedule).values()])
        return steps | {key: buffer.detach().clone() for key, buffer in self._buffers()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`, also with its schedule, whatever `total_steps` is here.

        Raises:
            CheckpointError: if the state belongs to other blocks, projections or sizes; nothing
                is changed then.
        """
        buffers = dict(self._buffers())
        odd = sorted((set(state) ^ {"step", *buffers}) - {"skipped", "schedule"})[:4]
        if odd:
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
        for name, adapter in self.adapters.items():
            adapter.frequency.copy_(state[f"{name}.frequency"])
            for projection, pool in adapter.rank_pools.items():
                place = f"{name}.{projection}."
                own = {key: state[place + key] for key in pool.state_keys}
                pool.load_state_dict(own, strict=False)  # weights are no part of it
        self.step = int(state["step"])
        self._waits_for_step, self._optimizer_start = False, None
        # States of version 0.1 do not have the two below.
        self.skipped = int(state.get("skipped", 0))
        if "schedule" in state:
            names = [field.name for field in fields(Schedule)]
            self._follow(Schedule(**dict(zip(names, state["schedule"].tolist(), strict=True))))

    def _pools(self) -> list[RankPool]:
        return [pool for a in self.adapters.values() for pool in a.rank_pools.values()]

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, adapter in self.adapters.items():
            yield f"{name}.frequency", adapter.frequency
            for projection, pool in adapter.rank_pools.items():
                for key in pool.state_keys:
                    yield f"{name}.{projection}.{key}", getattr(pool, key)


def _config_of(model: nn.Module, adapter: str) -> DrLoraConfig:
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter)
    if not isinstance(config, DrLoraConfig):
        kinds = {name: type(c).__name__ for name, c in configs.items()}
        raise ConfigError(
            f"adapter {adapter!r} is no DR-LoRA adapter; the model's adapters are {kinds}."
        )
    return config
