"""The format `sglang`: stacked LoRA tensors, as SGLang reads them for any family.

    base_model.model.model.layers.0.mlp.experts.gate_up_proj.lora_A.weight   (E, r, H)
    base_model.model.model.layers.0.mlp.experts.gate_up_proj.lora_B.weight   (E, 2I, r)
    base_model.model.model.layers.0.mlp.experts.down_proj.lora_A.weight      (E, r, I)
    base_model.model.model.layers.0.mlp.experts.down_proj.lora_B.weight      (E, H, r)

Of the 2I outputs gate's come first, then up's, also where the model has them in turns (GPT-OSS):
SGLang turns them itself. So it has a place for experts that a checkpoint does not keep apart, and
`target_modules` are the names that it knows, also where a checkpoint has others (Mixtral's w1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drlora.adapter.layer import DrLoraExperts
from drlora.errors import ConfigError
from drlora.export.format import LoraFormat
from drlora.export.make import Made
from drlora.export.peft_lora import attach, make_config, refuse_if_not_readable
from drlora.export.updates import Updates, base_of
from drlora.io.places import from_root
from drlora.io.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from drlora.moe.blocks import find_blocks
from drlora.moe.families import family_of
from drlora.ops.weights import Matrix

_ROOT = "base_model.model."
_MATRICES: dict[str, Matrix] = {"gate_up_proj": "gate_up", "down_proj": "down"}


def stack(updates: Updates, base: PreTrainedModel) -> dict[str, Tensor]:
    """Key -> tensor of the whole adapter file.

    Args:
        updates: as PEFT puts them on the model.
        base: the model, with the adapter or without; its weights are not read.

    Raises:
        ConfigError: if the experts have no gate.
    """
    in_turns = {b.experts_name for b in find_blocks(base) if b.is_interleaved}
    tensors: dict[str, Tensor] = {}
    for name, factors in updates.experts.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _MATRICES:
            raise ConfigError(
                f"{name}: SGLang's adapters have a gate beside every up projection, and these "
                f"experts have none; use the format merged."
            )
        if _is_exchanged(base.get_submodule(module), _MATRICES[leaf]):
            factors = factors.transposed()
        a_ErI, b_EOr = factors.padded(updates.rank)
        if leaf == "gate_up_proj" and module in in_turns:
            b_EOr = torch.cat([b_EOr[:, 0::2], b_EOr[:, 1::2]], dim=1)
        tensors[f"{_ROOT}{name}.lora_A.weight"] = a_ErI.contiguous()
        tensors[f"{_ROOT}{name}.lora_B.weight"] = b_EOr.contiguous()
    for name, factors in updates.linears.items():
        a_ErI, b_EOr = factors.padded(updates.rank)
        tensors[f"{_ROOT}{name}.lora_A.weight"] = a_ErI[0]
        tensors[f"{_ROOT}{name}.lora_B.weight"] = b_EOr[0]
    return tensors


def _is_exchanged(experts: nn.Module, matrix: Matrix) -> bool:
    """Whether PEFT takes in- for out-features (see `updates.seen_transposed`)."""
    module: Any = experts.get_base_layer() if isinstance(experts, DrLoraExperts) else experts
    family = family_of(module)
    assert family is not None
    is_transposed = family.weights(module).matrix(matrix).is_transposed
    return is_transposed != getattr(module, "is_transposed", False)


class _SGLang(LoraFormat):
    name = "sglang"
    summary = "A DR-LoRA adapter of rank {rank} on every expert, in stacked tensors, for SGLang."
    all_matrices = True

    def size_bytes(self, base: PreTrainedModel, updates: Updates) -> int:
        whole = [*updates.modules, *updates.embeddings, *updates.routers]
        if whole:
            raise ConfigError(
                f"{whole[0]} was trained, and SGLang has no LoRA on routers and takes no modules "
                f"trained in full; use the format merged."
            )
        refuse_if_not_readable(base, updates)
        tensors = stack(updates, base)
        return sum(x.numel() * x.element_size() for x in tensors.values())

    def peft_loads(self, base: PreTrainedModel) -> bool:
        return False

    def attach(self, base: PreTrainedModel, updates: Updates) -> PeftModel:
        return attach(base, updates)

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
        config: dict[str, Any] = make_config(updates, base).to_dict()
        leaves = {name.rpartition(".")[2] for name in (*updates.experts, *updates.linears)}
        named = config["base_model_name_or_path"]
        config |= {
            "target_modules": sorted(leaves),
            "target_parameters": None,
            "inference_mode": True,
            "base_model_name_or_path": from_root(named) if named else None,
        }
        text = json.dumps(config, indent=2, default=_plain) + "\n"
        (folder / ADAPTER_CONFIG).write_text(text, "utf-8")
        save_file(stack(updates, base), folder / ADAPTER_WEIGHTS, {"format": "pt"})


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


FORMAT = _SGLang()
