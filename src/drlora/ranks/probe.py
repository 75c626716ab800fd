"""What experts would learn first, found in a few batches before the first step.

The gradient G (O, I) of an expert's frozen weight tells along which directions a low-rank update
lowers the loss soonest. G is never formed: beside each expert stands a probe of P rows with A = 0
and B random. The model computes what it did, and the gradient of the probe's A is B^T G, a random
sketch of the rows of G (Halko, Martinsson and Tropp, arXiv 0909.4061). Its right singular vectors
approximate those of G, its singular values their strength. That costs as much as training LoRA of
rank P for so many batches, without an optimizer.

To start A along these directions is the idea of LoRA-GA (arXiv 2407.05000), which forms G and
changes the base weights; ranks by what the gradient says is that of GoRA (arXiv 2502.12171).
Neither knows experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter, ProbeRows
from drlora.adapter.layer import DrLoraExperts
from drlora.distributed import add_up
from drlora.distributed.zero import is_partitioned, leaf_hooks_off, refuse_without_engine
from drlora.errors import ConfigError

# More rows than directions wanted, since a sketch of exactly as many misses part of them.
OVERSAMPLING = 8

# The loss is scaled, as a GradScaler does it: in float16 gradients of single tokens are below what
# it holds. In other dtypes a power of two changes no digit. A smaller one where one is too large.
_SCALES = (2.0**16, 2.0**8, 1.0)


# From the model and a batch to what is to be lowered, a scalar with a graph.
Loss: TypeAlias = Callable[[PeftModel, Mapping[str, Any]], Tensor]


def own_loss(model: PeftModel, batch: Mapping[str, Any]) -> Tensor:
    """That which the model computes of labels.

    Raises:
        ConfigError: if it computes none.
    """
    output = model(**batch)
    if output.get("loss") is None:
        raise ConfigError(
            "a gradient was to be taken, but the model gives no loss for a batch; give batches "
            "with labels, or the loss of the training: loss=trainer.compute_loss."
        )
    return output.loss


class Directions(NamedTuple):
    """Those of the gradient of one block's projection.

    Attributes:
        rows_EDI: (E, D, I) float32, orthonormal for each expert, the strongest first.
        strength_ED: (E, D) float32, the gradient's norm along each, falling.
    """

    rows_EDI: Tensor
    strength_ED: Tensor


def probe_gradients(
    model: PeftModel,
    adapters: Mapping[str, ExpertsAdapter],
    batches: Iterable[Mapping[str, Tensor]],
    count: int,
    loss: Loss = own_loss,
) -> dict[str, dict[str, Directions]]:
    """Block -> projection -> the strongest directions of each expert's gradient.

    The gradient is that of the loss, averaged over the batches, in training mode. Nothing of the
    model changes, and no gradient is left behind. All processes get the same.

    Args:
        model: carries the adapters.
        adapters: block -> adapter.
        batches: what the loss is computed of.
        count: directions wanted for an expert; fewer where a matrix is narrower.
        loss: by default the model's own, for which batches have labels.

    Raises:
        ConfigError: if there is no batch, or a batch gives no loss, or none that is finite.
    """
    with _probes(adapters, count + OVERSAMPLING) as probes:
        leaves = [probe.a_RI for of_block in probes.values() for probe in of_block.values()]
        sketches = sketch_gradients(model, leaves, batches, loss)
        found: dict[str, dict[str, Directions]] = {}
        for block, of_block in probes.items():
            found[block] = {}
            for projection, probe in of_block.items():
                sketch_EPI = sketches.pop(0).view(len(probe.offsets) - 1, -1, probe.a_RI.shape[1])
                _, strength_EP, rows_EPI = _svd(sketch_EPI)
                found[block][projection] = Directions(rows_EPI[:, :count], strength_EP[:, :count])
    return found


def _svd(sketch_EPI: Tensor) -> tuple[Tensor, ...]:
    """Of each matrix; on the CPU, since a GPU takes matrices of this width one by one."""
    parts = torch.linalg.svd(sketch_EPI.cpu(), full_matrices=False)
    return tuple(part.to(sketch_EPI.device) for part in parts)


@contextmanager
def _probes(
    adapters: Mapping[str, ExpertsAdapter], num_rows: int
) -> Iterator[dict[str, dict[str, ProbeRows]]]:
    """Probes beside the experts of all adapters, of `num_rows` rows where the matrix is as wide."""
    try:
        for adapter in adapters.values():
            for projection, pool in adapter.rank_pools.items():
                rows = min(num_rows, pool.in_features, pool.out_features)
                adapter.probes[projection] = ProbeRows.beside(pool, rows)
        yield {block: dict(adapter.probes) for block, adapter in adapters.items()}
    finally:
        for adapter in adapters.values():
            adapter.probes.clear()
            adapter.meter.reset()  # which counted what the probes saw


def sketch_gradients(
    model: PeftModel,
    leaves: list[Tensor],
    batches: Iterable[Mapping[str, Tensor]],
    loss: Loss = own_loss,
    *,
    may_miss: bool = False,
) -> list[Tensor]:
    """The gradient of the mean loss of the batches in `leaves`, float32, alike on all processes.

    Args:
        model: carries what the leaves belong to.
        leaves: A of probes.
        batches: what the loss is computed of.
        loss: by default the model's own, for which batches have labels.
        may_miss: whether a leaf that no gradient reaches has zeros; else that is an error.

    Raises:
        ConfigError: if there is no batch, or a batch gives no loss, or none that is finite.
    """
    seen = list(batches)
    best, most = None, 0.0
    for scale in _SCALES:
        sums, count, used = _summed(model, leaves, seen, loss, scale, may_miss)
        if used > most:
            best, most = [total / (used * scale) for total in sums], used
        if used == count:
            break
    if best is None:
        raise ConfigError(
            f"the gradient was to be averaged over {int(count)} batches, of which none had "
            f"a finite one; give a few of the training's, or look at the data."
        )
    if most < count:
        warnings.warn(
            f"{int(count - most)} of {int(count)} batches had a gradient that is NaN or infinite, "
            f"and were left out of what ranks and rows are placed by; look at the data.",
            stacklevel=2,
        )
    return best


def _summed(
    model: PeftModel,
    leaves: list[Tensor],
    batches: list[Mapping[str, Tensor]],
    loss: Loss,
    scale: float,
    may_miss: bool,
) -> tuple[list[Tensor], float, float]:
    """Over all processes: the sums of the gradients of `scale` times the loss, float32; the
    batches; and those whose gradients are finite, which alone are in the sums."""
    sums = [torch.zeros(leaf.shape, device=leaf.device) for leaf in leaves]
    seen = torch.zeros(2, device=leaves[0].device)

    def scaled(model: PeftModel, batch: Mapping[str, Any]) -> Tensor:
        return loss(model, batch) * scale

    for gradients in gradients_of_batches(model, leaves, batches, scaled, may_miss=may_miss):
        usable = all(bool(gradient.isfinite().all()) for gradient in gradients)
        for total, gradient in zip(sums, gradients if usable else (), strict=usable):
            total += gradient
        seen += torch.tensor([1.0, float(usable)], device=seen.device)
    for total in [*sums, seen]:
        add_up(total)
    count, used = seen.tolist()
    return sums, count, used


def gradients_of_batches(
    model: PeftModel,
    leaves: list[Tensor],
    batches: Iterable[Mapping[str, Tensor]],
    loss: Loss,
    *,
    may_miss: bool = False,
) -> Iterator[list[Tensor]]:
    """The gradient of `loss(model, batch)` in `leaves`, batch by batch, in training mode.

    By `backward`, since reentrant checkpointing knows nothing else; every other gradient that the
    model has is put back as it was. With `may_miss` a leaf that no gradient reaches has zeros.
    What ZeRO trains is out of the graph meanwhile, for ZeRO would take its gradients for those of
    a step; then the embeddings ask for one, so that there is a graph where the leaves are no part
    of what is computed (those of routing).

    Raises:
        ConfigError: if checkpointing keeps a gradient from the leaves, or ZeRO has split the
            weights and no engine brings them together yet.
    """
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    refuse_without_engine(model.parameters())
    of_zero = [parameter for parameter in trained if is_partitioned(parameter)]
    kept = [(tensor, tensor.grad) for tensor in (*trained, *leaves)]
    model.train()
    settings: Any = getattr(model.config, "get_text_config", lambda: None)()
    caches = getattr(settings, "use_cache", False)
    hooks = []
    if of_zero:
        # Each time: PEFT lets an adapter ask for gradients again after it was off (a reference).
        hooks = [
            model.get_base_model().register_forward_pre_hook(lambda *_: _let_none_ask(of_zero)),
            model.get_input_embeddings().register_forward_hook(_ask_for_gradient),
        ]
    layers = [module for module in modes if isinstance(module, DrLoraExperts)]
    try:
        for layer in layers:
            layer.is_probed = True
        if caches:  # what is kept for decoding is of no use here, and some models keep it in place
            settings.use_cache = False
        for batch in batches:
            for tensor, _ in kept:
                tensor.grad = None
            moved = {
                key: value.to(leaves[0].device) if isinstance(value, Tensor) else value
                for key, value in batch.items()  # of packed rows lengths are numbers
            }
            with leaf_hooks_off(of_zero):
                loss(model, moved).backward()
            if not may_miss and any(leaf.grad is None for leaf in leaves):
                raise ConfigError(
                    "gradients do not reach the experts: with reentrant checkpointing call "
                    "model.enable_input_require_grads(), or set use_reentrant=False."
                )
            yield [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    finally:
        if caches:
            settings.use_cache = caches
        for layer in layers:
            layer.is_probed = False
        for hook in hooks:
            hook.remove()
        for parameter in of_zero:
            parameter.requires_grad_(True)
        for tensor, gradient in kept:
            tensor.grad = gradient
        for module, training in modes.items():
            module.training = training


def _let_none_ask(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def _ask_for_gradient(module: Any, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
