"""A recipe: everything that makes a run, in one YAML file.

    recipe = load_recipe("recipes/embedded.yaml", ["training.max_steps=100"])
    train(recipe)

The sections `data` and `evaluation` are the dataclasses below, `adapter` holds the settings of
`DrLoraConfig` (or a `preset` and changes to it), `training` those of transformers'
TrainingArguments. Whatever is not known is refused, with the nearest known name.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from transformers import TrainingArguments

from drlora.config import DrLoraConfig, preset_settings
from drlora.data.layout import KNOWN_COLUMNS
from drlora.errors import ConfigError
from drlora.settings import check_type, read_settings, refuse_unknown

ROLES = ("train", "eval", "test")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED_SPLITS = {"train": "train", "eval": "dev", "test": "test"}
HUB_SPLITS = {"train": "train", "eval": "validation", "test": "test"}
FILE_SUFFIXES = (".json", ".jsonl", ".parquet")

TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
    "seed": 42,
    "report_to": "none",
}
# Fields of TrainingArguments that a recipe does not set, and why.
NOT_IN_RECIPES = {
    "output_dir": "set output_dir at the top of the recipe",
    "label_names": "drlora's data always has the column labels",
    "resume_from_checkpoint": "use --resume",
    "restore_callback_states_from_checkpoint": "use --resume",
    "save_only_model": "a run could not be resumed without the optimizer's state",
    "load_best_model_at_end": "an earlier checkpoint has not spent the budget",
    "do_train": "drlora train trains",
    "do_eval": "see the section evaluation",
    "do_predict": "use drlora eval",
}
COMMON_TRAINING = (
    "max_steps, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps, "
    "learning_rate, warmup_steps, lr_scheduler_type, weight_decay, logging_steps, save_steps, seed "
    "and all other fields of transformers.TrainingArguments"
)


@dataclass(frozen=True)
class DataSection:
    """Where the examples come from.

    Args:
        train: a hub data set, a .json, .jsonl or .parquet file, or `embedded:TASK`.
        eval: held-out data; by default the split `splits.eval` of `train`.
        test: data for `drlora eval --split test`; by default the split `splits.test` of `train`.
        splits: role (train, eval, test) -> name of a split, which may carry a slice
            (`train[:90%]`).
        config: configuration of a hub data set that has several.
        columns: standard column (prompt, completion, answers, messages, text) -> its name in the
            data.
        max_length: longest example in tokens; by default what the model takes, at most 1024.
        limits: role -> use only so many examples, from the front.
    """

    train: str
    eval: str | None = None
    test: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    columns: dict[str, str] | None = None
    max_length: int | None = None
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_unknown(self.splits, ROLES, "data.splits")
        refuse_unknown(self.limits, ROLES, "data.limits")
        refuse_unknown(self.columns or {}, KNOWN_COLUMNS, "data.columns")
        for role, limit in self.limits.items():
            if check_type(limit, int, f"data.limits.{role}") < 1:
                raise ConfigError(f"data.limits.{role}={limit} must be at least 1.")
        if self.source("eval") == self.source("train"):
            raise ConfigError(
                f"data.train={self.train!r} is also what would be held out; name other data as "
                f"data.eval, or split it: data.splits: {{train: 'train[:90%]', "
                f"eval: 'train[90%:]'}}."
            )

    def source(self, role: str) -> tuple[str, str]:
        """(source, split) of a role, as `drlora.data.load_examples` takes them."""
        source = getattr(self, role) or self.train
        return source, self.splits.get(role) or default_split(source, role)


def default_split(source: str, role: str) -> str:
    """The split of `source` that stands for a role where the recipe names none."""
    if source.startswith("embedded:"):
        return EMBEDDED_SPLITS[role]
    return "train" if Path(source).suffix in FILE_SUFFIXES else HUB_SPLITS[role]


@dataclass(frozen=True)
class EvaluationSection:
    """What is measured before and after training, on the held-out data.

    Args:
        loss_examples: examples for the loss, from the front; by default all.
        exact_match: whether answers are generated and compared; by default where there are
            prompts with one-line completions.
        exact_match_examples: examples for exact match, from the front.
        max_new_tokens: longest answer, in tokens.
        batch_size: examples at once.
        before: whether the untrained model is measured too, at step 0.
    """

    loss_examples: int | None = None
    exact_match: bool | None = None
    exact_match_examples: int = 100
    max_new_tokens: int = 32
    batch_size: int = 16
    before: bool = True

    def __post_init__(self) -> None:
        for name in ("loss_examples", "exact_match_examples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation.{name}={value} must be at least 1.")


@dataclass(frozen=True)
class Recipe:
    """One run, checked as far as it can be without the model and the data.

    Args:
        model: `embedded`, a local folder, or a model of the hub.
        output_dir: the run directory.
        data: see DataSection.
        adapter: all settings of DrLoraConfig.
        training: fields of TrainingArguments.
        evaluation: see EvaluationSection.
        method: a name of `drlora.methods`; what it stands for wins over `adapter`. None: `adapter`
            as it is.
        start_from: folder of a PEFT LoRA on experts that the adapter continues; its layers and rank
            are taken over (`drlora.load_peft_lora`).
        start_ranks: JSON file with the ranks to start from (`drlora.start_ranks`).
        tokenizer: where it is not the model's own.
        dtype: of the model's weights; `auto` is what they are stored in.
        trust_remote_code: whether code that comes with a hub model may run.
    """

    model: str
    output_dir: str
    data: DataSection
    adapter: dict[str, Any]
    training: dict[str, Any]
    evaluation: EvaluationSection = EvaluationSection()
    method: str | None = None
    start_from: str | None = None
    start_ranks: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not known; choose one of {list(DTYPES)}.")
        placing = {"start": "uniform", "start_a": "random"}
        for name in ("start_from", "start_ranks"):
            for setting, nothing in placing.items():
                rule = self.adapter.get(setting, nothing)
                if getattr(self, name) and rule != nothing:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} and adapter.{setting}={rule!r} contradict "
                        f"each other; keep one."
                    )

    def adapter_config(self) -> DrLoraConfig:
        """A new DrLoraConfig of the section `adapter`."""
        return DrLoraConfig(**self.adapter, task_type=TaskType.CAUSAL_LM)

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every default filled in; `recipe_from` reads them back."""
        return asdict(self)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `key=value` overrides (dotted keys) on top.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """
    return recipe_from(read_settings(path, overrides))


def recipe_from(tree: dict[str, Any]) -> Recipe:
    """A recipe from nested plain values, as YAML gives them.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """
    _refuse_unknown_in(tree, Recipe, "")
    sections = {key: _section(tree, key) for key in ("data", "adapter", "training", "evaluation")}
    training = _training(sections["training"])
    parts = {
        "data": _build(DataSection, sections["data"], "data"),
        "evaluation": _build(EvaluationSection, sections["evaluation"], "evaluation"),
        "adapter": _adapter(sections["adapter"], training, tree.get("method")),
        "training": training,
    }
    return _build(Recipe, {**tree, **parts}, "")


def adapter_settings() -> dict[str, Any]:
    """Setting of the section `adapter` -> its type."""
    peft_names = {f.name for f in fields(PeftConfig)}
    hints = _hints(DrLoraConfig)
    return {f.name: hints[f.name] for f in fields(DrLoraConfig) if f.name not in peft_names}


def make_adapter_config(settings: dict[str, Any], method: str | None = None) -> DrLoraConfig:
    """A DrLoraConfig from a section `adapter`: its settings, or a `preset` and changes to it.

    What `method` stands for goes on top.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """
    known = adapter_settings()
    refuse_unknown(settings, [*known, "preset"], "adapter", _homes())
    changes = {
        key: check_type(value, known[key], f"adapter.{key}")
        for key, value in settings.items()
        if key != "preset"
    }
    preset = check_type(settings.get("preset"), str | None, "adapter.preset")
    given = {**preset_settings(preset), **changes} if preset else changes
    return DrLoraConfig.for_method(method, **given) if method else DrLoraConfig(**given)


def _adapter(settings: dict[str, Any], training: dict[str, Any], method: Any) -> dict[str, Any]:
    warmup = {"warmup_steps": training["warmup_steps"]}
    config = make_adapter_config({**warmup, **settings}, check_type(method, str | None, "method"))
    return {key: getattr(config, key) for key in adapter_settings()}


def _training(settings: dict[str, Any]) -> dict[str, Any]:
    known = _hints(TrainingArguments)
    names = {f.name for f in fields(TrainingArguments)}
    refuse_unknown(settings, names, "training", _homes(), COMMON_TRAINING)
    for key in settings:
        if key in NOT_IN_RECIPES:
            raise ConfigError(f"training.{key} cannot be set in a recipe: {NOT_IN_RECIPES[key]}.")
    # An unquoted `no` is false in YAML, but the name of a strategy for transformers.
    plain = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in settings.items()}
    checked = {
        key: check_type(value, known[key], f"training.{key}") for key, value in plain.items()
    }
    if checked.get("max_steps", -1) > 0 and "num_train_epochs" in checked:
        raise ConfigError(
            f"training.max_steps={checked['max_steps']} and training.num_train_epochs="
            f"{checked['num_train_epochs']} contradict each other; keep one."
        )
    return {**TRAINING_DEFAULTS, **checked}


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    section = tree.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(f"{key}={section!r} must be a section of `setting: value` lines.")
    return section


def _build(kind: Any, settings: dict[str, Any], section: str) -> Any:
    """A section's dataclass, its names and types checked first."""
    _refuse_unknown_in(settings, kind, section)
    hints = _hints(kind)
    prefix = f"{section}." if section else ""
    for required in ("model", "output_dir") if kind is Recipe else ("train",):
        if required in hints and not settings.get(required):
            raise ConfigError(f"{prefix}{required} is missing in the recipe; add it.")
    checked = {
        key: check_type(value, hints[key], prefix + key)
        for key, value in settings.items()
        if value is not None
    }
    return kind(**checked)


def _refuse_unknown_in(settings: dict[str, Any], kind: Any, section: str) -> None:
    refuse_unknown(settings, [f.name for f in fields(kind)], section, _homes())


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@cache
def _homes() -> dict[str, str]:
    """Setting -> its dotted name, to say where one belongs that stands in the wrong place."""
    homes = {f.name: f"training.{f.name}" for f in fields(TrainingArguments)}
    homes |= {f.name: f"evaluation.{f.name}" for f in fields(EvaluationSection)}
    homes |= {f.name: f"data.{f.name}" for f in fields(DataSection)}
    homes |= {key: f"adapter.{key}" for key in (*adapter_settings(), "preset")}
    homes["warmup_steps"] = "training.warmup_steps"
    return homes | {f.name: f.name for f in fields(Recipe)}
