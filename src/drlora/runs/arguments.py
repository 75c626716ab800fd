"""The config of a run's trainer: the section `training`, and what a run and its model ask for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedConfig, TrainingArguments
from trl import GRPOConfig, KTOConfig

from drlora.distributed import are_several
from drlora.errors import ConfigError, DataError
from drlora.runs.recipe import Recipe
from drlora.runs.rundir import RunDir
from drlora.trainer.deepspeed import PACKED_UNDER_ZERO_3, asks_for_zero_3
from drlora.trainer.grpo import refuse_settings
from drlora.trainer.objectives import OWN, Objective, OwnSettings, as_off, objective_of


def training_arguments(recipe: Recipe, run: RunDir) -> TrainingArguments:
    """The trainer's config: the section `training`, and what a run directory needs.

    Raises:
        ConfigError: what transformers or TRL says against them.
    """
    objective = objective_of(recipe.objective)
    has_accelerator = torch.accelerator.is_available()
    given = {name: value for name, value in recipe.training.items() if name not in OWN}
    settings: dict[str, Any] = {
        "use_cpu": not has_accelerator,
        "dataloader_pin_memory": has_accelerator,
        **({} if objective.compares else {"assistant_only_loss": True}),
        **as_off(given),
    }
    if settings.get("fp16"):
        settings.setdefault("bf16", False)
    if not objective.compares:
        settings["label_names"] = ["labels"]
    try:
        arguments = objective.config(output_dir=str(run.checkpoints), **settings)
    except Exception as error:  # whatever the packages say that a setting asks for
        raise ConfigError(
            f"the section training is refused by {objective.config.__name__}: {error}"
        ) from error
    _refuse_arguments(arguments, OwnSettings.of(recipe.training))
    if recipe.quantise.experts is not None and asks_for_zero_3(arguments):
        raise ConfigError(f"quantise.experts={recipe.quantise.experts!r}: {PACKED_UNDER_ZERO_3}")
    _refuse_names(arguments, objective)
    if isinstance(arguments, KTOConfig):
        _refuse_batches(arguments)
    if isinstance(arguments, GRPOConfig):
        refuse_settings(arguments)
    return arguments


def has_fsdp(arguments: TrainingArguments) -> bool:
    """Whether FSDP is to shard the model, by the recipe or as accelerate was launched."""
    return bool(arguments.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def _refuse_arguments(arguments: TrainingArguments, own: OwnSettings) -> None:
    """What can be told of them alone."""
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"training.{name}={getattr(arguments, name)} must be at least 1.")
    if arguments.max_steps < 1 and arguments.num_train_epochs <= 0:
        raise ConfigError(
            f"training.num_train_epochs={arguments.num_train_epochs} leaves nothing to train; set "
            f"it, or training.max_steps, above 0."
        )
    if arguments.auto_find_batch_size and are_several():
        raise ConfigError(
            "training.auto_find_batch_size=true: each process would find a batch of its own; set "
            "training.per_device_train_batch_size."
        )
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs are visible to one process, which TRL does not train on; "
            f"start one process each (accelerate launch -m drlora train ...), or show it one GPU "
            f"(CUDA_VISIBLE_DEVICES=0)."
        )
    if own.early_stopping_patience is not None and own.early_stopping_patience < 1:
        raise ConfigError(
            f"training.early_stopping_patience={own.early_stopping_patience} must be at least 1."
        )
    is_flat = getattr(arguments, "packing", False) or getattr(arguments, "padding_free", False)
    if is_flat and getattr(arguments, "pad_to_multiple_of", None):
        raise ConfigError(
            f"training.pad_to_multiple_of={cast(Any, arguments).pad_to_multiple_of}: rows without "
            f"padding have no mask that tells their filler from tokens, so its routing would be "
            f"counted; leave it out, or packing and padding_free."
        )
    stops = own.early_stopping_patience is not None
    if (stops or arguments.load_best_model_at_end) and arguments.eval_strategy == "no":
        what = "early_stopping_patience" if stops else "load_best_model_at_end"
        raise ConfigError(
            f"training.{what} needs evaluations during training; set training.eval_strategy: steps "
            f"and training.eval_steps."
        )
    if stops and arguments.metric_for_best_model is None:
        arguments.metric_for_best_model, arguments.greater_is_better = "loss", False


def _refuse_names(arguments: TrainingArguments, objective: Objective) -> None:
    """Kinds of loss that TRL's trainer has no branch for; it would say so in its first step."""
    source = inspect.getsource(inspect.getmodule(objective.trl))  # type: ignore[arg-type]
    for setting in ("loss_type", "f_divergence_type", "importance_sampling_level"):
        given = getattr(arguments, setting, None)
        for name in given if isinstance(given, list) else [given]:
            if isinstance(name, str) and f'"{name}"' not in source:
                raise ConfigError(
                    f"training.{setting}={name!r} is none that {objective.trl.__name__} of TRL "
                    f"{version('trl')} has; see the page of {objective.config.__name__}."
                )


def count_steps(
    arguments: TrainingArguments, num_examples: int, batch_size: int | None = None
) -> int:
    """Optimizer steps of the run, as the Trainer counts them.

    Args:
        arguments: of the Trainer.
        num_examples: of the training data.
        batch_size: of a process, where it is not what the arguments say.

    Raises:
        DataError: if `dataloader_drop_last` leaves no batch.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    batch_size = batch_size or arguments.train_batch_size
    examples = num_examples / arguments.world_size / batch_size
    batches = math.floor(examples) if arguments.dataloader_drop_last else math.ceil(examples)
    if batches < 1:
        raise DataError(f"{num_examples} examples do not fill one batch; lower the batch size.")
    updates = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * updates)


def _refuse_batches(arguments: KTOConfig) -> None:
    """KTO pairs a prompt with an answer to another one of its batch; that is done beforehand."""
    if arguments.auto_find_batch_size or arguments.per_device_train_batch_size < 2:
        raise ConfigError(
            f"training.per_device_train_batch_size={arguments.per_device_train_batch_size}, "
            f"auto_find_batch_size={arguments.auto_find_batch_size}: kto pairs the examples of a "
            f"batch, so it needs one of 2 or more that stays as it is."
        )


def settle(arguments: TrainingArguments, config: PreTrainedConfig, longest: int) -> None:
    """Fill in what a trainer's config takes from the model: the length, a router's own loss.

    TRL would add the load-balancing loss that a model's config names a coefficient for; here it is
    added where the config returns router logits, or the recipe sets a coefficient.
    """
    settings = cast(Any, arguments)
    settings.max_length = longest
    returns_logits = getattr(config.get_text_config(), "output_router_logits", False)
    if settings.router_aux_loss_coef is None and not returns_logits:
        settings.router_aux_loss_coef = 0.0


def notes_of(arguments: TrainingArguments, recipe: Recipe) -> Iterator[str]:
    """What of the settings whoever reads the results should know."""
    settings, kind = cast(Any, arguments), objective_of(recipe.objective)
    if kind.compares:
        reference = f"the adapter of {recipe.start_from}" if recipe.start_from else "the base model"
        by = f": {', '.join(recipe.rewards)}" if recipe.rewards else ""
        held = f"the reference is {reference}" if settings.beta else "without a reference (beta: 0)"
        yield f"{'learns':8} from {kind.summary}{by}; {held}"
    elif settings.packing and settings.packing_strategy == "wrapped":
        yield (
            "training.packing_strategy=wrapped: documents are cut where a row ends, and see those "
            "before them in their row; with bfd they do not"
        )
    if arguments.load_best_model_at_end:
        yield (
            "training.load_best_model_at_end=true: if the best checkpoint is of a step before the "
            "last growth event, its adapter has not spent the budget"
        )
