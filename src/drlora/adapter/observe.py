"""Routing statistics: which experts the tokens that are being learned from went to.

What is counted is committed in the BACKWARD pass of the adapted experts. So a token counts once
under gradient checkpointing (either kind runs forward twice, backward once), and evaluation,
generation and reference passes, which have no backward, do not count at all. Padding tokens are
left out by the attention mask that the model was called with.

The sums arrive as the GRADIENT of a tensor of their own (see `count_in_backward`), so adding them
up is autograd's work, and neither torch.compile nor checkpointing sees a side effect.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from drlora.distributed import are_several

_HOLDER = "_drlora_token_mask"
_MOST_PASSES = 8
Masks = tuple[Tensor | None, ...]


class TokenMask:
    """The attention masks of the forward passes under way, shared by all adapted blocks.

    A mask belongs to the call that it was an argument of, and goes with it.
    """

    def __init__(self) -> None:
        self._calls: list[Tensor | None] = []  # the masks of calls that are not over
        self._trains = False  # whether the outermost one is to be learned from

    def __getstate__(self) -> dict[str, Any]:
        """Of a new one: a copy of the model is in no call."""
        return TokenMask().__dict__

    @property
    def masks(self) -> Masks:
        """Those of the calls under way, outermost first."""
        return tuple(self._calls)

    @property
    def is_computed_again(self) -> bool:
        """Whether what runs now is run once more in the backward pass (reentrant checkpointing)."""
        return bool(self._calls) and self._trains and not torch.is_grad_enabled()

    def enter(self, mask: Tensor | None) -> None:
        """A call with this mask begins."""
        if not self._calls:
            self._trains = torch.is_grad_enabled()
        self._calls.append(mask)

    def leave(self) -> None:
        """The innermost call is over, or has failed."""
        self._calls.pop()


class FirstPasses:
    """The masks of a block's passes that reentrant checkpointing computes again, after the call.

    Which pass it is that is computed again is told by the experts that its tokens go to.
    """

    def __init__(self) -> None:
        self._passes: list[tuple[Tensor, Masks]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Of a new one: a copy of the model has no backward pass to come."""
        return FirstPasses().__dict__

    def remember(self, index_TK: Tensor, masks: Masks) -> None:
        """Of a pass that goes to the experts `index_TK`."""
        # Passes that nothing is learned from are never asked for again.
        self._passes = [*self._passes, (_checksum(index_TK), masks)][-_MOST_PASSES:]

    def recall(self, index_TK: Tensor) -> Masks:
        """The masks of that pass, which is forgotten then; none if it is not known."""
        if not self._passes:
            return ()
        if len(self._passes) == 1:  # nothing to wait for on an accelerator
            return self._passes.pop()[1]
        wanted = _checksum(index_TK)
        for number, (checksum, masks) in reversed(list(enumerate(self._passes))):
            if torch.equal(checksum, wanted):
                del self._passes[number]
                return masks
        return ()


def _checksum(index_TK: Tensor) -> Tensor:
    place_S = torch.arange(1, index_TK.numel() + 1, device=index_TK.device)
    return torch.stack([(index_TK.reshape(-1) * place_S).sum(), place_S[-1]])


def in_backward() -> bool:
    """Whether this is run by a backward pass."""
    return torch._C._current_graph_task_id() != -1


def real_tokens(masks: Masks, num_tokens: int) -> Tensor | None:
    """(T,) float32, 1 for a real token and 0 for padding; None if all are real.

    A mask that does not match the tokens (packed or cached input) is ignored; one that is longer
    than this process's part of the sequences, with a warning.
    """
    for mask in reversed(masks):
        if mask is not None and mask.numel() == num_tokens:
            return (mask.reshape(-1) != 0).to(torch.float32)
    if not torch.compiler.is_compiling() and are_several():
        for mask in masks:
            if mask is not None and mask.numel() > num_tokens and not mask.numel() % num_tokens:
                _warn_of_uncut_mask(mask.numel() // num_tokens)
    return None


@functools.cache
def _warn_of_uncut_mask(times: int) -> None:
    """Once; to look for padding in it would make the host wait in every step."""
    warnings.warn(
        f"the attention mask is {times} times as long as the tokens of this process: sequence "
        f"parallelism cuts the tokens and not the mask, so padding cannot be told from them and "
        f"counts in the routing statistics. Pack the examples, or take batches without padding.",
        stacklevel=2,
    )


def watch_tokens(model: nn.Module, experts_name: str) -> TokenMask:
    """Follow the attention masks that `model` and the modules inside are called with; idempotent.

    Args:
        model: the outermost module.
        experts_name: full name of the experts. Watched are the modules on the way to them, as far
            as the list of layers.
    """
    holder: TokenMask = model.__dict__.get(_HOLDER) or TokenMask()
    module = model
    for name in ["", *experts_name.split(".")]:
        module = getattr(module, name) if name else module
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            break
        if _HOLDER not in module.__dict__ and (module is model or _takes_mask(module)):
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, always_call=True)
            setattr(module, _HOLDER, holder)
    return holder


def forget_tokens(model: nn.Module) -> None:
    """Undo `watch_tokens`."""
    for module in model.modules():
        if module.__dict__.pop(_HOLDER, None) is None:
            continue
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _enter:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        for key, hook in list(module._forward_hooks.items()):
            if hook is _leave:
                del module._forward_hooks[key], module._forward_hooks_always_called[key]


# The holder is looked up on the module, so that a deep copy of the model has its own.


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        names = list(inspect.signature(module.forward).parameters)[: len(args)]
        mask = dict(zip(names, args, strict=True)).get("attention_mask")
    is_mask = isinstance(mask, Tensor) and mask.dim() == 2
    getattr(module, _HOLDER).enter(mask if is_mask else None)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    getattr(module, _HOLDER).leave()


def _takes_mask(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(module.forward).parameters


class RoutingMeter:
    """Sums of routing over the tokens of one optimizer step, of one block and adapter.

    Attributes:
        tally_E1: (E + 1,) float32 zeros, no parameter; its gradient holds the sums so far, those of
            the experts and then the number of tokens.
    """

    def __init__(self, num_experts: int) -> None:
        # A device of its own, so that a model which is made on the meta device can count too.
        self.tally_E1 = torch.zeros(num_experts + 1, device="cpu", requires_grad=True)

    @property
    def sum_E(self) -> Tensor:  # noqa: N802
        """(E,) float32 routing sums, on the device of the block."""
        return self._sums()[:-1]

    @property
    def num_tokens(self) -> Tensor:
        """Scalar float32 tensor, how many tokens the sums are taken over."""
        return self._sums()[-1]

    def reset(self) -> None:
        """Start the next optimizer step."""
        self.tally_E1.grad = None

    def to(self, device: torch.device) -> None:
        """Count on `device`, where the gradients of the block are; what was counted comes along."""
        if device.type != "meta" and device != self.tally_E1.device:
            grad = self.tally_E1.grad
            self.tally_E1 = torch.zeros_like(self.tally_E1, device=device, requires_grad=True)
            self.tally_E1.grad = None if grad is None else grad.to(device)

    def _sums(self) -> Tensor:
        tally_E1 = self.tally_E1
        return torch.zeros_like(tally_E1) if tally_E1.grad is None else tally_E1.grad


@torch.no_grad()
def routing_sums(
    signal: str,
    index_TK: Tensor,
    weight_TK: Tensor,
    logits_TE: Tensor | None,
    real_T: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor]:
    """Routing of one forward pass, summed over its real tokens.

    Args:
        signal: `topk_weight`, `count` or `probability` (the last needs the router's logits).
        index_TK: (T, K) selected experts; E stands for none.
        weight_TK: (T, K) their routing weights.
        logits_TE: (T, E or more) router logits, or None.
        real_T: (T,) 1 for real tokens, or None for all.

    Returns:
        (E,) float32 sums, and the number of real tokens as a float32 scalar.
    """
    num_tokens = index_TK.shape[0]
    if signal == "probability":
        assert logits_TE is not None, "the router's logits were not noted"
        routed_TE = logits_TE.reshape(num_tokens, -1).float().softmax(dim=-1)[:, :num_experts]
    else:
        value_TK = (
            weight_TK.float()
            if signal == "topk_weight"
            else torch.ones_like(weight_TK, dtype=torch.float32)
        )
        # A dense scatter and a sum in fixed order: index_add would not be deterministic on CUDA.
        empty_TE1 = value_TK.new_zeros(num_tokens, num_experts + 1)
        routed_TE = empty_TE1.scatter_add_(1, index_TK, value_TK)[:, :num_experts]
    if real_T is None:
        return routed_TE.sum(dim=0), routed_TE.new_full((), float(num_tokens))
    return real_T.to(routed_TE.device) @ routed_TE, real_T.sum().to(routed_TE.device)


def count_in_backward(
    out_TH: Tensor, meter: RoutingMeter, sum_E: Tensor, num_tokens: Tensor
) -> Tensor:
    """`out_TH` itself; when its gradient arrives, the sums are added to `meter`."""
    sums_E1 = torch.cat([sum_E, num_tokens[None]])
    # Where the model was spread out after the adapter was made, the sums find their way back.
    tally_E1 = meter.tally_E1.to(sums_E1.device)
    return _CountInBackward.apply(out_TH, tally_E1, sums_E1)


class _CountInBackward(torch.autograd.Function):
    """Passes `out_TH` through, and hands `tally_E1` the sums as its gradient."""

    @staticmethod
    def forward(ctx: Any, out_TH: Tensor, tally_E1: Tensor, sums_E1: Tensor) -> Tensor:
        # Not saved for backward: activation checkpointing would compute them again, with the mask
        # of whichever forward pass came last.
        ctx.sums_E1 = sums_E1
        return out_TH.view_as(out_TH)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_TH, ctx.sums_E1, None
