"""An adapter by its files: settings, and the factors of each expert when they are asked for.

update = contents.updates[0]
a_rI, b_Or = update.factors(7)      # scaling inside B; what is added is b_Or @ a_rI
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from drlora.config.adapter import DrLoraConfig
from drlora.errors import CheckpointError
from drlora.export.base_weights import LEAVES, Base, Weights
from drlora.io.files import read_json, read_shapes
from drlora.io.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MLX_WEIGHTS
from drlora.verification.keys import Key, parse

Pair = tuple[Tensor, Tensor]


@dataclass
class Update:
    """What is added to one matrix of a block's experts.

    Attributes:
        module: full name of the experts module, as the file spells it.
        matrix: gate_up, gate, up or down.
        kind: packed, stacked, apart or pool.
        experts: the experts that there is something for.
        rank: of each tensor; None where experts differ.
        factors: expert -> A (r, in) and B (out, r), float32, scaling inside B.
        packed: of packed: both tensors as they are stored, scaling inside B.
        kept: what `packed` has read, until it is told to forget.
    """

    module: str
    matrix: str
    kind: str
    experts: list[int]
    rank: int | None
    factors: Callable[[int], Pair]
    packed: Callable[[], Pair] | None = None
    kept: list[Pair] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.module}.{self.matrix}"

    def forget(self) -> None:
        """Free what was read; it is read again when it is asked for."""
        self.kept.clear()


@dataclass
class Contents:
    """An adapter.

    Attributes:
        folder: that it is in.
        config: adapter_config.json.
        shapes: key -> shape.
        keys: key -> what it stands for.
        updates: of experts.
        unpaired: keys of lora_A without lora_B, and the other way round.
        odd_ranks: where a tensor has another rank than the settings say, in words.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    keys: dict[str, Key]
    weights: Weights
    updates: list[Update] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    odd_ranks: list[str] = field(default_factory=list)

    def linears(self) -> Iterator[tuple[str, Callable[[], Pair]]]:
        """Name of each other layer with LoRA, and what reads its factors, scaling inside B."""
        pairs: dict[str, dict[str, str]] = {}
        for key, name in self.keys.items():
            if name.kind == "lora":
                pairs.setdefault(name.module, {})[name.part] = key
        for module, parts in pairs.items():
            if len(parts) == 2:

                def factors(module: str = module, parts: dict[str, str] = parts) -> Pair:
                    a, b = (_float(self, parts[part]) for part in "AB")
                    a, b = (a.T, b.T) if self.is_mlx else (a, b)
                    return a, b * self.rank_and_scale(module)[1]

                yield module, factors

    @property
    def is_mlx(self) -> bool:
        """Whether it is of mlx-lm's form, where factors of linear layers lie turned."""
        return "fine_tune_type" in self.config

    @property
    def type(self) -> str:
        """PEFT's type of adapter, or `MLX`."""
        return "MLX" if self.is_mlx else str(self.config.get("peft_type"))

    @property
    def kinds(self) -> set[str]:
        """Of the experts' updates."""
        return {update.kind for update in self.updates}

    def rank_and_scale(self, target: str) -> tuple[int, float]:
        """What the settings say of the layer or parameter `target`: r and alpha / r."""
        if self.is_mlx:
            own: dict[str, Any] = self.config.get("lora_parameters") or {}
            return int(own.get("rank") or 0), float(own.get("scale") or 1.0)
        if self.type == "DRLORA":
            config = DrLoraConfig.from_pretrained(str(self.folder))
            rank, alpha = int(config.target_rank or 0), float(config.target_alpha or 0)
        else:
            rank = int(self._setting("rank_pattern", "r", target) or 0)
            alpha = float(self._setting("alpha_pattern", "lora_alpha", target) or rank)
        root = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return rank, alpha / root if root else 1.0

    def _setting(self, pattern: str, name: str, target: str) -> Any:
        """As PEFT finds it."""
        special: dict[str, Any] = self.config.get(pattern) or {}
        return special.get(get_pattern_key(list(special), target), self.config.get(name))


def read_contents(folder: Path, base: Base | None) -> Contents:
    """The adapter in `folder`, in PEFT's form or mlx-lm's.

    Raises:
        CheckpointError: if it has not both files, or one is damaged.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    is_mlx = "fine_tune_type" in config
    path = folder / (MLX_WEIGHTS if is_mlx else ADAPTER_WEIGHTS)
    shapes = read_shapes(path)
    keys = {key: parse(key) for key in shapes}
    found = Contents(folder, config, shapes, keys, Weights(dict.fromkeys(shapes, path)))
    layers = {(key.module, key.part) for key in keys.values() if key.kind == "lora"}
    places: dict[tuple[str, str, str], dict[tuple[int | None, str], str]] = {}
    for key, name in keys.items():
        if name.kind not in ("whole", "lora"):
            places.setdefault((name.kind, name.module, name.leaf), {})[name.expert, name.part] = key
        elif name.kind == "lora" and (name.module, "BA"["AB".index(name.part)]) not in layers:
            found.unpaired.append(key)
    makers = {"packed": _packed, "stacked": _stacked, "apart": _apart, "pool": _pool}
    for (kind, module, leaf), parts in places.items():
        if kind == "pool" and not leaf:
            continue  # what the adapter has seen of its experts
        pairs = {part for _, part in parts} if kind == "pool" else {"A", "B"}
        lonely = [k for (e, _), k in parts.items() if kind != "pool" and any(
            (e, part) not in parts for part in pairs)]  # fmt: skip
        found.unpaired += lonely
        whole = {place: key for place, key in parts.items() if key not in lonely}
        if whole:
            found.updates.append(makers[kind](found, module, leaf, whole, base))
    return found


Parts = dict[tuple[int | None, str], str]


def _float(contents: Contents, key: str) -> Tensor:
    return contents.weights.read(key).float()


def _packed(c: Contents, module: str, leaf: str, parts: Parts, base: Base | None) -> Update:
    matrix = "gate_up" if leaf == "inner" else _outer(c, module, parts, base)
    parameter = "down_proj" if matrix == "down" else "gate_up_proj"
    rank, scale = c.rank_and_scale(f"{module}.{parameter}")
    rows, columns = c.shapes[parts[None, "A"]][0], c.shapes[parts[None, "B"]][1]
    block = base.block_of(module) if base else None
    count = block.num_experts if block else rows // rank if rank else 0
    if rows != columns or not count or rows % count:
        raise CheckpointError(
            f"{module}: lora_A has {rows} rows and lora_B {columns} columns, which must be one "
            f"number and a multiple of the number of experts ({count or 'not known'})."
        )
    own = rows // count
    if own != rank:
        c.odd_ranks.append(f"{module}.{parameter}: rank {own}, the settings say {rank}")
    kept: list[Pair] = []

    def packed() -> Pair:
        if not kept:
            a, b = _float(c, parts[None, "A"]), _float(c, parts[None, "B"])
            kept.append((a, b * scale))
        return kept[0]

    def factors(expert: int) -> Pair:
        a, b = packed()
        return a[expert * own : (expert + 1) * own], b[:, expert::count]

    return Update(module, matrix, "packed", list(range(count)), own, factors, packed, kept)


def _outer(c: Contents, module: str, parts: Parts, base: Base | None) -> str:
    """Of a file with one matrix alone PEFT's names do not say which it is."""
    if any(k.module == module and k.leaf == "inner" for k in c.keys.values()):
        return "down"
    named = [str(name) for name in c.config.get("target_parameters") or ()]
    if named and not any(name.endswith("down_proj") for name in named):
        return "gate_up"
    block = base.block_of(module) if base else None
    features = {c.shapes[parts[None, "A"]][1], c.shapes[parts[None, "B"]][0]}
    if block and features == set(block.shape_of("gate_up")) != set(block.shape_of("down")):
        return "gate_up"
    return "down"


def _stacked(c: Contents, module: str, leaf: str, parts: Parts, base: Base | None) -> Update:
    _, scale = c.rank_and_scale(f"{module}.{leaf}")
    count, rank = c.shapes[parts[None, "A"]][:2]
    block = base.block_of(module) if base else None
    in_turns = leaf == "gate_up_proj" and block is not None and block.is_interleaved

    def factors(expert: int) -> Pair:
        a, b = (c.weights.read(parts[None, part], expert).float() for part in "AB")
        if in_turns:  # gate first, then up, in such files; the model has them in turns
            b = torch.stack(b.chunk(2), dim=1).flatten(0, 1)
        return a, b * scale

    return Update(module, LEAVES[leaf], "stacked", list(range(count)), rank, factors)


def _apart(c: Contents, module: str, leaf: str, parts: Parts, base: Base | None) -> Update:
    experts = sorted({expert for expert, _ in parts if expert is not None})
    ranks = {expert: c.shapes[parts[expert, "A"]][0] for expert in experts}
    for expert in experts:
        rank, _ = c.rank_and_scale(f"{module}.{expert}.{leaf}")
        if ranks[expert] != rank:
            where = f"{module}.{expert}.{leaf}"
            c.odd_ranks.append(f"{where}: rank {ranks[expert]}, the settings say {rank}")

    def factors(expert: int) -> Pair:
        a, b = (_float(c, parts[expert, part]) for part in "AB")
        return a, b * c.rank_and_scale(f"{module}.{expert}.{leaf}")[1]

    only = set(ranks.values())
    one = only.pop() if len(only) == 1 else None
    return Update(module, LEAVES.get(leaf, leaf), "apart", experts, one, factors)


def _pool(c: Contents, module: str, leaf: str, parts: Parts, base: Base | None) -> Update:
    scale = DrLoraConfig.from_pretrained(str(c.folder)).scaling
    owner = c.weights.read(parts[None, "owner"])
    block = base.block_of(module) if base else None
    count = max(block.num_experts if block else 0, int(owner.max()) + 1)

    def factors(expert: int) -> Pair:
        rows = torch.nonzero(owner == expert)[:, 0]
        a, b = (_float(c, parts[None, part])[rows] for part in ("lora_A", "lora_B"))
        return a, b.T * scale

    return Update(module, leaf, "pool", list(range(count)), None, factors)
