"""From a recipe to its parts: architecture, tokenizer, weights, adapter.

The order in which train.py calls these is the order of cost: what can be refused from the
configuration is refused before data is read, and what data can tell before weights are loaded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import set_zero3_state

from drlora.adapter.embeddings import fit_embeddings
from drlora.adapter.inject import choose_blocks
from drlora.config.adapter import DrLoraConfig
from drlora.embedded import resolve_model
from drlora.errors import CheckpointError, ConfigError, DrLoraError, first_line
from drlora.export.import_lora import load_peft_lora, refuse_other_files
from drlora.io.files import read_text
from drlora.io.places import from_root
from drlora.io.run_files import CONFIG
from drlora.moe.stored.config import loading_settings
from drlora.ranks.continue_adapter import continue_adapter, is_drlora, refuse_unfit
from drlora.ranks.rank_map import read_rank_map, start_ranks
from drlora.ranks.schedule import Competitors, Schedule, make_schedule, plan_of
from drlora.runs.data_section import DataSection
from drlora.runs.quantise import QuantiseSection
from drlora.runs.recipe import Recipe

DEFAULT_MAX_LENGTH = 1024


class NamesModel(Protocol):
    """What says where a model comes from: a Recipe, or the base of an adapter."""

    @property
    def model(self) -> str: ...

    @property
    def tokenizer(self) -> str | None: ...

    @property
    def dtype(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def quantise(self) -> QuantiseSection: ...


def load_architecture(model: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config: of `embedded`, a folder, a config.json, or the hub. No weights.

    Raises:
        ConfigError: if there is no such model.
    """
    with _told(f"model={model!r} cannot be loaded", _MODEL_HINT):
        return AutoConfig.from_pretrained(resolve_model(model), trust_remote_code=trust_remote_code)


def model_on_meta(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` without memory for its weights.

    Raises:
        ConfigError: if `config` is not of a causal language model.
    """
    what = f"{type(config).__name__} gives no causal language model"
    # ZeRO-3 splits what is made while a run under it is set up, and here is nothing to split.
    with _told(what, _SCRIPT_HINT), set_zero3_state(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def check_growth(model: PreTrainedModel, config: DrLoraConfig, total_steps: int) -> int:
    """Refuse a model without fitting blocks, or a run that cannot spend the budget.

    Returns:
        The step after which ranks grow last; 0 if they do not.

    Raises:
        ConfigError: with the arithmetic.
    """
    groups = [Competitors(block.num_experts) for block in choose_blocks(model, config)]
    return last_event(model, config, make_schedule(config, groups, total_steps))


def last_event(model: PreTrainedModel, config: DrLoraConfig, schedule: Schedule) -> int:
    """The step after which ranks grow last; 0 if they do not."""
    experts = {block.num_experts for block in choose_blocks(model, config)}
    plans = [plan_of(config, num_experts, schedule) for num_experts in experts]
    return max((plan.event_steps[-1] for plan in plans if plan.event_steps), default=0)


def load_tokenizer(recipe: NamesModel, vocab_size: int) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer.

    Raises:
        ConfigError: if there is none, or it knows more tokens than the model (`vocab_size`).
    """
    name = resolve_model(recipe.tokenizer or recipe.model)
    with _told(f"the tokenizer of {name!r} cannot be loaded", "Set tokenizer: to one that fits."):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=recipe.trust_remote_code)
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"the tokenizer {name!r} has {len(tokenizer)} tokens, but the model {recipe.model!r} "
            f"knows {vocab_size}; set tokenizer: to the one the model was trained with."
        )
    return tokenizer


def fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, eos_token: str | None = None
) -> None:
    """Give the tokenizer the recipe's chat template, and the token that ends a turn.

    Both are saved with the adapter, so that whoever uses it writes prompts as they were trained.

    Raises:
        ConfigError: if there is no such template or token.
    """
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"training.eos_token={eos_token!r} is no token of {tokenizer.name_or_path!r}."
            )
        tokenizer.eos_token = eos_token
    if recipe.chat_template is None:
        return
    if recipe.chat_template.endswith((".jinja", ".jinja2", ".j2")):
        tokenizer.chat_template = read_text(Path(recipe.chat_template), 2**20, ConfigError)
        return
    name = resolve_model(recipe.chat_template)
    with _told(f"chat_template={name!r} cannot be loaded", _TEMPLATE_HINT):
        other = AutoTokenizer.from_pretrained(name, trust_remote_code=recipe.trust_remote_code)
    if not other.chat_template:
        raise ConfigError(f"chat_template={name!r} has no chat template. {_TEMPLATE_HINT}")
    tokenizer.chat_template = other.chat_template


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens the model has an embedding for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def longest_example(data: DataSection | None, model: str, config: PreTrainedConfig) -> int:
    """`data.max_length`, or by default what the model takes, at most 1024; in tokens.

    Raises:
        ConfigError: if the model cannot take examples of that length.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    wanted = (data.max_length if data else None) or min(DEFAULT_MAX_LENGTH, longest)
    if wanted > longest:
        raise ConfigError(
            f"data.max_length={wanted} is more than the {longest} tokens that {model!r} takes; "
            f"lower it."
        )
    return int(wanted)


def checkpoint_settings(recipe: NamesModel) -> dict[str, Any]:
    """What `from_pretrained` is given to keep the model as a recipe or its checkpoint says.

    Raises:
        ConfigError: if the checkpoint is quantised in a way that cannot be kept.
    """
    return loading_settings(
        from_root(resolve_model(recipe.model)),
        recipe.quantise.config(),
        trust_remote_code=recipe.trust_remote_code,
    )


def load_base_model(recipe: NamesModel) -> PreTrainedModel:
    """The model with its weights.

    Raises:
        ConfigError: if they are missing or damaged.
    """
    with _told(f"the weights of model={recipe.model!r} cannot be loaded", _MODEL_HINT):
        load: Any = AutoModelForCausalLM.from_pretrained
        name = from_root(resolve_model(recipe.model))  # what adapters will say their base is
        kept = checkpoint_settings(recipe)
        model, report = load(
            name,
            dtype="auto" if recipe.dtype == "auto" else getattr(torch, recipe.dtype),
            trust_remote_code=recipe.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
            **kept,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random weights in their place.
        raise ConfigError(
            f"the weights of model={recipe.model!r} are incomplete: {len(missing)} tensors are "
            f"missing, {missing[0]} for one. {_MODEL_HINT}"
        )
    return model


def check_start(recipe: Recipe) -> None:
    """Refuse what a new adapter cannot start from, before anything is loaded.

    Raises:
        CheckpointError: if `start_from` holds no adapter, or `start_ranks` no rank map.
        ConfigError: if `start_from_ranks` is for another kind of adapter.
    """
    if recipe.start_from and continues_drlora(recipe):
        refuse_unfit(Path(recipe.start_from))
    elif recipe.start_from:
        refuse_other_files(Path(recipe.start_from))
        if recipe.start_from_ranks:
            raise ConfigError(
                f"start_from_ranks={recipe.start_from_ranks!r} is for a DR-LoRA adapter; the LoRA "
                f"in {recipe.start_from} has one rank for all, and grows as the section adapter "
                f"says. Leave it out."
            )
    if recipe.start_ranks:
        read_rank_map(recipe.start_ranks)


def continues_drlora(recipe: Recipe) -> bool:
    """Whether `start_from` is a run, or a folder with a DR-LoRA adapter."""
    folder = Path(recipe.start_from or "")
    return bool(recipe.start_from) and (is_drlora(folder) or (folder / CONFIG).is_file())


def add_adapter(
    model: PreTrainedModel, recipe: Recipe, checkpoint: Path | None = None
) -> PeftModel:
    """The model with a new DR-LoRA adapter; its base is frozen.

    Args:
        model: the base model.
        recipe: says what the adapter is, and where it starts from.
        checkpoint: what the run is to continue from. Its tensors are not loaded here, but nothing
            is taken from `start_from` and `start_ranks` any more.

    Raises:
        CheckpointError: if what it starts from is damaged or was made for another model.
        ConfigError: if it does not fit the settings.
    """
    config = recipe.adapter_config()
    if checkpoint is not None and recipe.start_from:
        # The layers that the LoRA had, without asking it again.
        config = DrLoraConfig.from_pretrained(str(checkpoint))
        config.inference_mode = False
    if checkpoint is None and recipe.start_from and continues_drlora(recipe):
        ranks = recipe.start_from_ranks or "keep"
        peft_model = continue_adapter(model, recipe.start_from, config, ranks)
    elif checkpoint is None and recipe.start_from:
        peft_model = load_peft_lora(model, recipe.start_from, config)
    else:
        peft_model = cast(PeftModel, get_peft_model(model, config))
    if checkpoint is None and recipe.start_ranks:
        start_ranks(peft_model, recipe.start_ranks)
    return peft_model


def load_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """The model with the adapter that was saved in `folder`, and the embedding rows of that.

    Raises:
        CheckpointError: if the adapter is missing, damaged, or was made for another model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            fit_embeddings(model, Path(folder))
            # Of per-expert adapters; PEFT has already used these patterns up when it says so.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
            # Made without memory: what is missing in the file, or of another shape, takes none.
            return PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
    except DrLoraError as error:
        raise CheckpointError(f"the adapter in {folder} cannot be used: {error}") from error
    except Exception as error:  # whatever PEFT makes of a file that it does not understand
        raise CheckpointError(
            f"the adapter in {folder} cannot be loaded: {first_line(error)}. It is incomplete or "
            f"damaged; train it again, or copy it again from where it came."
        ) from error


_TEMPLATE_HINT = "Name a .jinja file, or a folder or a model of the hub whose tokenizer has one."
_SCRIPT_HINT = (
    "A model that also sees or hears is trained from a script, by TRL's SFTTrainer with the "
    "callback of drlora."
)
_MODEL_HINT = "Name a local folder with a model, a model of the hub, or `embedded`."


@contextmanager
def _told(what: str, way_out: str) -> Iterator[None]:
    """What transformers raises for a user's mistake, in one sentence."""
    try:
        yield
    except DrLoraError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{what}: {first_line(error)}. {way_out}".strip()) from error
