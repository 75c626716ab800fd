"""The base model's own config.json and tokenizer files, for a merged model to keep.

transformers 5 writes a configuration in a form of its own (`rope_parameters`, `num_local_experts`,
`dtype`), which other readers refuse or, where a name that they miss has a default, misread without
a word. So a merged model keeps the file that its base came with, in whatever form that is, with
what merging changes; and only if transformers reads the same from it as from its own.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from drlora.io.files import local_path, read_json

CONFIG_NAME = "config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_DTYPES = ("dtype", "torch_dtype")
# What merging may change, besides the dtype: embeddings of other rows, heads of their own.
_CHANGED = ("vocab_size", "tie_word_embeddings")
_NOT_COMPARED = ("_name_or_path", "transformers_version", "architectures")


def base_file(name: str | None, file: str) -> Path | None:
    """A file of the model `name`, a folder or one of the hub that is on this machine already."""
    if not name:
        return None
    folder = local_path(name)
    if folder is not None:
        return folder / file if (folder / file).is_file() else None
    try:
        found = cached_file(
            name,
            file,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def own_config(model: PreTrainedModel) -> tuple[dict[str, Any] | None, str]:
    """The configuration that a merged `model` keeps of its base, and a note if it cannot.

    Returns:
        The contents of config.json, or None where transformers' own form has to do; and why, where
        the base has a file, else nothing.
    """
    path = base_file(model.config._name_or_path, CONFIG_NAME)
    if path is None or not type(model.config).__module__.startswith("transformers."):
        return None, ""
    kept = copy.deepcopy(read_json(path))
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for part in (kept, *(value for value in kept.values() if isinstance(value, dict))):
        part.pop("quantization_config", None)
        for key in _DTYPES:
            if part.get(key) is not None:
                part[key] = str(model.dtype).removeprefix("torch.")
        for key in _CHANGED:
            if key in part and isinstance(part[key], int):
                part[key] = getattr(config.get_text_config(), key)
    if not any(key in kept for key in _DTYPES):
        kept["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    kept.setdefault("architectures", [type(model).__name__])
    other = _read_otherwise(kept, config)
    if other:
        return None, (
            f"config.json is in the form of transformers, for the base's own reads otherwise "
            f"({', '.join(other[:3])})"
        )
    return kept, ""


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Put the base's own config.json into the place of transformers', where it says the same."""
    kept, _ = own_config(model)
    if kept is not None:
        text = json.dumps(kept, indent=2, ensure_ascii=False)
        (folder / CONFIG_NAME).write_text(text + "\n", "utf-8")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, base: str | None, folder: Path) -> None:
    """The tokenizer's files: the base's own, where its tokenizer is the same."""
    found = [base_file(base, name) for name in _TOKENIZER_FILES]
    paths = [path for path in found if path is not None]
    if not paths or not _is_same(tokenizer, paths[0].parent):
        tokenizer.save_pretrained(folder)
        return
    for path in paths:
        shutil.copyfile(path, folder / path.name)


def _read_otherwise(kept: dict[str, Any], config: Any) -> list[str]:
    """Names of the settings that transformers reads otherwise from `kept` than they are."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        (Path(one) / CONFIG_NAME).write_text(json.dumps(kept), "utf-8")
        config.save_pretrained(two)
        try:
            read, wanted = (AutoConfig.from_pretrained(f).to_dict() for f in (one, two))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"it cannot be read: {type(error).__name__}"]
    names = {*read, *wanted} - set(_NOT_COMPARED)
    return sorted(name for name in names if read.get(name) != wanted.get(name))


def _is_same(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    try:
        own = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError):
        return False
    return (
        type(own) is type(tokenizer)
        and own.get_vocab() == tokenizer.get_vocab()
        and own.chat_template == tokenizer.chat_template
        and own.special_tokens_map == tokenizer.special_tokens_map
        and own.padding_side == tokenizer.padding_side
    )
