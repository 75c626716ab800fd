"""The loss of the targets, from a model's last hidden states: never all logits at once.

A vocabulary of 150,000 makes logits of 2,048 tokens 1.2 GB in float32, and a loss holds them three
times. Here the head is applied to the positions that have a target, some rows at a time, and their
gradient is formed at once, while the logits are there: the products are those of the plain loss,
and what is kept for the backward pass is of the size of the hidden states. torch's own
linear_cross_entropy (2.13) does alike, but sums in the dtype of the states, which in bfloat16 put
the loss of 256 tokens off by 6 %, and cuts rows so finely that it took 12 times as long on a CPU.

What a model does to its logits before its loss (softcapping, scaling) is not known from outside. So
it is tried: a model whose logits are not exactly the head's product, or whose loss is another, is
left as it is.

Letters: N targets, n those of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100
LEAST_VOCABULARY = 16_384  # below it all logits take little beside what layers keep
CHUNK_BYTES = {"cpu": 3 * 2**24}  # of logits in float32
CHUNK_BYTES_ELSEWHERE = 2**28
_DTYPES = (torch.float32, torch.bfloat16)
_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def target_losses(
    x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor
) -> Tensor:
    """(N,) negative log-likelihoods in float32; differentiable in `x_NH` alone, once.

    Args:
        x_NH: (N, H) hidden states that the head gets.
        weight_VH, bias_V: of the head, of the dtype of `x_NH`; frozen.
        target_N: (N,) int64 in [0, V).
    """
    kind = x_NH.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        bias_V = None if bias_V is None else bias_V.to(dtype)
        with torch.autocast(kind, enabled=False):
            return target_losses(x_NH.to(dtype), weight_VH.to(dtype), bias_V, target_N)
    losses_N: Tensor = _TargetLosses.apply(x_NH, weight_VH, bias_V, target_N)
    return losses_N


class _TargetLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor
    ) -> Tensor:
        chunk_bytes = CHUNK_BYTES.get(x_NH.device.type, CHUNK_BYTES_ELSEWHERE)
        rows = max(1, chunk_bytes // (4 * len(weight_VH)))
        losses_N = torch.empty(len(x_NH), dtype=torch.float32, device=x_NH.device)
        dx_NH = torch.empty_like(x_NH) if ctx.needs_input_grad[0] else None
        for start in range(0, len(x_NH), rows):
            n = slice(start, start + rows)
            dx_nH = None if dx_NH is None else dx_NH[n]
            losses_N[n] = _chunk(x_NH[n], weight_VH, bias_V, target_N[n, None], dx_nH)
        ctx.save_for_backward(dx_NH)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (dx_NH,) = ctx.saved_tensors
        return (dx_NH * grad_N[:, None]).to(dx_NH.dtype), None, None, None


def _chunk(
    x_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_n1: Tensor, dx_nH: Tensor | None
) -> Tensor:
    """(n,) losses; writes their gradient into `dx_nH` if that is given.

    In place on the chunk's logits, the only memory of that size. The gradient of a loss in the
    logits is the probabilities, less 1 at the target; what the logits' exponentials are too large
    by (their sum) is taken off at the end, in the few columns of dX.
    """
    logits_nV = F.linear(x_nH, weight_VH, bias_V).float()
    logits_nV -= logits_nV.amax(dim=-1, keepdim=True)
    at_target_n1 = logits_nV.gather(1, target_n1)
    exp_nV = logits_nV.exp_()
    sum_n1 = exp_nV.sum(dim=-1, keepdim=True)
    if dx_nH is not None:
        exp_nV.scatter_add_(1, target_n1, -sum_n1)
        dx_nH.copy_(exp_nV.to(x_nH.dtype) @ weight_VH / sum_n1)
    return (sum_n1.log() - at_target_n1)[:, 0]


def losses_at_targets(base: Any, labels_BL: Tensor, **inputs: Any) -> Tensor:
    """(N,) losses of the targets of a batch, in the order of its positions.

    Args:
        base: a model that `has_plain_head`.
        labels_BL: (B, L) token ids, `IGNORED` where there is no loss.
        inputs: to the model, without labels.
    """
    hidden_BLH = base.base_model(**{**inputs, "use_cache": False}).last_hidden_state[:, :-1]
    targets_BL = labels_BL[:, 1:].to(hidden_BLH.device)
    is_target_BL = targets_BL != IGNORED
    head = base.get_output_embeddings()
    return target_losses(hidden_BLH[is_target_BL], head.weight, head.bias, targets_BL[is_target_BL])


def has_plain_head(base: Any) -> bool:
    """Whether `losses_at_targets` is the model's loss, and its vocabulary makes it pay.

    It is tried once, on a few tokens; a head that is adapted, trained, split or not there is none.

    Args:
        base: a causal language model, without PEFT's wrapper.
    """
    get_head = getattr(base, "get_output_embeddings", lambda: None)
    head = get_head()
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    is_kept = head.weight.requires_grad or head.weight.is_meta or "forward" in vars(head)
    if is_kept or head.weight.dtype not in _DTYPES or len(head.weight) < LEAST_VOCABULARY:
        return False
    if base not in _TRIED:
        _TRIED[base] = _says_the_same(base, head)
    return _TRIED[base]


def _says_the_same(base: Any, head: nn.Linear) -> bool:
    """Whether logits are the head's product of the last hidden states, and the loss theirs."""
    seen: dict[str, Any] = {}
    hooks = [
        head.register_forward_pre_hook(lambda _, given: seen.update(given=given[0])),
        base.base_model.register_forward_hook(
            lambda *called: seen.update(made=getattr(called[-1], "last_hidden_state", None))
        ),
    ]
    ids_1L = (torch.arange(12, device=head.weight.device) * 7 + 3)[None] % len(head.weight)
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        with torch.no_grad():
            mask_1L = torch.ones_like(ids_1L)
            out = base(input_ids=ids_1L, attention_mask=mask_1L, labels=ids_1L, use_cache=False)
            given_1LH, made_1LH = seen["given"], seen["made"]
            if given_1LH.dtype != head.weight.dtype or given_1LH.dtype != made_1LH.dtype:
                return False
            logits_1LV = F.linear(given_1LH, head.weight, head.bias)
            losses_N = target_losses(made_1LH[0, :-1], head.weight, head.bias, ids_1L[0, 1:])
            return (
                torch.equal(given_1LH, made_1LH)
                and torch.equal(logits_1LV.float(), out.logits.float())
                and bool((losses_N.mean() - out.loss).abs() <= 1e-5 * out.loss.abs())
            )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        for hook in hooks:
            hook.remove()
        for module, is_training in modes.items():
            module.training = is_training
