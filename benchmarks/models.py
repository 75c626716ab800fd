"""Whole models for the training-step benchmarks: frozen, ours, the paper's masked way, PEFT.

Random weights of OLMoE's architecture at chosen sizes; one training step is forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

import drlora
from drlora.adapter.pool import RankPool
from drlora.moe.families import family_of
from drlora.moe.families.interface import InterfaceExperts
from drlora.moe.packing import parameter_at, places_of, put_in
from drlora.ops.storage.packed import Packed, packed_format

VOCAB = 1024
EXPERT_PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model and its batch (`tokens` in all, in `sequences` of equal length)."""

    hidden: int
    width: int
    experts: int
    top_k: int
    layers: int
    tokens: int
    dtype: torch.dtype = torch.float32
    vocab: int = VOCAB
    sequences: int = 1

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{kind} d{self.hidden} m{self.width} E{self.experts} k{self.top_k} "
            f"L{self.layers} T{self.tokens}"
        )


def make_base(shape: ModelShape, device: str = "cpu") -> OlmoeForCausalLM:
    """The frozen base with random weights, experts through transformers' grouped_mm."""
    config = OlmoeConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=max(1, shape.hidden // 64),
        num_key_value_heads=max(1, shape.hidden // 64), num_experts=shape.experts,
        num_experts_per_tok=shape.top_k, max_position_embeddings=max(4096, shape.tokens),
        eos_token_id=0, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = OlmoeForCausalLM(config).to(shape.dtype)
    model.requires_grad_(False)
    return model.train()


def random_model(
    model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """A frozen model with random weights, made where they stay: no copy, no slow initialisation."""
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    model.to_empty(device=device)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=0.02)
    # Its buffers are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False).train()


def random_packed_model(
    model_class: type[PreTrainedModel],
    config: Any,
    dtype: torch.dtype,
    storage: str,
    device: str = "cpu",
    repeats: bool = False,
) -> PreTrainedModel:
    """The same with experts packed: one matrix of one block is wide at a time.

    Args:
        model_class, config, dtype: of the model.
        storage: of the experts.
        device: where it is made.
        repeats: whether all blocks have the numbers of the first, which takes less time.
    """
    kind, first = packed_format(storage), {}
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    for module in model.modules():
        if isinstance(family_of(module), InterfaceExperts):
            for place in places_of(module):
                shape = parameter_at(module, place.path).shape
                if place.path in first:
                    packed = copy.deepcopy(first[place.path])
                else:
                    wide_EOI = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
                    packed = Packed.of(wide_EOI, kind)
                    del wide_EOI
                if repeats:
                    first[place.path] = packed
                put_in(module, {place.path: packed})
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                made = torch.empty(weight.shape, dtype=dtype, device=device)
                is_norm = "norm" in type(module).__name__.lower()
                made = made.fill_(1) if is_norm else made.normal_(std=0.02)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False).train()


def with_checkpointing(model: nn.Module) -> nn.Module:
    """Gradient checkpointing, the kind that needs no reentrant backward."""
    # transformers 5.23 renames the method and warns of the old name; 5.17 has the old one only.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def ours(base: OlmoeForCausalLM, rank: int, **settings: Any) -> nn.Module:
    """DR-LoRA at one rank for all, no growth unless `settings` say so."""
    ranks = {"r_init": rank, "r_target": rank, "r_max": rank}
    return _randomise(get_peft_model(base, drlora.DrLoraConfig(**{**ranks, **settings})))


def masked(base: OlmoeForCausalLM, rank: int, r_max: int) -> nn.Module:
    """The paper's way: every expert has r_max rows, masked down to `rank`; same engine."""
    model = ours(base, r_max)
    for pool in model.modules():
        if isinstance(pool, RankPool):
            _mask(pool, rank, r_max)
    return model


def _mask(pool: RankPool, rank: int, r_max: int) -> None:
    live = (torch.arange(len(pool.owner)) % r_max < rank).float()[:, None].to(pool.lora_A.device)
    plain = pool.forward

    def forward(dtype: torch.dtype, experts: range | None = None) -> tuple[Tensor, Tensor]:
        a, b = plain(dtype, experts)
        return a * live.to(dtype), b * live.to(dtype)

    pool.forward = forward  # type: ignore[method-assign]


def peft(base: OlmoeForCausalLM, rank: int) -> nn.Module:
    """PEFT's LoRA on the experts' parameters, of which DR-LoRA with one rank is an equal."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=EXPERT_PARAMETERS)
    return _randomise(get_peft_model(base, config))


def _randomise(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def twin_of(base: nn.Module) -> nn.Module:
    """A copy that shares the memory of the weights."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def twins(shape: ModelShape, device: str, kinds: dict[str, Callable]) -> dict[str, nn.Module]:
    """One model per kind; they share the memory of the frozen weights."""
    base = make_base(shape, device)
    return {name: make(twin_of(base)) for name, make in kinds.items()}


def batch_of(shape: ModelShape, device: str) -> Tensor:
    """Random tokens, (sequences, tokens / sequences)."""
    size = (shape.sequences, shape.tokens // shape.sequences)
    return torch.randint(1, shape.vocab, size, device=device)


def training_step(model: nn.Module, shape: ModelShape, device: str = "cpu") -> Callable[[], None]:
    """Forward and backward; a model without trainable weights propagates to its embeddings."""
    ids = batch_of(shape, device)
    if any(p.requires_grad for p in model.parameters()):

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()

        return step
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    return lambda: torch.autograd.backward(
        model(inputs_embeds=embedded, labels=ids).loss, inputs=[embedded]
    )


def optimizer_step(
    model: nn.Module, shape: ModelShape, dynamics: Any = None, device: str = "cpu"
) -> Callable[[], None]:
    """Forward, backward and AdamW, with DR-LoRA's dynamics around it if given."""
    ids = batch_of(shape, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if dynamics is not None:
            dynamics.before_optimizer_step()
        optimizer.step()
        if dynamics is not None:
            dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()

    return step
