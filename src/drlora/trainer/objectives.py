"""What a run can learn from: its objective, the TRL trainer that carries it out, and its settings.

objective: dpo             # in a recipe; sft where it says nothing
training: {beta: 0.05}     # a field of trl.DPOConfig
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

from peft import PeftModel
from transformers import TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from drlora.errors import ConfigError, first_line
from drlora.trainer.grpo import GrpoTrainer
from drlora.trainer.preferences import DpoTrainer, KtoTrainer
from drlora.trainer.rewards import rewards_of
from drlora.trainer.sft import SftTrainer, sees_other_documents
from drlora.trainer.trainer import RunTrainer


@dataclass(frozen=True)
class Objective:
    """One way to train.

    Attributes:
        name: in a recipe.
        summary: what is learned from, in one sentence.
        columns: of the examples, any one of these sets.
        trl: TRL's trainer.
        trainer: the same with what a run needs.
        config: of the trainer; its fields are the section `training`.
        defaults: where those of a recipe would not do.
    """

    name: str
    summary: str
    columns: tuple[tuple[str, ...], ...]
    trl: Any
    trainer: type[RunTrainer]
    config: type[TrainingArguments]
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def compares(self) -> bool:
        """Whether it learns from which answers are better, and so has a reference."""
        return self.name != "sft"

    @property
    def tries(self) -> bool:
        """Whether it learns from answers of the model's own, and so needs rewards."""
        return self.config is GRPOConfig


OBJECTIVES = {
    one.name: one
    for one in (
        Objective(
            "sft",
            "answers, conversations or texts, by their likelihood",
            (("prompt", "completion"), ("messages",), ("text",)),
            SFTTrainer,
            SftTrainer,
            SFTConfig,
        ),
        Objective(
            "dpo",
            "pairs of a chosen and a rejected answer",
            (("chosen", "rejected"),),
            DPOTrainer,
            DpoTrainer,
            DPOConfig,
            {"learning_rate": 1e-5},
        ),
        Objective(
            "kto",
            "answers with the verdict good or bad (label)",
            (("prompt", "completion", "label"),),
            KTOTrainer,
            KtoTrainer,
            KTOConfig,
            {"learning_rate": 1e-5},
        ),
        Objective(
            "grpo",
            "answers of its own, by the rewards that functions give them",
            (("prompt", "completion"),),
            GRPOTrainer,
            GrpoTrainer,
            GRPOConfig,
            # One answer to each held-out prompt: rewards are not compared there.
            {"learning_rate": 1e-5, "num_generations_eval": 1},
        ),
    )
}
# transformers calls it otherwise since 5.23, and warns of the old name, which TRL sets.
_OLD_NAME = "gradient_checkpointing"
_NAMES = {f.name for f in fields(SFTConfig)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else _OLD_NAME
# TRL turns these on where transformers does not; in a recipe they are off unless it says otherwise.
OFF = {CHECKPOINTING: False, "bf16": False}
# What TRL has beside these, and why a recipe cannot ask for it.
_OTHERS = {
    "reward": "it trains a model with a score head instead of a language model, which drlora eval, "
    "generate and export do not know; give TRL's RewardTrainer the callback of drlora, with "
    "modules_to_save=['score'] in DrLoraConfig (docs/training.md)",
    "rloo": "it was not tried; objective: grpo is near to it, or give TRL's RLOOTrainer the "
    "callback of drlora",
    **dict.fromkeys(
        ("orpo", "cpo", "simpo", "gkd", "online_dpo", "tpo", "ppo"),
        "TRL has it in trl.experimental if at all, and promises nothing of it; give its trainer "
        "the callback of drlora",
    ),
}


@dataclass(frozen=True)
class OwnSettings:
    """Settings of the section `training` that no config of TRL has.

    Args:
        token_metrics: whether entropy and accuracy of the tokens are logged; on a CPU that takes
            half as long again.
        early_stopping_patience: end the run when so many evaluations in a row bring nothing better;
            by default it goes on to its last step.
        early_stopping_threshold: by how much an evaluation must be better to count.
    """

    token_metrics: bool = False
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0

    @classmethod
    def of(cls, training: dict[str, Any]) -> OwnSettings:
        """Those in a section `training`."""
        return cls(**{name: training[name] for name in OWN if name in training})


OWN = tuple(one.name for one in fields(OwnSettings))


def as_off(training: dict[str, Any]) -> dict[str, Any]:
    """A section `training` with what TRL alone turns on turned off, as far as it says nothing."""
    given = {CHECKPOINTING if name == _OLD_NAME else name: v for name, v in training.items()}
    return {**OFF, **given}


def objective_of(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ConfigError: if there is none, with what there is instead.
    """
    if name not in OBJECTIVES:
        why = f"{_OTHERS[name]}. K" if name in _OTHERS else "k"
        raise ConfigError(
            f"objective={name!r} is none that drlora train has: {why}nown are "
            f"{', '.join(OBJECTIVES)}."
        )
    return OBJECTIVES[name]


def make_trainer(
    objective: Objective,
    own: OwnSettings,
    *,
    continues: bool,
    args: TrainingArguments,
    rewards: Sequence[str] = (),
    **given: Any,
) -> RunTrainer:
    """The trainer of an objective, on data that are token ids already.

    Args:
        objective: what is learned from.
        own: the settings that TRL has not.
        continues: whether the adapter was trained before.
        args: the trainer's config.
        rewards: names of what answers are rewarded by, where the objective takes them.
        given: to the trainer: model, train_dataset, eval_dataset, processing_class, callbacks.

    Raises:
        ConfigError: what TRL says against it.
    """
    settings: Any = copy.copy(args)
    if objective.compares:
        more: dict[str, Any] = {"continues": continues}
        if objective.tries:
            more["reward_funcs"] = rewards_of(rewards)
    else:
        more = {"token_metrics": own.token_metrics}
        # TRL looks at the data for what these ask, and the data are tokens by now.
        settings.dataset_kwargs = {"skip_prepare_dataset": True}
        settings.assistant_only_loss, settings.completion_only_loss = False, None
        if settings.padding_free and not settings.packing:
            settings.max_length = None  # it is kept already
    try:
        trainer = objective.trainer(args=settings, **more, **given)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"objective={objective.name!r} cannot be carried out: {first_line(error)}"
        ) from error
    refuse_leaks(trainer)
    return trainer


def rehearse_trainer(
    objective: Objective,
    own: OwnSettings,
    *,
    model: PeftModel,
    args: TrainingArguments,
    rewards: Sequence[str] = (),
    **given: Any,
) -> None:
    """Make the trainer of an objective on a model without weights, and forget it.

    What TRL says against settings, data or tokenizer it says when its trainer is made; so it is
    made once before anything is loaded. Nothing is written or sent anywhere.

    Args:
        objective, own, args, rewards, given: as `make_trainer` takes them.
        model: with the adapter, on the meta device.

    Raises:
        ConfigError: what TRL says against it.
    """
    # TRL makes a reference beside it, whose LoRA on ordinary layers has to be without weights too.
    model.add_adapter = partial(model.add_adapter, low_cpu_mem_usage=True)  # type: ignore[method-assign]
    on_paper = type("OnPaper", (objective.trainer,), {"_move_model_to_device": lambda *_: None})
    with tempfile.TemporaryDirectory() as folder, _silent():
        tried: Any = copy.copy(args)
        tried.output_dir, tried.push_to_hub = folder, False
        if objective.compares and not objective.tries:
            tried.precompute_ref_log_probs = False  # that is done with weights
        make_trainer(
            replace(objective, trainer=on_paper),
            own,
            continues=False,
            args=tried,
            rewards=rewards,
            model=model,
            **given,
        )


@contextmanager
def _silent() -> Iterator[None]:
    """What is only said, and not refused, is said when the trainer is made in earnest."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def refuse_leaks(trainer: RunTrainer) -> None:
    """Refuse packed rows where one document would read another.

    A model that ZeRO-3 has split can be tried only once its engine is there.

    Raises:
        ConfigError: naming the model and how it attends.
    """
    args = trainer.args
    packs = getattr(args, "packing", False) or getattr(args, "padding_free", False)
    if not packs or getattr(args, "packing_strategy", "") == "wrapped":  # there they are meant to
        return
    if sees_other_documents(trainer.model, trainer.data_collator):
        config: Any = cast(PeftModel, trainer.model).config
        raise ConfigError(
            f"training.packing: documents of a packed row would see those before them in a model "
            f"of type {config.model_type} with attention {config._attn_implementation!r}; leave "
            f"packing and padding_free out, or take an attention that keeps them apart."
        )
