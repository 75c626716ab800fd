"""How answers are drawn: settings by the names that transformers' GenerationConfig has for them.

What is not given is what the model's own generation_config says; without one the likeliest token
is taken each time, and an answer has at most 256 of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from drlora.data import pad_token_id
from drlora.errors import ConfigError, first_line
from drlora.io.settings import check_type, refuse_unknown, split_override

MOST_NEW_TOKENS = 256
SAMPLED = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "top_h": float,
    "typical_p": float,
    "epsilon_cutoff": float,
    "eta_cutoff": float,
}
SETTINGS: dict[str, Any] = {
    "max_new_tokens": int,
    "min_new_tokens": int,
    "max_time": float,
    "stop_strings": str | list[str],
    "do_sample": bool,
    **SAMPLED,
    "num_beams": int,
    "length_penalty": float,
    "repetition_penalty": float,
    "no_repeat_ngram_size": int,
    "use_cache": bool,
}


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, with do_sample where one of them has an effect only then.

    Raises:
        ConfigError: if a name is not known, a value is of the wrong kind, or two contradict.
    """
    refuse_unknown(settings, SETTINGS, "", shown=", ".join(SETTINGS))
    found = {key: check_type(value, SETTINGS[key], key) for key, value in settings.items()}
    drawn = [key for key in found if key in SAMPLED]
    if drawn and not found.setdefault("do_sample", True):
        raise ConfigError(
            f"{drawn[0]}={found[drawn[0]]} has no effect with do_sample=false; keep one."
        )
    if found.get("temperature") == 0:
        raise ConfigError("temperature=0 divides by 0; for the likeliest tokens: do_sample=false.")
    try:
        GenerationConfig(**found).validate(strict=True)
    except ValueError as error:
        raise ConfigError(f"transformers refuses these settings: {error}") from error
    return found


def settings_from(overrides: Sequence[str]) -> dict[str, Any]:
    """The settings that `temperature=0.7` and the like give.

    Raises:
        ConfigError: if one is no override.
    """
    return {".".join(key): value for key, value in map(split_override, overrides)}


def generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> GenerationConfig:
    """The model's own, with checked `settings` on top, and the tokens that end an answer."""
    config = copy.deepcopy(model.generation_config)
    config.max_length = None  # counts the prompt too, and is 20 by default
    if config.max_new_tokens is None:
        config.max_new_tokens = MOST_NEW_TOKENS
    if settings.get("do_sample") is False:
        for name in SAMPLED:  # the model's own, without effect now
            setattr(config, name, None)
    for name, value in settings.items():
        setattr(config, name, value)
    config.eos_token_id = end_tokens(model, tokenizer)
    config.pad_token_id = pad_token_id(tokenizer)
    return config


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the model's, the tokenizer's, and what the template ends a turn with.

    A model whose template was brought by the adapter may not know the last one itself.
    """
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    ends = [*ends, tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    return sorted({end for end in ends if end is not None})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts right after an assistant's words."""
    if not tokenizer.chat_template:
        return None
    answer = "qzqzq"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # whatever a template says that takes no such conversation
        return None
    ids = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None


def refusal(error: Exception) -> ConfigError:
    """What transformers says when it generates, as our error."""
    return ConfigError(f"transformers cannot generate so: {first_line(error)}.")
