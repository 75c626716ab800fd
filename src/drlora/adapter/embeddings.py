"""Embeddings that were resized for tokens of one's own: whose rows, and whether a file has them.

PEFT saves a model's input and output embeddings with an adapter where they have other rows than the
base model's own checkpoint. Whoever loads the adapter must bring the base to the same rows first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import TOKENIZER_CONFIG_NAME
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from drlora.errors import CheckpointError
from drlora.io.files import read_shapes
from drlora.io.run_files import ADAPTER_WEIGHTS

# What stands between the name of an embedding and its weight in the files that PEFT writes.
_PARTS = ("", "original_module.", "modules_to_save.", "base_layer.")
_ROOT = "base_model.model."


def embedding_names(model: nn.Module) -> list[str]:
    """Names of the input and the output embedding among the model's modules."""
    if not hasattr(model, "get_input_embeddings"):
        return []
    inner: Any = model
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def has_tied_embeddings(model: nn.Module) -> bool:
    """Whether input and output embedding of the base model are one tensor."""
    inner: Any = model
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    kept = [getattr(m, "original_module", getattr(m, "base_layer", m)) for m in ends]
    return None not in kept and kept[0].weight is kept[1].weight


def rows_before(model: nn.Module) -> int | None:
    """Embedding rows in the base model's own checkpoint, where they are not those of `model`.

    None too where that checkpoint's config is not at hand. PEFT asks the same.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    now = _vocabulary(config)
    if not name or now is None:
        return None
    try:
        stored = type(config).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return None
    before = _vocabulary(stored)
    return None if before == now else before


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def fit_embeddings(model: PreTrainedModel, folder: Path) -> None:
    """Give a base model the embedding rows that the adapter in `folder` was saved with.

    They are those of the embeddings in the adapter's file; where it has none, the tokens of the
    tokenizer beside it if these are more than the model has rows, as PEFT's AutoPeftModel does.

    Raises:
        CheckpointError: if the file is damaged, or the model does not let itself be resized.
    """
    names = embedding_names(model)
    if not names:
        return
    shapes = read_shapes(folder / ADAPTER_WEIGHTS)
    keys = [f"{_ROOT}{name}.{part}weight" for name in names for part in _PARTS]
    rows = next((shapes[key][0] for key in keys if key in shapes), None)
    if rows is None:
        rows = max(_rows(model), _tokens_beside(folder))
    _resize(model, rows)


def _tokens_beside(folder: Path) -> int:
    """Number of tokens of the tokenizer in a folder; 0 if it has none that can be read."""
    if not (folder / TOKENIZER_CONFIG_NAME).is_file():
        return 0
    try:
        return len(AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError, KeyError, ImportError):
        return 0


def _resize(model: PreTrainedModel, rows: int) -> None:
    """Change the rows; new ones are the same each time."""
    if rows == _rows(model):
        return
    on_meta = any(p.device.type == "meta" for p in model.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(rows, mean_resizing=not on_meta)
    except (NotImplementedError, RuntimeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"the adapter has embeddings of {rows} rows, and those of {type(model).__name__} "
            f"({_rows(model)}) cannot be resized: {error}"
        ) from error


def _rows(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
