"""What the Trainer of `drlora train` has beside TRL's, and a rehearsal of it that costs nothing.

Whatever transformers, accelerate or an optimizer's package refuse, they are to refuse before the
first measurement, and in a dry run too.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState
from transformers.utils import is_liger_kernel_available

from drlora.adapter.inject import adapted_layers
from drlora.adapter.state import adapter_state
from drlora.config.adapter import DrLoraConfig
from drlora.distributed import are_several
from drlora.errors import CheckpointError, ConfigError, first_line
from drlora.ranks.probe import Loss


def rehearse(arguments: TrainingArguments, total_steps: int) -> None:
    """Make what the Trainer makes of its settings: precision, trackers, optimizer, schedule.

    Nothing is written, and nothing is sent anywhere.

    Raises:
        ConfigError: what is said against them.
    """
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ConfigError(
            "training.fp16=true: on the CPU it would be passed over, and everything be computed in "
            "float32; use bf16, or leave it out."
        )
    if getattr(arguments, "activation_offloading", False) and arguments.device.type == "cpu":
        raise ConfigError(
            "training.activation_offloading=true: it brings activations from a GPU to the memory "
            "of the CPU, and this run is on the CPU; leave it out."
        )
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        # transformers says so too, but only when training begins.
        raise ConfigError(
            "training.use_liger_kernel=true needs the package liger-kernel: pip install "
            "liger-kernel, or leave it out."
        )
    if arguments.deepspeed:  # whose plugin belongs to the first Accelerator of a process
        return
    with tempfile.TemporaryDirectory() as folder:
        tried = copy.copy(arguments)
        tried.output_dir, tried.push_to_hub = folder, False
        tried.label_smoothing_factor = 0.0  # it asks for the config of a model
        try:
            # It asks whether there are held-out data, and does not look at them.
            trainer = Trainer(nn.Linear(1, 1), tried, eval_dataset=cast(Any, [0]))
            if takes_any_model(tried):
                trainer.create_optimizer_and_scheduler(max(1, total_steps))
        except Exception as error:  # whatever packages that are missing or too old make of it
            raise ConfigError(
                f"the section training cannot be carried out: {first_line(error)}. Change the "
                f"setting that asks for it (optim={_shown(arguments.optim)}, report_to="
                f"{arguments.report_to}, lr_scheduler_type={_shown(arguments.lr_scheduler_type)}, "
                f"device {arguments.device}), or install what is missing."
            ) from error


def takes_any_model(arguments: TrainingArguments) -> bool:
    """Whether an optimizer can be made without the model and the processes that it is for."""
    is_of_a_model = arguments.optim_target_modules or "lomo" in _shown(arguments.optim)
    return not (is_of_a_model or arguments.deepspeed or arguments.fsdp or are_several())


def _shown(value: Any) -> str:
    return str(getattr(value, "value", value))


class RunTrainer(Trainer):
    """What a run's trainer has, whichever of TRL's it stands before (`drlora.trainer.objectives`).

    LoRA+ has parameter groups of its own where the adapter asks for them. What goes wrong in
    writing a checkpoint, it tells in one sentence. Where auto_find_batch_size tries a smaller
    batch, the run begins again from where it began: weights, ranks, statistics, optimizer and the
    order of the data, so that it is the run of that batch size.

    Attributes:
        on_restart: called before a smaller batch is tried, with the one that did not fit and the
            step it did not fit at.
    """

    on_restart: Callable[[int, int], None] = staticmethod(lambda batch_size, step: None)
    _began: dict[str, Tensor] | None = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.auto_find_batch_size:
            if self._began is None:
                self._began = {k: v.cpu().clone() for k, v in adapter_state(self._adapted).items()}
            else:
                self._begin_again(self._began)
        return super()._inner_training_loop(*args, **kwargs)

    @property
    def places_by(self) -> Loss | None:
        """The loss that ranks are placed by; None for the model's own."""
        return None

    @property
    def _adapted(self) -> PeftModel:
        assert isinstance(self.model, PeftModel)
        return self.model

    def _begin_again(self, began: dict[str, Tensor]) -> None:
        self.on_restart(self._train_batch_size, self.state.global_step)
        self._adapted.load_state_dict(began, strict=False)
        for layer in adapted_layers(self._adapted, self._adapted.active_adapter).values():
            layer.adapter(self._adapted.active_adapter).meter.reset()
        self.optimizer = None  # the new one is made as the first was
        set_seed(self.args.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # the last one is torch.save's
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to "
                f"{self.args.output_dir}: {first_line(error)} (is the disk full, or the folder "
                f"read-only?)"
            ) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run writes its own (`drlora.report.card`), TRL's would lie beside it."""

    def _send_telemetry(self) -> None:
        """Nothing: TRL would tell the hub of each run."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """PEFT's helper makes the groups; otherwise all is as in transformers."""
        config = self._adapted.peft_config[self._adapted.active_adapter]
        assert isinstance(config, DrLoraConfig)
        if self.optimizer is None and config.option("b_lr_ratio") != 1:
            base = cast(PreTrainedModel, self.model)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, base)
            self.optimizer = create_loraplus_optimizer(
                self._adapted,
                kind,
                loraplus_lr_ratio=config.option("b_lr_ratio"),
                loraplus_weight_decay=self.args.weight_decay,
                **settings,
            )
        return super().create_optimizer(model)


class StopWhenLost(TrainerCallback):
    """Ends a run whose weights are NaN or infinite: no later step can mend them."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the weights where the loss is no number."""
        loss = (logs or {}).get("loss")
        if loss is None or math.isfinite(loss):
            return
        trained = (p for p in kwargs["model"].parameters() if p.requires_grad)
        if not all(bool(p.isfinite().all()) for p in trained):
            control.should_training_stop = True


class Clock(TrainerCallback, ExportableState):
    """The time in training of the whole run: checkpoints carry it on.

    Attributes:
        seconds: up to the latest step.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._earlier = 0.0
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from what the checkpoint says."""
        self._earlier = seconds_of(state.stateful_callbacks) if state.global_step else 0.0
        self.seconds = self._earlier
        self._started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the time."""
        self.seconds = self._earlier + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": round(self.seconds, 3)}}


def seconds_of(callbacks: Any) -> float:
    """Seconds in training of a run, from the `stateful_callbacks` of its trainer_state.json."""
    saved = callbacks.get(Clock.__name__) if isinstance(callbacks, dict) else None
    if not isinstance(saved, dict):  # not resumed, or begun by an older drlora
        return 0.0
    return float(saved.get("attributes", {}).get("seconds", 0.0))


class NewSchedule(TrainerCallback):
    """Where a finished run was given more steps, the learning rate is that of the new schedule.

    The checkpoint brings the rate of the old one along, which the Trainer would use once more.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rates of this step; schedules that are no function of the step stay."""
        schedule, optimizer = kwargs.get("lr_scheduler"), kwargs.get("optimizer")
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) and optimizer is not None:
            parts = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            rates = [rate * part(schedule.last_epoch) for rate, part in parts]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates  # what the Trainer logs
