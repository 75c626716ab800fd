"""A recipe: everything that makes a run, in one YAML file.

    recipe = load_recipe("embedded", ["training.max_steps=100"])
    train(recipe)

The section `data` is a `DataSection`, `evaluation` an `EvaluationSection`, `quantise` a
`QuantiseSection`, `adapter` a `DrLoraConfig` (its settings, or a `preset` and changes to it);
`training` has the fields of TRL's config for the `objective` (SFTConfig, DPOConfig and the like),
those of transformers' TrainingArguments among them, and `OwnSettings`. Whatever is not known is
refused, with the nearest known name.
Relative paths are those of the working directory; what a run keeps of its recipe has them from the
root on, so that it can be resumed from anywhere.
"""

from __future__ import annotations

import copy
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, TaskType

from drlora.config.adapter import DrLoraConfig, preset_settings
from drlora.config.methods import METHODS
from drlora.config.options import GENERAL
from drlora.config.registry import REGISTRIES, WITH_OPTIONS, registered_options
from drlora.errors import ConfigError
from drlora.evaluation.measure import EvaluationSection
from drlora.io.files import home
from drlora.io.places import from_root
from drlora.io.settings import check_type, read_settings, refuse_unknown, with_overrides
from drlora.ranks.continue_adapter import RANKS, kept_settings
from drlora.recipes import resolve_recipe
from drlora.runs.data_section import ROLES, DataSection, absolute
from drlora.runs.method_notes import tell_of_idle_growth, tell_of_method
from drlora.runs.moved import located_at
from drlora.runs.quantise import QuantiseSection
from drlora.runs.training_section import COMMON_TRAINING, NOT_IN_RECIPES, TRAINING_DEFAULTS
from drlora.trainer.objectives import OBJECTIVES, OWN, Objective, OwnSettings, objective_of

SECTIONS = ("data", "adapter", "training", "evaluation", "quantise")
DTYPES = ("auto", "float32", "bfloat16", "float16")

_MAYBE_OF_HUB = ("model", "tokenizer", "chat_template")
LENGTHS = ("max_steps", "num_train_epochs")  # settings of training that say how long a run is
_PATHS = ("model", "tokenizer", "output_dir", "start_from", "start_ranks", "chat_template")


@dataclass(frozen=True)
class Recipe:
    """One run, checked as far as it can be without the model and the data.

    Args:
        model: `embedded`, a local folder, or a model of the hub.
        output_dir: the run directory.
        data: see DataSection.
        adapter: what the adapter is; `adapter_config` gives copies, for PEFT writes into what it
            is given.
        training: fields of the config of the objective's trainer, and `OwnSettings`.
        evaluation: see EvaluationSection.
        quantise: how the base is kept, see QuantiseSection.
        objective: what is learned from: `sft`, `dpo`, `kto` or `grpo`
            (`drlora.trainer.objectives`).
        reward: of `grpo`, what answers are rewarded by: a name of `drlora.trainer.rewards`, one
            that a plugin registers, `trl.rewards.NAME`, or a list of these.
        method: a name of `drlora.config.methods`; what it stands for wins over `adapter`. None:
            `adapter` as it is.
        start_from: what the adapter continues: a run, a folder with a DR-LoRA adapter
            (`drlora.continue_adapter`), or one with a PEFT LoRA on experts, whose layers and rank
            are taken over (`drlora.load_peft_lora`).
        start_from_ranks: of a DR-LoRA adapter, whether its ranks are to `keep`, to `grow` on from
            where they are, or to be given out `again` from r_init on; by default keep.
        start_ranks: JSON file with the ranks to start from (`drlora.start_ranks`).
        tokenizer: where it is not the model's own.
        chat_template: where it is not the tokenizer's own: a file (.jinja), or a folder or a model
            of the hub whose tokenizer has it.
        dtype: of the model's weights; `auto` is what they are stored in.
        trust_remote_code: whether code that comes with a hub model may run.
        forecast: what `drlora plan` said of the run (`memory_gb`, `step_seconds`, `on`); nothing is
            done with it but to keep it beside what is measured.
    """

    model: str
    output_dir: str
    data: DataSection
    adapter: DrLoraConfig
    training: dict[str, Any]
    evaluation: EvaluationSection = EvaluationSection()
    quantise: QuantiseSection = QuantiseSection()
    objective: str = "sft"
    reward: str | list[str] | None = None
    method: str | None = None
    start_from: str | None = None
    start_from_ranks: str | None = None
    start_ranks: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    forecast: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not known; choose one of {list(DTYPES)}.")
        if self.start_from_ranks not in (None, *RANKS):
            raise ConfigError(
                f"start_from_ranks={self.start_from_ranks!r} is not known; choose one of "
                f"{list(RANKS)}."
            )
        if self.start_from_ranks and not self.start_from:
            raise ConfigError(
                f"start_from_ranks={self.start_from_ranks!r} has no effect without start_from; "
                f"name the adapter there, or leave it out."
            )
        if objective_of(self.objective).tries != bool(self.reward):
            raise ConfigError(
                f"objective={self.objective!r} and reward={self.reward!r} do not go together: "
                f"grpo needs a reward (reward: exact, or one of your own by --plugin), and the "
                f"others have none."
            )
        placing = {"start": (self.adapter.start, "uniform"),
                   "options.start_a": (self.adapter.option("start_a"), "random")}  # fmt: skip
        if objective_of(self.objective).tries and self.adapter.starts_from_data:
            self._refuse_placing(placing)
        # Rows of A are laid in the ranks of a map; an adapter that goes on has rows.
        placed_by = {"start_from": placing, "start_ranks": {"start": placing["start"]}}
        for name, settings in placed_by.items():
            for setting, (rule, nothing) in settings.items():
                if getattr(self, name) and rule != nothing:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} and adapter.{setting}={rule!r} contradict "
                        f"each other; keep one."
                    )

    def _refuse_placing(self, placing: Mapping[str, tuple[Any, str]]) -> None:
        """Ranks are placed by a loss of the data, and nothing is lost before answers are tried."""
        for setting, (rule, nothing) in placing.items():
            if rule != nothing:
                raise ConfigError(
                    f"adapter.{setting}={rule!r} looks at the loss of a few batches, which "
                    f"objective={self.objective!r} has not before it has tried; leave it out, or "
                    f"name ranks as start_ranks."
                )

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of what answers are rewarded by."""
        given = self.reward or ()
        return (given,) if isinstance(given, str) else tuple(given)

    def adapter_config(self) -> DrLoraConfig:
        """A copy of `adapter` for a causal language model."""
        config = copy.deepcopy(self.adapter)
        config.task_type = TaskType.CAUSAL_LM
        return config

    def resolved(self) -> Recipe:
        """The same with local paths from the root on, so that it holds in any working directory."""
        given = {name: found for name in _PATHS if (found := getattr(self, name))}
        paths: dict[str, Any] = {
            name: from_root(found) if name in _MAYBE_OF_HUB else os.path.abspath(found)
            for name, found in given.items()
        }
        evaluation = self.evaluation.moved(absolute)
        return replace(self, data=self.data.resolved(), evaluation=evaluation, **paths)

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every default filled in; `recipe_from` reads them back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        sections = {name: asdict(plain[name]) for name in ("data", "evaluation", "quantise")}
        return copy.deepcopy({**plain, **sections, "adapter": settings_of(self.adapter)})


def load_recipe(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), resume: bool = False
) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides (dotted keys) on top.

    Relative paths in it are those of the working directory. The config.yaml of a run that was moved
    is read with the paths that it means now.

    Args:
        source: the file; `~` stands for home, as in every path in it. Or the name of a recipe that
            comes with drlora (`drlora.recipes`). Or what such a file holds, as nested values.
        overrides: `training.max_steps=100` and the like.
        resume: whether a run is to go on: a length among the overrides, in steps or in epochs, then
            takes the place of the file's, whichever that has.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """
    if isinstance(source, Mapping):
        tree = with_overrides(copy.deepcopy(dict(source)), overrides)
    else:
        source = resolve_recipe(home(str(source)))
        tree = read_settings(source, overrides)
    training = tree.get("training")
    if resume and isinstance(training, dict):
        given = {override.partition("=")[0] for override in overrides}
        for one, other in (LENGTHS, LENGTHS[::-1]):
            if f"training.{one}" in given and f"training.{other}" not in given:
                training.pop(other, None)
    recipe = recipe_from(tree)
    if recipe.method:
        tell_of_method(recipe.method, tree.get("adapter") or {}, recipe.adapter)
    else:
        tell_of_idle_growth(tree.get("adapter") or {}, recipe.adapter)
    return recipe if isinstance(source, Mapping) else located_at(recipe, source, overrides)


def recipe_from(tree: dict[str, Any], is_record: bool = False) -> Recipe:
    """A recipe from nested plain values, as YAML gives them.

    Args:
        tree: the values.
        is_record: whether a run wrote them, with everything filled in, and they are only read: then
            rules and methods that are not registered here are no fault.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """
    _refuse_unknown_in(tree, Recipe, "")
    tree = _at_home(tree, _PATHS)
    sections = {key: _section(tree, key) for key in SECTIONS}
    objective = objective_of(check_type(tree.get("objective") or "sft", str, "objective"))
    training = _training(sections["training"], objective)
    parts = {
        "data": _build(DataSection, _at_home(sections["data"], ROLES), "data"),
        "evaluation": _build(EvaluationSection, sections["evaluation"], "evaluation"),
        "quantise": quantise_section(sections["quantise"]),
        "training": training,
    }
    if is_record and _has_unknown_rules(sections["adapter"], tree.get("method")):
        parts["adapter"] = DrLoraConfig(**sections["adapter"], inference_mode=True)
    else:
        given = _continued(tree, sections["adapter"])
        parts["adapter"] = _adapter(given, training, tree.get("method"))
    return _build(Recipe, {**tree, **parts}, "")


def _has_unknown_rules(settings: dict[str, Any], method: Any) -> bool:
    known = (settings.get(name) in REGISTRIES[name] for name in WITH_OPTIONS if name in settings)
    return not all(known) or (method is not None and method not in METHODS)


def _at_home(tree: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`tree` with the paths under these names as `home` writes them."""
    return {
        key: home(value) if key in names and isinstance(value, str) else value
        for key, value in tree.items()
    }


def _continued(tree: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The section `adapter` on top of the settings of the DR-LoRA adapter in `start_from`."""
    start_from = tree.get("start_from")
    known = adapter_settings()
    if not isinstance(start_from, str) or known.keys() <= given.keys():
        return given
    return kept_settings(start_from, tree.get("start_from_ranks"), known.keys(), given)


def adapter_settings() -> dict[str, Any]:
    """Setting of the section `adapter` -> its type."""
    others = {*(f.name for f in fields(PeftConfig)), "record"}
    hints = _hints(DrLoraConfig)
    return {f.name: hints[f.name] for f in fields(DrLoraConfig) if f.name not in others}


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


def settings_of(config: DrLoraConfig) -> dict[str, Any]:
    """Setting of the section `adapter` -> its value; `make_adapter_config` reads them back."""
    return {key: getattr(config, key) for key in adapter_settings()}


def _adapter(settings: dict[str, Any], training: dict[str, Any], method: Any) -> DrLoraConfig:
    warmup = {"warmup_steps": training["warmup_steps"]}
    return make_adapter_config({**warmup, **settings}, check_type(method, str | None, "method"))


def _training(settings: dict[str, Any], objective: Objective) -> dict[str, Any]:
    known = {**_hints(cast(Any, objective.config)), **_hints(OwnSettings)}
    known["fsdp"] = bool | str | None  # as transformers documents it; its annotation says text
    names = {f.name for f in (*fields(objective.config), *fields(OwnSettings))}
    common = COMMON_TRAINING.format(own=", ".join(OWN), config=objective.config.__name__)
    for key in settings:
        if key in NOT_IN_RECIPES:
            raise ConfigError(f"training.{key} cannot be set in a recipe: {NOT_IN_RECIPES[key]}.")
    refuse_unknown(settings, names, "training", _homes(), common)
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
    return {**TRAINING_DEFAULTS, **objective.defaults, **checked}


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    section = tree.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(f"{key}={section!r} must be a section of `setting: value` lines.")
    return section


def quantise_section(settings: dict[str, Any]) -> QuantiseSection:
    """A QuantiseSection from a section `quantise`.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """
    section: QuantiseSection = _build(QuantiseSection, settings, "quantise")
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
    configs = [one.config for one in OBJECTIVES.values()]
    names = {f.name for kind in (*configs, OwnSettings) for f in fields(kind)}
    homes = {name: f"training.{name}" for name in names}
    homes |= {f.name: f"evaluation.{f.name}" for f in fields(EvaluationSection)}
    homes |= {f.name: f"quantise.{f.name}" for f in fields(QuantiseSection)}
    homes |= {f.name: f"data.{f.name}" for f in fields(DataSection)}
    homes |= {key: f"adapter.{key}" for key in (*adapter_settings(), "preset")}
    homes |= {key: f"adapter.options.{key}" for key in (*GENERAL, *registered_options())}
    homes["warmup_steps"] = "training.warmup_steps"
    return homes | {f.name: f.name for f in fields(Recipe)}
