"""The module that takes the place of a block's experts, and carries the adapters on them.

DrLoraExperts                 wraps the model's experts module, same call
  base_layer                  the frozen experts
  drlora_adapters             one ExpertsAdapter per PEFT adapter name
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from drlora.adapter.expert_parallel import Exchange
from drlora.adapter.experts import ExpertsAdapter
from drlora.adapter.merged_copies import InUse, put_back
from drlora.adapter.observe import (
    FirstPasses,
    Masks,
    TokenMask,
    count_in_backward,
    in_backward,
    real_tokens,
    routing_sums,
)
from drlora.config.adapter import DrLoraConfig
from drlora.distributed.zero import is_partitioned, is_split, refuse_partitioned
from drlora.errors import ConfigError
from drlora.moe.blocks import MoEBlock
from drlora.moe.families import family_of
from drlora.ops import adapted_experts, traced_experts
from drlora.ops.engine import AUTO
from drlora.ops.merge import NEAREST, Rounding, add_update, is_finite
from drlora.ops.weights import MATRICES, ExpertWeights


class DrLoraExperts(nn.Module, BaseTunerLayer):
    """Takes the place of a block's experts module and adds the active adapters' updates."""

    adapter_layer_names: tuple[str, ...] = ("drlora_adapters",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, block: MoEBlock) -> None:
        super().__init__()
        family = family_of(base_layer)
        assert family is not None, "find_blocks names recognised modules only"
        self.family = family
        self.base_layer = base_layer
        self.block = block
        self.tokens = TokenMask()
        self.first_passes = FirstPasses()
        self.in_features = self.out_features = block.hidden_size
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting sets it
        self.drlora_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.router_logits: Tensor | None = None
        # PEFT's wrappers of routers and other modules that an adapter trains in full.
        self.trained_in_full: Sequence[nn.Module] = ()
        # Which copies of them were in use before a merge; one list for all layers.
        self.copies_before_merge: InUse = []
        self.rounding: Rounding = NEAREST  # of merged weights
        # Where transformers has spread the experts over processes.
        self.exchange: Exchange | None = None
        self.is_probed = False  # while ranks are placed
        self._disable_adapters = False
        self._unmerged: list[Any] = []

    def adapter(self, name: str) -> ExpertsAdapter:
        """The adapter called `name`."""
        return cast(ExpertsAdapter, self.drlora_adapters[name])

    @property
    def base_weights(self) -> ExpertWeights:
        """The frozen weights of all experts."""
        return self.family.weights(self.get_base_layer())

    @property
    def is_adapting(self) -> bool:
        """Whether a call does anything that the base layer would not."""
        return not self.disable_adapters and not self.merged and bool(self._names())

    @property
    def needs_routing(self) -> bool:
        """Whether a call is computed here, for which it must say who goes where."""
        return self.is_adapting or not self.base_weights.is_plain

    def requires_grad_(self, requires_grad: bool = True) -> DrLoraExperts:
        """As of any module; frozen, it freezes the trained routers too.

        transformers' load_adapter freezes an adapter that is not to be trained through this alone.
        """
        super().requires_grad_(requires_grad)
        for module in () if requires_grad else self.trained_in_full:
            module.requires_grad_(False)
        return self

    def _names(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.drlora_adapters]

    def add_adapter(self, name: str, config: DrLoraConfig) -> None:
        """Add an adapter, on the device of the base weights and in their dtype."""
        adapter = ExpertsAdapter(self.block, config)
        if not any(p.device.type == "meta" for p in adapter.parameters()):
            device, dtype = self._place()
            adapter.to(device)
            for pool in adapter.rank_pools.values():
                pool.lora_A.data = pool.lora_A.data.to(dtype)
                pool.lora_B.data = pool.lora_B.data.to(dtype)
            if name == "ref" and "default" in self.drlora_adapters:
                # TRL's frozen reference: it copies the parameters itself, but not who owns them.
                twin = self.adapter("default")
                if twin.config == config:
                    adapter.load_state_dict(twin.state_dict())
        self.drlora_adapters[name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where the base weights are, and what they compute in."""
        first = next(self.get_base_layer().parameters(), None)
        if first is not None and is_partitioned(first):
            return first.device, first.dtype  # their elements are elsewhere, as zero.Init leaves it
        base = self.base_weights
        return base.device, base.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer returns for the same call, with the adapters' updates."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.needs_routing:
            return self.family.call(self.get_base_layer(), self._run, *args, **kwargs)
        out = self.base_layer(*args, **kwargs)
        self._take_logits()
        return out

    def _run(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        routing: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The experts' output, (T, H); see `drlora.moe.families.Run` for the arguments."""
        logits_TE = self._take_logits()
        names = self._names() if self.is_adapting else []
        adapters = [self.adapter(name) for name in names]
        if self.training and len({a.config.lora_dropout for a in adapters}) > 1:
            raise ConfigError(
                f"adapters {names} are active together with different lora_dropout; train one at "
                f"a time, or give them the same."
            )
        if self.training and torch.is_grad_enabled() and not self.is_probed:
            for adapter in () if torch.compiler.is_compiling() else adapters:
                adapter.refuse_unplaced()
        base = self.base_weights
        x_TH = hidden_states
        if self.cast_input_dtype_enabled:
            x_TH = x_TH.to(base.dtype)
        dropout = adapters[0].config.lora_dropout if self.training and adapters else 0.0
        engine = adapters[0].config.engine if adapters else AUTO
        routed = x_TH, top_k_index, top_k_weights, base
        if self.exchange is not None and adapters:
            compute = partial(self._run_here, adapters, dropout=dropout, engine=engine)
            out_TH = self.exchange(x_TH, top_k_index, top_k_weights, compute)
        elif torch.compiler.is_compiling() and base.is_traceable:
            traced = [piece for adapter in adapters for piece in adapter.traced_pieces(x_TH.dtype)]
            out_TH = traced_experts(*routed, traced, dropout=dropout, engine=engine)
        else:
            pieces = [piece for adapter in adapters for piece in adapter.pieces(x_TH.dtype)]
            out_TH = _untraced_experts(*routed, pieces, dropout=dropout, engine=engine)
        counted = routing or (top_k_index, top_k_weights)
        if adapters and self.training and self.tokens.is_computed_again:
            self.first_passes.remember(counted[0], self.tokens.masks)
        if self.training and torch.is_grad_enabled() and out_TH.requires_grad:
            masks = self.tokens.masks or self._masks_of_recomputed(counted[0])
            real_T = real_tokens(masks, counted[0].shape[0])
            for adapter in adapters:
                out_TH = self._observe(adapter, out_TH, *counted, logits_TE, real_T)
        return out_TH.to(hidden_states.dtype)

    def _run_here(
        self,
        adapters: list[ExpertsAdapter],
        x_nH: Tensor,
        index_nK: Tensor,
        weight_nK: Tensor,
        experts: range,
        **settings: Any,
    ) -> Tensor:
        """The part of an exchange: `experts` alone, for the tokens that came to this process."""
        pieces = [piece for a in adapters for piece in a.pieces(x_nH.dtype, experts)]
        return adapted_experts(x_nH, index_nK, weight_nK, self.base_weights, pieces, **settings)

    def _masks_of_recomputed(self, index_TK: Tensor) -> Masks:
        is_known = not torch.compiler.is_compiling() and in_backward()
        return self.first_passes.recall(index_TK) if is_known else ()

    def _take_logits(self) -> Tensor | None:
        logits_TE = self.router_logits
        if logits_TE is not None:
            self.router_logits = None  # if need be: a compiled, checkpointed block forbids it
        return logits_TE

    def _observe(
        self,
        adapter: ExpertsAdapter,
        out_TH: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        logits_TE: Tensor | None,
        real_T: Tensor | None,
    ) -> Tensor:
        sums = routing_sums(
            adapter.routing_signal,
            index_TK,
            weight_TK,
            logits_TE,
            real_T,
            self.block.num_experts,
        )
        return count_in_backward(out_TH, adapter.meter, *sums)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates into the base weights; `unmerge` restores them to the bit."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        self.refuse_fixed_weights()
        if not self._unmerged:
            base = self.base_weights
            self._unmerged = [base.matrix(matrix).snapshot() for matrix in MATRICES]
        self._merge_in_place(names, safe_merge)

    def refuse_fixed_weights(self) -> None:
        """Refuse to merge into weights that cannot be changed.

        Raises:
            ConfigError: saying why they cannot.
        """
        refuse_partitioned(
            [parameter for parameter in self.parameters() if is_split(parameter)],
            "an adapter cannot be merged into them there. Save it, and merge it into the model as "
            "it is loaded without DeepSpeed.",
        )
        if self.exchange is not None:
            raise ConfigError(
                f"an adapter cannot be merged into {self.block.experts_name}: it is "
                f"expert-parallel, and the other experts are in other processes. Save the adapter, "
                f"and merge it into the model as one process loads it."
            )
        if (reason := self.base_weights.fixed) is not None:
            raise ConfigError(
                f"an adapter cannot be merged into {self.block.experts_name}: {reason}. Keep it "
                f"beside the model, or put it on the model as it was before it was stored so."
            )

    def unmerge(self) -> None:
        """Put the base weights back as they were before `merge`."""
        base = self.base_weights
        for matrix, kept in zip(MATRICES, self._unmerged, strict=False):
            base.matrix(matrix).restore(kept)
        self._unmerged.clear()
        self.merged_adapters.clear()
        put_back(self.copies_before_merge)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base experts, with the adapters merged in if asked; keeps no copy to go back to."""
        if merge:
            self.refuse_fixed_weights()
            self._merge_in_place(check_adapters_to_merge(self, adapter_names), safe_merge)
        if self.exchange is not None:
            self.exchange.take_off()
        return self.get_base_layer()

    @torch.no_grad()
    def _merge_in_place(self, names: list[str], safe_merge: bool) -> None:
        for name in names:
            if name not in self.drlora_adapters:
                continue
            pieces = self.adapter(name).pieces(torch.float32)
            broken = [piece.matrix for piece in pieces if safe_merge and not is_finite(piece)]
            if broken:
                raise ValueError(
                    f"adapter {name!r} has NaN or infinite weights in {self.block.name} "
                    f"({broken[0]}); it was not merged."
                )
            for piece in pieces:
                add_update(self.base_weights, piece, self.rounding, self.block.experts_name)
            self.merged_adapters.append(name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if adapter_name in self.drlora_adapters:
            self.adapter(adapter_name).to(device or self._place()[0])

    def __repr__(self) -> str:
        return "drlora." + super().__repr__()


# Where nothing can be traced (experts that are not one tensor), the compiler leaves a gap.
_untraced_experts = torch.compiler.disable(adapted_experts)
