"""Ordinary LoRA beside the experts: which linear layers get it, and PEFT's layer for them.

The layers are PEFT's own, so that quantised linears work as they do there. What is added is that
`unmerge` puts a plain linear back to the bit, as it does the experts.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from drlora.config.adapter import DrLoraConfig
from drlora.errors import ConfigError, shown
from drlora.moe.blocks import MoEBlock

ALL_LINEAR = "all-linear"
ALL_STACK = "all-stack"
ALL_ATTENTION = "all-attention"
_ALL = (ALL_LINEAR, ALL_STACK, ALL_ATTENTION)
# Classes of attention modules in transformers, linear attention too; of routers, where a family's
# own is not recognised or lies in attention; and of what chooses positions, with no gradient.
_ATTENTION_CLASS = re.compile(r"\w*(Attention|MLA|DeltaNet)\d*")
_ROUTER_CLASS = re.compile(r"\w*(Gating|Router)")
_INDEXER_CLASS = re.compile(r"\w*Indexer")
LONGEST_MATCH_SECONDS = 3.0  # of all names together
_MATCH_ALL = "import json, re, sys; p, *n = json.load(sys.stdin); [re.fullmatch(p, k) for k in n]"
_FORWARD = nn.Linear.forward
_SAFE_TO_COPY = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def choose_targets(model: nn.Module, config: DrLoraConfig, blocks: Sequence[MoEBlock]) -> list[str]:
    """Full names of the layers that `config.target_modules` gives ordinary LoRA, in model order.

    Layers inside an experts module are left out: the pools adapt them. `all-linear` leaves out the
    output head, as in PEFT, and what only chooses: routers and what they are made of, and indexers,
    whose choice of positions has no gradient. `all-stack` is those of them in the stack of layers
    that the blocks lie in, so not in a tower for images or sound; `all-attention` is those of that
    stack that lie in attention modules.

    Raises:
        ConfigError: if a name matches no linear layer, or matches a router, a part of one, or
            another module.
    """
    wanted = config.target_modules
    if wanted is None:
        return []
    modules = dict(_own_modules(model, blocks))
    kept = config.modules_to_save or []
    modules = {name: m for name, m in modules.items() if not _ends_in(name, kept)}
    linear = {name for name, module in modules.items() if _is_linear(module)}
    routers = {block.router_name for block in blocks}
    if wanted in _ALL:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = [n for n in modules if n in linear and modules[n] is not head]
        found = [n for n in found if not _is_of_router(model, n, routers)]
        found = [n for n in found if not _lies_in(_INDEXER_CLASS, model, n)]
        kind = "linear layer"
        if wanted != ALL_LINEAR:
            stacks = {_stack(block.experts_name) for block in blocks}
            found = [n for n in found if _stack(n) in stacks]
        if wanted == ALL_ATTENTION:
            found = [n for n in found if _lies_in(_ATTENTION_CLASS, model, n)]
            kind = "linear layer in a module of attention"
        if not found:
            raise ConfigError(
                f"target_modules={wanted!r} matches nothing in {type(model).__name__}: outside of "
                f"its experts it has no {kind}; leave target_modules out, or name layers."
            )
        return found
    patterns = [wanted] if isinstance(wanted, str) else wanted
    for pattern in patterns:
        if not any(_matches(pattern, name, wanted) for name in modules):
            raise ConfigError(
                f"target_modules={pattern!r} matches nothing in {type(model).__name__}; its linear "
                f"layers outside of the experts are {sorted(_endings(linear))}. Was the adapter "
                f"made for another model?"
            )
    found = [n for n in modules if any(_matches(pattern, n, wanted) for pattern in patterns)]
    for name in found:
        _refuse_unfit(name, modules[name], _is_of_router(model, name, routers))
    return found


def _stack(name: str) -> str:
    """The list of layers that a module lies in: its name up to the first number."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[0]


def _is_of_router(model: nn.Module, name: str, routers: Iterable[str | None]) -> bool:
    """Whether the layer is a router or lies in one, by the blocks' routers or by class."""
    is_inside = any(r is not None and f"{name}.".startswith(f"{r}.") for r in routers)
    return is_inside or _lies_in(_ROUTER_CLASS, model, name)


def _lies_in(kind: re.Pattern[str], model: nn.Module, name: str) -> bool:
    """Whether the class of any module around the layer is of this kind."""
    steps = name.split(".")
    around = (model.get_submodule(".".join(steps[:depth])) for depth in range(1, len(steps)))
    return any(kind.fullmatch(type(module).__name__) for module in around)


def refuse_endless(pattern: object, names: Iterable[str]) -> None:
    """Refuse a regular expression that is none, or that may take for ever.

    Repetitions inside repetitions can take longer than any name is long, and nothing interrupts
    Python's matching, which PEFT uses too. So a process of its own tries it first.

    Args:
        pattern: `target_modules`; anything but a regular expression passes.
        names: of all modules that it will be held against.

    Raises:
        ConfigError: naming the pattern.
    """
    if not isinstance(pattern, str) or pattern in _ALL:
        return
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"target_modules={shown(pattern)} is no regular expression: {error}."
        ) from error
    if sum(pattern.count(sign) for sign in "*+{") < 2:
        return
    command = [sys.executable, "-I", "-S", "-c", _MATCH_ALL]
    try:
        subprocess.run(
            command,
            input=json.dumps([pattern, *names]).encode(),
            timeout=LONGEST_MATCH_SECONDS,
            check=True,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"target_modules={shown(pattern)} takes more than {LONGEST_MATCH_SECONDS:g} s to match "
            f"the names of the model's modules; write it without repetitions inside repetitions, "
            f"or as a list of names."
        ) from None


def lora_config(config: DrLoraConfig, target: nn.Module) -> LoraConfig:
    """PEFT's configuration of the ordinary LoRA on `target`."""
    assert config.target_rank is not None
    lora = LoraConfig(
        r=config.target_rank,
        # PEFT's annotation says int; it only divides by it.
        lora_alpha=config.target_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        inference_mode=config.inference_mode,
    )
    if _is_plain(target):
        lora._register_custom_module({nn.Linear: ExactLinear})
    return lora


class ExactLinear(LoraLinear):
    """PEFT's LoRA on a plain linear that loses no bits where PEFT's does.

    - `unmerge` restores the base weight; PEFT subtracts what it added, with a rounding error.
    - What is read from a file into an adapter that was made without memory (`low_cpu_mem_usage`)
      stays as it is; PEFT rounds it to the base's dtype, and has it wide again afterwards.
    """

    _made_without_memory: frozenset[str] = frozenset()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        factors = [
            part[adapter_name].get_parameter("weight")
            for part in (self.lora_A, self.lora_B)
            if adapter_name in part
        ]
        if any(weight.device.type == "meta" for weight in factors):
            self._made_without_memory |= {adapter_name}
        kept = factors if adapter_name in self._made_without_memory else []
        wide = [(weight, weight.data) for weight in kept if weight.device.type != "meta"]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for weight, data in wide:
            weight.data = data.to(weight.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT; keeps a copy of the base weight meanwhile."""
        if not self.merged:
            self._unmerged: Tensor = self.get_base_layer().get_parameter("weight").detach().clone()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Put the base weight back as it was before `merge`."""
        if self.merged:
            self.merged_adapters.clear()
            self.get_base_layer().get_parameter("weight").data.copy_(self._unmerged)
            del self._unmerged


def _is_plain(module: nn.Module) -> bool:
    """Whether the weight is an ordinary tensor, which a copy restores."""
    weight = getattr(module, "weight", None)
    return (
        type(module) is nn.Linear and type(weight) is nn.Parameter and weight.dtype in _SAFE_TO_COPY
    )


def _own_modules(model: nn.Module, blocks: Sequence[MoEBlock]) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules without what is inside adapter layers or experts modules."""
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    inner = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, wrappers))
    inner += tuple(f"{block.experts_name}." for block in blocks)
    experts = {block.experts_name for block in blocks}
    for name, module in model.named_modules():
        if name and name not in experts and not name.startswith(inner):
            yield name, module


def _matches(pattern: str, name: str, wanted: Any) -> bool:
    """As PEFT matches: a string is a pattern for the full name, a list holds endings of names."""
    if isinstance(wanted, str):
        return re.fullmatch(pattern, name) is not None
    return _ends_in(name, [pattern])


def _ends_in(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _endings(names: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _is_linear(module: nn.Module) -> bool:
    """A linear layer of torch, transformers or a quantiser, adapted already or not."""
    if isinstance(module, LoraLayer):
        return True
    if _is_read_otherwise(module):
        return False
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    # Quantisers bring classes of their own; PEFT tells them apart by name.
    return any(hasattr(module, key) for key in ("qweight", "W_q", "codebooks"))


def _is_read_otherwise(module: nn.Module) -> bool:
    """Whether a subclass of torch's linear layer computes something else, or is never called.

    DeepSeek-V4's grouped output projection is of the first kind, and PEFT's LoRA on it fails in the
    first pass; the output projection in torch's MultiheadAttention of the second.
    """
    kind = type(module)
    is_of_a_model = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    is_other = is_of_a_model and issubclass(kind, nn.Linear) and kind.forward is not _FORWARD
    return is_other or isinstance(module, NonDynamicallyQuantizableLinear)


def _refuse_unfit(name: str, module: nn.Module, is_router: bool) -> None:
    if is_router:
        raise ConfigError(
            f"target_modules names {name}, which is a router or a part of one; use router='train' "
            f"to train it."
        )
    if not _is_linear(module):
        raise ConfigError(
            f"target_modules matches {name}, a {type(module).__name__} and no linear layer; use "
            f"modules_to_save to train it in full, or a pattern that leaves it out."
        )
