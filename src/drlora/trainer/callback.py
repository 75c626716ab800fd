"""DR-LoRA in transformers' Trainer (and TRL's trainers): one callback, nothing else to change.

    Trainer(model=peft_model, ..., callbacks=[drlora.DrLoraCallback()])

The callback owns a RankDynamics over the Trainer's steps, and writes `growth.jsonl`, one line a
grant, and `events.jsonl` (see drlora.trainer.event_log) into the output directory. Ranks and
statistics are buffers of the adapter, so the Trainer's own checkpoints carry them and
`resume_from_checkpoint` continues them; the step count, which a GradScaler can leave behind the
Trainer's, and the length that growth is planned for are kept in the checkpoint's
`trainer_state.json`, with the engines that were found by trial.

Where `train()` is called again, by the user or because auto_find_batch_size tries a smaller batch,
transformers counts steps from 0 again and goes on with the weights, and so do ranks and logs: the
logs count on, so that they tell how the ranks came about. Logs of an earlier program that trained
into the same folder, or of an earlier trial of `hyperparameter_search`, which has a model of its
own, are set aside as `growth-1.jsonl` and so on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from drlora.adapter.inject import active_adapter
from drlora.adapter.state import adapter_state
from drlora.distributed import are_several, wait_for_all
from drlora.errors import ConfigError
from drlora.io.checkpoint import seal
from drlora.io.jsonl import append_lines, forget_after, set_aside
from drlora.io.run_files import EVENT_LOG, GROWTH_LOG
from drlora.io.writing import sync
from drlora.ops.trial import found, remember
from drlora.ranks.dynamics import RankDynamics
from drlora.ranks.event import Grant
from drlora.ranks.optimizer_rows import unwrap_optimizer
from drlora.ranks.probe import Loss
from drlora.ranks.schedule import Schedule
from drlora.ranks.starts import needs_ranks, place_ranks
from drlora.trainer.best_model import load_best, refuse_mixed_up
from drlora.trainer.deepspeed import refuse_unfit_deepspeed
from drlora.trainer.event_log import EventLog
from drlora.trainer.rank_log import RankLog
from drlora.trainer.router_log import RouterLog


class DrLoraCallback(TrainerCallback, ExportableState):
    """Drives rank growth from the Trainer's events.

    Args:
        adapter: name of the DR-LoRA adapter; by default the model's active one.
        log_dir: where `growth.jsonl` and `events.jsonl` go; by default the Trainer's output
            directory.
        on_growth: called after each event with its grants.

    Attributes:
        dynamics: the RankDynamics, from the start of training on.
        loss: what ranks and rows of A are placed by, of the model and a batch; by default the
            model's own loss. Trainers that compute another have it as `compute_loss`.
        tells_of_length: whether it warns where a run that is resumed has another length than growth
            was planned for.
        ended_early: says whether a run that ends before its last step is over all the same, and is
            no run that was interrupted.
        log_start: steps of earlier calls of `train()`, which the logs count too.
    """

    def __init__(
        self,
        adapter: str | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        on_growth: Callable[[list[Grant]], None] | None = None,
    ) -> None:
        self.adapter = adapter
        self.log_dir = log_dir
        self.on_growth = on_growth
        self.dynamics: RankDynamics | None = None
        self.loss: Loss | None = None
        self.tells_of_length = True
        self.ended_early: Callable[[], bool] = lambda: False
        self.log_start = 0
        self._ended = False
        self._scale: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, or continue at the step that the Trainer resumed from.

        Raises:
            ConfigError: if the adapter is frozen, or cannot spend its budget in this run, or its
                ranks are to be placed and the data cannot be looked into, or DeepSpeed is to do
                what ranks cannot grow with, or the Trainer has left DDP out.
        """
        refuse_unfit_deepspeed(args, kwargs["model"])
        _refuse_without_ddp(args, kwargs["model"])
        saved = self._saved(state)
        remember(saved.get("engines", {}))
        if state.is_hyper_param_search:  # each trial has a model of its own
            self.begin_again()
        is_new = self.dynamics is None
        if self.dynamics is not None:
            if not self._ended and args.auto_find_batch_size:
                _tell_of_smaller_batch(state.train_batch_size, self.dynamics.run_step)
            self.log_start += self.dynamics.run_step
            self.dynamics.release()
        self._ended = False
        if state.global_step:
            self.log_start = saved.get("log_start", 0)
        model = kwargs["model"]
        if needs_ranks(model, self.adapter):
            batches = self._first_batches(args, **kwargs)
            optimizer = kwargs.get("optimizer")
            place_ranks(model, batches, self.adapter, optimizer=optimizer, loss=self.loss)
        planned = Schedule(**saved["schedule"]) if "schedule" in saved else None
        step = saved.get("step", state.global_step)
        self.dynamics = RankDynamics(
            model, state.max_steps, self.adapter, planned, step, state.global_step - step
        )
        _refuse_frozen(self.dynamics)
        self.dynamics.watch(kwargs.get("optimizer"))
        refuse_mixed_up(args, model, self.dynamics.adapter_name)
        self._tell_of_other_length(state.max_steps)
        _warn_of_longer_warmup(self.dynamics, args.get_warmup_steps(state.max_steps))
        self._log = Path(self.log_dir or args.output_dir or ".") / GROWTH_LOG
        self._events = EventLog(self._log.with_name(EVENT_LOG), self.dynamics, self.log_start)
        self._rank_log = RankLog(self.dynamics)
        self._router_log = RouterLog(self.dynamics, model)
        if state.is_world_process_zero:
            for log in (self._log, self._events.path):
                if is_new and not state.global_step:
                    set_aside(log)
                forget_after(log, self.log_start + state.global_step)

    def begin_again(self) -> None:
        """Forget the steps so far: weights and ranks were put back to where the run began."""
        if self.dynamics is not None:
            self.dynamics.release()
        self.dynamics = None
        self.log_start = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Signals, with all gradients in place."""
        assert self.dynamics is not None
        self._scale = _unscale(kwargs.get("optimizer"))
        self._rank_log.count_tokens()
        self._router_log.count()
        with self._rank_log.timed():
            self.dynamics.before_optimizer_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Growth, between the optimizer's step and the scheduler's."""
        assert self.dynamics is not None
        optimizer = kwargs.get("optimizer")
        skipped = bool(getattr(optimizer, "step_was_skipped", False)) or (
            # A fused optimizer skips on the device and accelerate does not hear of it.
            self._scale is not None and _scaler_of(optimizer).get_scale() < self._scale
        )
        with self._rank_log.timed():
            event = self.dynamics.after_optimizer_step(optimizer, skipped=skipped)
        self._rank_log.has_changed |= bool(event.grants)
        if event.grants and state.is_world_process_zero:
            lines = [asdict(grant) for grant in event.grants]
            append_lines(self._log, [{**g, "step": self.log_start + g["step"]} for g in lines])
            self._events.write_event(event)
        if event.grants and self.on_growth is not None:
            self.on_growth(list(event.grants))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the checkpoint its manifest, and bring the logs up to it to the disk."""
        folder = _just_saved(args, state)
        self._save_as_trained(kwargs.get("model"), folder, state)
        wait_for_all()  # each process has files of its own in it
        if state.is_world_process_zero:
            for log in (self._log, self._events.path):
                if log.exists():
                    sync(log)
            seal(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the callbacks that follow of ranks, and of steps that went wrong."""
        if self.dynamics is not None and logs is not None:
            counts = {
                "skipped_steps": self.dynamics.skipped,
                "poisoned_steps": self.dynamics.poisoned_steps,
            }
            logs.update({name: count for name, count in counts.items() if count})
            if "loss" in logs:
                logs.update(self._rank_log.entries() | self._router_log.entries())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what is known of experts now, and warn of steps with gradients that were not finite,
        if no event did.
        """
        assert self.dynamics is not None
        load_best(args, state, kwargs.get("model"), self.dynamics.adapter_name)
        self._ended = True
        is_over = state.global_step >= state.max_steps or self.ended_early()
        if state.is_world_process_zero and is_over:
            self._events.write_end()
        self.dynamics.warn_of_poison()

    def log_first(self, trainer: Trainer) -> None:
        """Go before the trainer's other callbacks, so that all of them log the rank metrics.

        The Trainer puts TensorBoard, W&B, MLflow and the like before the callbacks it is given, and
        what these add to a log entry would come too late.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: steps in which the optimizer stepped, and the schedule."""
        known = self.dynamics
        kept = {} if known is None else {"step": known.step, "schedule": asdict(known.schedule)}
        log_dir = None if self.log_dir is None else os.fspath(self.log_dir)
        arguments = {"adapter": self.adapter, "log_dir": log_dir}
        if engines := found():
            kept["engines"] = engines
        return {"args": arguments, "attributes": kept and {**kept, "log_start": self.log_start}}

    def _save_as_trained(self, model: Any, folder: Path, state: TrainerState) -> None:
        """Under ZeRO the adapter as it is trained: the Trainer writes the copy in 16 bits, if any.

        Without stage3_gather_16bit_weights_on_model_save it writes none.
        """
        if self.dynamics is None or not self.dynamics.is_watching:
            return
        adapter = adapter_state(model)
        if state.is_world_process_zero and isinstance(model, PeftModel):
            model.save_pretrained(str(folder), state_dict=adapter)

    def _first_batches(
        self, args: TrainingArguments, model: Any, train_dataloader: Any, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Batches to place ranks by: examples spread evenly over the data, the same everywhere.

        They are not drawn from the data loader, whose order is that of the training to come.
        """
        config = model.peft_config[self.adapter or active_adapter(model)]
        start_a = config.option("start_a")
        data = train_dataloader.dataset
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise ConfigError(
                f"start={config.start!r}, start_a={start_a!r}: cannot look into a "
                f"{type(data).__name__}; call "
                f"drlora.place_ranks(model, batches) before training."
            )
        size = args.per_device_train_batch_size
        count = min(len(data), config.option("start_batches") * size)
        chosen = [i * len(data) // count for i in range(count)]
        for first in range(0, count, size):
            examples = [data[i] for i in chosen[first : first + size]]
            yield train_dataloader.collate_fn(examples)

    def _saved(self, state: TrainerState) -> dict[str, Any]:
        """What the checkpoint that is continued has kept; nothing of a run that begins.

        Checkpoints of version 0.1 have no schedule.
        """
        if not state.global_step:
            return {}
        # A list if there are several callbacks of this class; the latest entries are at its end.
        states = cast("dict[str, Any]", state.stateful_callbacks or {})
        saved = states.get(type(self).__name__, [])
        for entry in reversed(saved if isinstance(saved, list) else [saved]):
            kept = entry["attributes"]
            if entry["args"].get("adapter") == self.adapter and kept.get("step") is not None:
                return kept
        return {}

    def _tell_of_other_length(self, steps: int) -> None:
        """Growth keeps the plan it was begun with; what that means for a run of other length."""
        assert self.dynamics is not None
        planned, events = self.dynamics.total_steps, self.dynamics.event_steps
        if events and events[-1] > steps:
            raise ConfigError(
                f"the run was planned for {planned} steps, with its last growth event after step "
                f"{events[-1]}, and now has {steps}: the budget would not be spent. Resume it with "
                f"the same data, batch size and max_steps, or with max_steps={planned} or more."
            )
        if planned != steps and events and self.tells_of_length:
            warnings.warn(
                f"the run was planned for {planned} steps and now has {steps}: ranks grow as "
                f"planned for {planned}, the learning rate follows the new length.",
                stacklevel=2,
            )


def _refuse_without_ddp(args: TrainingArguments, model: Any) -> None:
    """Refuse a model that several processes would train apart.

    `trainer.evaluate()` or `predict()` before `trainer.train()` marks the model itself as prepared,
    and accelerate (1.15) wraps nothing that is marked; in an ordinary run the wrapper has the mark.
    """
    is_marked = getattr(model, "_is_accelerate_prepared", False)
    if are_several() and is_marked and not (args.fsdp or args.deepspeed or _is_sharded(model)):
        raise ConfigError(
            "trainer.evaluate() or predict() was called before trainer.train(), and accelerate "
            "leaves DDP out then: each process would train a model of its own. Call it afterwards, "
            "or evaluate by eval_on_start=True."
        )


def _just_saved(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that the Trainer has just written.

    `hyperparameter_search` has a folder for each trial, by a name that the user may choose, which
    the Trainer does not tell callbacks.
    """
    folder, name = Path(args.output_dir or "."), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if not state.is_hyper_param_search:
        return folder / name
    written = folder.glob(f"**/{name}/{TRAINER_STATE_NAME}")
    newest = max(written, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest.parent if newest else folder / name


def _is_sharded(model: Any) -> bool:
    """Whether FSDP or expert parallelism has its parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _scaler_of(optimizer: object) -> Any:
    """The GradScaler of accelerate's optimizer, None without one."""
    return getattr(optimizer, "scaler", None)


def _unscale(optimizer: object) -> float | None:
    """Unscale the gradients, which only clipping has done, and return the scale they had."""
    scaler = _scaler_of(optimizer)
    if scaler is None or not scaler.is_enabled():
        return None
    with suppress(RuntimeError):  # unscaled already
        scaler.unscale_(unwrap_optimizer(optimizer))
    return scaler.get_scale()


def _refuse_frozen(dynamics: RankDynamics) -> None:
    pools = [pool for a in dynamics.adapters.values() for pool in a.rank_pools.values()]
    if not any(p.requires_grad for pool in pools for p in pool.parameters()):
        name = dynamics.adapter_name
        raise ConfigError(
            f"adapter {name!r} is frozen, so nothing would be trained; load it with "
            f"PeftModel.from_pretrained(model, folder, is_trainable=True), or choose which adapter "
            f"to train with model.set_adapter."
        )


def _tell_of_smaller_batch(batch_size: int | None, step: int) -> None:
    warnings.warn(
        f"the batch did not fit at step {step}: transformers begins again at step 0 with "
        f"{batch_size} examples at once, and goes on with the weights and ranks as they are by "
        f"now. {GROWTH_LOG} counts on from step {step}.",
        stacklevel=3,
    )


def _warn_of_longer_warmup(dynamics: RankDynamics, trainer_warmup: int) -> None:
    if dynamics.config.grows and dynamics.warmup_steps < trainer_warmup:
        warnings.warn(
            f"growth starts after {dynamics.warmup_steps} steps (DrLoraConfig.warmup_steps="
            f"{dynamics.config.warmup_steps}), before the learning rate's warm-up of "
            f"{trainer_warmup} steps is over; set both alike.",
            stacklevel=2,
        )
