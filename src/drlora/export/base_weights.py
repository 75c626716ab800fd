"""The base model by its files: blocks from its configuration, weights one expert at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from drlora.embedded import resolve_model
from drlora.errors import CheckpointError, ConfigError
from drlora.export.base_files import CONFIG_NAME, base_file
from drlora.io.files import read_json
from drlora.moe.blocks import MoEBlock, find_blocks

# What a projection is called in checkpoints.
LEAVES = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down",
    "w2": "down", "gate_up_proj": "gate_up",
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OPEN = 2  # files at once
EXPERT_KEY = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")


@dataclass
class Weights:
    """The safetensors files of a model's folder; tensors are read when they are asked for.

    Attributes:
        files: name of a tensor -> its file.
    """

    files: dict[str, Path]
    _open: dict[Path, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Of a folder; without files if it holds none."""
        if (folder / INDEX).is_file():
            names = read_json(folder / INDEX).get("weight_map", {})
            return cls({key: folder / file for key, file in names.items()})
        if not (folder / SINGLE).is_file():
            return cls({})
        with safe_open(folder / SINGLE, "pt") as file:
            return cls({key: folder / SINGLE for key in file.keys()})  # noqa: SIM118

    def _file(self, key: str) -> Any:
        path = self.files[key]
        if path not in self._open:
            while len(self._open) >= OPEN:  # what is mapped of a file counts as memory
                del self._open[next(iter(self._open))]
            self._open[path] = safe_open(path, "pt")
        return self._open[path]

    def read(self, key: str, expert: int | None = None) -> Tensor:
        """A tensor, or of a stacked one the part of one expert."""
        file = self._file(key)
        return file.get_tensor(key) if expert is None else file.get_slice(key)[expert]

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._file(key).get_slice(key).get_shape())


@dataclass
class Base:
    """A base model without memory for its weights.

    Attributes:
        name: as it was given.
        folder: with its files.
        model: on the meta device.
        blocks: its MoE blocks.
        weights: of its folder.
    """

    name: str
    folder: Path
    model: Any
    blocks: list[MoEBlock]
    weights: Weights
    _stored: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """Of its configuration."""
        return str(self.model.config.model_type)

    def block_of(self, module: str) -> MoEBlock | None:
        """The block of an experts module in any spelling of its name."""
        for block in self.blocks:
            if block.experts_name == module:
                return block
        numbers = numbers_in(module)
        fitting = [b for b in self.blocks if numbers_in(b.experts_name) == numbers]
        return fitting[0] if len(fitting) == 1 else None

    def keys_of(self, block: MoEBlock) -> list[str]:
        """Names of all tensors of this block's experts in the files; none if they are not known."""
        return [key for keys in self._keys(block).values() for key in keys]

    def has_weights(self, block: MoEBlock) -> bool:
        """Whether the files have this block's experts."""
        keys = self.keys_of(block)
        return bool(keys) and all(key in self.weights.files for key in keys)

    def read(self, block: MoEBlock, matrix: str, expert: int, weights: Weights) -> Tensor:
        """(O, I) of one expert's `gate_up`, `gate`, `up` or `down`, in its own dtype.

        `weights`: of the base's folder, or of another with the same names.
        """
        keys = self._keys(block)
        if len(keys["down"]) > 1:  # a tensor each expert
            wanted = ("gate", "up") if matrix == "gate_up" else (matrix,)
            parts = [weights.read(keys[part][expert]) for part in wanted if keys.get(part)]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        whole = "down" if matrix == "down" else "gate_up"
        weight = weights.read(keys[whole][0], expert)
        in_features, out_features = block.shape_of(whole)
        if getattr(self.model.get_submodule(block.experts_name), "is_transposed", False) or (
            weight.shape == (in_features, out_features) != (out_features, in_features)
        ):
            weight = weight.T
        if matrix in (whole, "gate_up"):
            return weight
        _, start, step = block.place_of(matrix)
        return weight[start : start + step * block.expert_width : step]

    def stored_name(self, name: str) -> str:
        """What the files call a parameter of one tensor, by the model's name or their own."""
        if name in self.weights.files:
            return name
        try:
            stored = list(revert_weight_conversion(self.model, {name: torch.zeros(1, 1)}))
        except (AttributeError, KeyError, RuntimeError, ValueError, IndexError):
            return name
        return stored[0] if len(stored) == 1 else name

    def _keys(self, block: MoEBlock) -> dict[str, list[str]]:
        """Matrix -> its tensors in the files: one an expert, or one of all of them."""
        if block.experts_name not in self._stored:
            self._stored[block.experts_name] = self._find_keys(block)
        return self._stored[block.experts_name]

    def _find_keys(self, block: MoEBlock) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        experts: nn.Module = self.model.get_submodule(block.experts_name)
        for leaf, parameter in experts.named_parameters(recurse=False):
            if parameter.dim() != 3:
                continue
            name = f"{block.experts_name}.{leaf}"
            try:
                stored = list(revert_weight_conversion(self.model, {name: parameter.data}))
            except (AttributeError, KeyError, RuntimeError, ValueError):
                stored = [name]
            numbered = [(key, EXPERT_KEY.search(key)) for key in stored]
            if all(match for _, match in numbered):
                for key, match in sorted(numbered, key=lambda pair: int(pair[1][1])):  # type: ignore[index]
                    found.setdefault(LEAVES.get(match[2], match[2]), []).append(key)  # type: ignore[index]
            elif len(stored) > 1:
                return {}  # gate and up of all experts, each by itself
            else:
                found["down" if leaf == "down_proj" else "gate_up"] = stored
        return found if "down" in found else {}


def numbers_in(name: str) -> tuple[int, ...]:
    """The layer's number in a module's name, which every spelling of it has."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def find_base(name: str) -> Base:
    """The model in a folder, `embedded`, or one of the hub that is on this machine.

    Raises:
        ConfigError: if there is none, or it has no MoE block.
    """
    path = base_file(resolve_model(name), CONFIG_NAME)
    if path is None:
        raise ConfigError(f"base={name!r}: there is no config.json; name a folder with the model.")
    try:
        config = AutoConfig.from_pretrained(path.parent)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"base={name!r} cannot be understood: {error}") from error
    return Base(name, path.parent, model, find_blocks(model), Weights.of(path.parent))


def other_weights(folder: str | Path) -> Weights:
    """The weights of a merged model.

    Raises:
        CheckpointError: if the folder has none in safetensors.
    """
    weights = Weights.of(Path(folder))
    if not weights.files:
        raise CheckpointError(f"{folder} holds no {SINGLE} and no {INDEX}.")
    return weights
