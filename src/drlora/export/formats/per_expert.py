"""The format `per-expert`: 2-D LoRA keys of each expert, as vLLM, SGLang and llama.cpp read them.

    base_model.model.model.layers.0.mlp.experts.7.gate_proj.lora_A.weight       (r, in-features)

Keys carry the names of the model's own checkpoint, and it is transformers' own way of splitting
fused experts for the checkpoint that splits the factors here: a matrix A in the place of W gives
each expert's A. Gate, up and down are written for every expert, at one rank and with scaling 1.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import (
    _MODEL_TO_CONVERSION_PATTERN,
    _MOE_FUSED_TARGETS,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from drlora.errors import CheckpointError, ConfigError
from drlora.export.format import LoraFormat, name_base_from_root, write_tokens
from drlora.export.make import Made
from drlora.export.peft_lora import make_config as make_peft_config
from drlora.export.updates import Updates, base_of, unread_keys
from drlora.io.run_files import ADAPTER_WEIGHTS

_ROOT = "base_model.model."
_GATE = "gate"
_EXPERT_KEY = re.compile(r"\.experts\.\d+\.\w+\.weight$")
_LORA_KEY = re.compile(r"\.experts\.\d+\.(\w+)\.lora_[AB]\.weight$")


def make_config(updates: Updates, base: PreTrainedModel, tensors: dict[str, Tensor]) -> LoraConfig:
    """PEFT's configuration of the export, which names layers as the checkpoint does."""
    config = make_peft_config(updates, base)
    named = {f"{name}.weight" for name in updates.routers if name.endswith(f".{_GATE}")}
    kept = [name for name in _linear_parameters(config) if name not in named]
    config.target_parameters = kept or None
    leaves = {match[1] for match in map(_LORA_KEY.search, tensors) if match}
    leaves |= _router_leaves(updates)
    config.target_modules = sorted({*(config.target_modules or ()), *leaves})
    return config


def make_tensors(updates: Updates, base: PreTrainedModel) -> dict[str, Tensor]:
    """Key -> tensor of the whole adapter file.

    Raises:
        ConfigError: if the model's checkpoint does not keep experts apart, or they have no gate.
    """
    rank = updates.rank
    tensors: dict[str, Tensor] = {}
    for name, factors in updates.experts.items():
        if name.endswith(".up_proj"):
            raise ConfigError(
                f"{name}: an expert without a gate has no gate_proj, which readers of per-expert "
                f"adapters ask for; use the format peft or merged."
            )
        a_ErI, b_EOr = factors.padded(rank)
        if name.endswith("gate_up_proj"):
            a_ErI = torch.cat(
                [a_ErI, a_ErI], dim=1
            )  # split in halves below: one for gate, one for up
        for kind, stacked in (("A", a_ErI), ("B", b_EOr)):
            for key, tensor in _split(base, name, stacked).items():
                lora_key = key.removesuffix("weight") + f"lora_{kind}.weight"
                tensors[_ROOT + lora_key] = tensor.contiguous()
    for name, factors in updates.linears.items():
        a_ErI, b_EOr = factors.padded(rank)
        stored = _name_in_checkpoint(base, name) if name in updates.routers else name
        tensors[f"{_ROOT}{stored}.lora_A.weight"] = a_ErI[0]
        tensors[f"{_ROOT}{stored}.lora_B.weight"] = b_EOr[0]
    for name, state in updates.modules.items():
        tensors |= {f"{_ROOT}{name}.{key}": value for key, value in state.items()}
    return tensors | {f"{_ROOT}{key}": value for key, value in updates.embeddings.items()}


def _split(base: PreTrainedModel, name: str, stacked: Tensor) -> dict[str, Tensor]:
    """What transformers makes of a stacked parameter for the checkpoint: a tensor each expert."""
    try:
        apart = revert_weight_conversion(base, {name: stacked})
    except (AttributeError, KeyError, RuntimeError, ValueError):
        apart = {}  # it asks for the parameter's own shape, which a factor does not have
    if not apart or not all(_EXPERT_KEY.search(key) for key in apart):
        found = f" as {sorted(apart)[:2]}" if apart else " in another shape"
        raise ConfigError(
            f"{type(base).__name__} has no per-expert layout: its checkpoint keeps {name}{found}; "
            f"use the format peft or merged."
        )
    return apart


def _name_in_checkpoint(base: PreTrainedModel, name: str) -> str:
    """What the checkpoint calls a module with one weight; its own name where it is not told."""
    weight = {f"{name}.weight": torch.zeros(1, 1)}
    stored = list(revert_weight_conversion(base, weight))
    return stored[0].removesuffix(".weight") if len(stored) == 1 else name


def _router_leaves(updates: Updates) -> set[str]:
    """`gate` if routers of that name leave as LoRA; PEFT makes a parameter of it by itself."""
    return {_GATE} & {name.rpartition(".")[2] for name in updates.routers}


def read_back(base: PreTrainedModel, updates: Updates) -> PeftModel:
    """`base` with what PEFT's own converter of per-expert keys makes of the tensors."""
    tensors = make_tensors(updates, base)
    config = make_config(updates, base, tensors)
    if not _peft_converts_configs(base):
        config = _converted_config(updates, base)
    with warnings.catch_warnings():
        # PEFT converts rank_pattern itself, applies it, and then says that it matched nothing.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    missing, unexpected = unread_keys(model, tensors)
    if missing or unexpected:
        raise CheckpointError(
            f"PEFT does not read back the per-expert layout of {type(base).__name__}: missing "
            f"{missing[:2]}, unexpected {unexpected[:2]}. Nothing was written; use the "
            f"format peft or merged."
        )
    return model


def _notes(updates: Updates, base: PreTrainedModel) -> list[str]:
    """What the user of such an export should know."""
    found = []
    if updates.modules:
        found.append(
            f"{len(updates.modules)} modules were trained in full (such as "
            f"{next(iter(updates.modules))}); engines that take LoRA alone refuse them: use merged"
        )
    if updates.routers:
        found.append("SGLang has no LoRA on routers: use merged there")
    if not _peft_converts_configs(base):
        found.append(
            f"this export is for serving engines: PEFT does not load per-expert adapters of "
            f"model type {base.config.model_type!r} from a folder"
        )
    return found


def _peft_converts_configs(base: PreTrainedModel) -> bool:
    """Whether PEFT maps the names of an expert's layers to the fused parameters of this model."""
    return _MODEL_TO_CONVERSION_PATTERN.get(base.config.model_type) in _MOE_FUSED_TARGETS


def _converted_config(updates: Updates, base: PreTrainedModel) -> LoraConfig:
    """What PEFT would make of the configuration: fused, gate and up with a rank each."""
    config = make_peft_config(updates, base)
    config.rank_pattern = {r".*\.gate_up_proj": 2 * updates.rank}
    config.alpha_pattern = dict(config.rank_pattern)
    return config


def _linear_parameters(config: LoraConfig) -> list[str]:
    """Ordinary linear layers that are targeted as parameters."""
    return sorted(name for name in config.target_parameters or () if name.endswith(".weight"))


class PerExpert(LoraFormat):
    """For engines that keep experts apart."""

    name = "per-expert"
    summary = (
        "A DR-LoRA adapter as LoRA of rank {rank} on the gate, up and down projection of every "
        "expert, in 2-D tensors, for engines that keep experts apart."
    )
    all_matrices = True
    routers = "exact"

    def size_bytes(self, base: PreTrainedModel, updates: Updates) -> int:
        tensors = make_tensors(updates, base)
        return sum(x.numel() * x.element_size() for x in tensors.values())

    def notes(self, base: PreTrainedModel, updates: Updates) -> list[str]:
        return _notes(updates, base)

    def peft_loads(self, base: PreTrainedModel) -> bool:
        return _peft_converts_configs(base)

    def attach(self, base: PreTrainedModel, updates: Updates) -> PeftModel:
        return read_back(base, updates)

    def write(
        self,
        made: Made,
        updates: Updates | None,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        max_shard_size: str | None,
    ) -> None:
        assert updates is not None
        write_tokens(updates, tokenizer, folder)
        base = base_of(made.result, "default")
        tensors = make_tensors(updates, base)
        config = make_config(updates, base, tensors)
        config.inference_mode = True
        name_base_from_root(config)
        config.save_pretrained(str(folder))
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


class LoraForOneReader(PerExpert):
    """The same tensors in a form that a single reader takes, which holds LoRA alone.

    Attributes:
        reader: its name.
        way_on: what to do with the format merged instead, as the end of a sentence.
    """

    reader: ClassVar[str]
    way_on = "use the format merged"

    def size_bytes(self, base: PreTrainedModel, updates: Updates) -> int:
        whole = [*updates.modules, *updates.embeddings]
        if whole:
            raise ConfigError(
                f"{whole[0]} was trained in full or resized, and adapters of {self.reader} hold "
                f"LoRA alone; {self.way_on}."
            )
        return super().size_bytes(base, updates)

    def notes(self, base: PreTrainedModel, updates: Updates) -> list[str]:
        return []

    def peft_loads(self, base: PreTrainedModel) -> bool:
        return False


FORMAT = PerExpert()
