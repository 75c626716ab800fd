"""The format `mlx`: an adapter as mlx-lm reads it, one stacked tensor each projection of a block.

    model.layers.0.mlp.switch_mlp.gate_proj.lora_a     (E, r, in-features)
    model.layers.0.mlp.switch_mlp.gate_proj.lora_b     (E, out-features, r)
    model.layers.0.self_attn.q_proj.lora_a             (in-features, r), lora_b (r, out-features)

Names are the checkpoint's, as in `per-expert`, with mlx-lm's own for the experts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drlora.export.formats.per_expert import LoraForOneReader, make_tensors
from drlora.export.make import Made
from drlora.export.updates import Updates, base_of
from drlora.io.run_files import ADAPTER_CONFIG, EXPORT_RECORD, MLX_WEIGHTS, README

_EXPERT = re.compile(r"^base_model\.model\.(.+)\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight$")
_LINEAR = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
_LAYER = re.compile(r"^(?:.+\.)?layers\.\d+\.")
# The names of Mixtral's checkpoint; others have mlx-lm's own.
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """mlx-lm's tensors from those of the format per-expert."""
    experts: dict[str, dict[int, Tensor]] = {}
    found = {}
    for key, tensor in tensors.items():
        if match := _EXPERT.match(key):
            block, expert, leaf, kind = match.groups()
            name = f"{block}.switch_mlp.{_LEAVES.get(leaf, leaf)}.lora_{kind.lower()}"
            experts.setdefault(name, {})[int(expert)] = tensor
        elif match := _LINEAR.match(key):
            found[f"{match[1]}.lora_{match[2].lower()}"] = tensor.T.contiguous()
    stacked = {
        name: torch.stack([parts[expert] for expert in sorted(parts)])
        for name, parts in experts.items()
    }
    return found | stacked


def make_config(tensors: dict[str, Tensor], rank: int, num_layers: int) -> dict[str, Any]:
    """The contents of adapter_config.json; scalings are in lora_b."""
    names = {_LAYER.sub("", name).rpartition(".")[0] for name in tensors}
    return {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(names)},
    }


class _Mlx(LoraForOneReader):
    name = "mlx"
    reader = "mlx-lm"
    summary = "A DR-LoRA adapter of rank {rank} on every expert, for mlx-lm."
    loading = 'model, tokenizer = mlx_lm.load({base!r}, adapter_path="this folder")'
    files = (ADAPTER_CONFIG, MLX_WEIGHTS, EXPORT_RECORD, README)

    def write(
        self,
        made: Made,
        updates: Updates | None,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        max_shard_size: str | None,
    ) -> None:
        assert updates is not None
        base = base_of(made.result, "default")
        tensors = stack(make_tensors(updates, base))
        layers = base.config.get_text_config().num_hidden_layers
        config = make_config(tensors, updates.rank, layers)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(tensors, folder / MLX_WEIGHTS, metadata={"format": "mlx"})


FORMAT = _Mlx()
