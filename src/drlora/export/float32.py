"""A model computed in float32, whatever it is stored in, one layer at a time.

    with in_float32(model):
        logits = model(**batch).logits      # float32 throughout; afterwards all is as before

Layers (the members of the outermost ModuleLists) are widened when they are called and narrowed
when they return, so that never more than one of them takes the room of float32. What is outside
of the layers, such as embeddings and the head, is wide for the whole time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

Prepare = Callable[[nn.Module], None]
NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module, prepare: Prepare | None = None) -> Iterator[None]:
    """Compute in float32 while the block lasts; a model that cannot be widened is left as it is.

    Args:
        model: any module; it is not changed but for the time of the block.
        prepare: called with each adapted module when its weights are wide; what it writes into
            them is undone with the widening, so weights that are float32 already are copied too.
    """
    if not can_be_widened(model):
        yield
        return
    layers = list(layers_of(model))
    inside = {id(t) for layer in layers for t in _tensors(layer)}
    with ExitStack() as stack:
        outside = [tensor for tensor in _tensors(model) if id(tensor) not in inside]
        stack.enter_context(widened(outside, copies=prepare is not None))
        if prepare is not None:
            within = {id(module) for layer in layers for module in layer.modules()}
            for module in model.modules():
                if id(module) not in within:
                    prepare(module)
        for layer in layers:
            stack.enter_context(_wide_when_called(layer, prepare))
        yield


def can_be_widened(model: nn.Module) -> bool:
    """Whether all floating-point weights are ordinary tensors; quantisers bring their own."""
    return all(type(t.data) is Tensor for t in _tensors(model) if t.is_floating_point())


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost ModuleLists, in order."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers_of(child)


@contextmanager
def _wide_when_called(layer: nn.Module, prepare: Prepare | None) -> Iterator[None]:
    call = ExitStack()

    def before(module: nn.Module, args: object) -> None:
        call.enter_context(widened(list(_tensors(layer)), copies=prepare is not None))
        for part in layer.modules() if prepare else ():
            prepare(part)  # type: ignore[misc]  # it is there if the loop runs

    def after(module: nn.Module, args: object, output: object) -> None:
        call.close()

    hooks = [
        layer.register_forward_pre_hook(before, prepend=True),
        layer.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        call.close()
        for hook in hooks:
            hook.remove()


@contextmanager
def widened(tensors: list[Tensor], copies: bool = False) -> Iterator[None]:
    """Their data in float32; with `copies`, what is float32 already is a copy meanwhile."""
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, data in kept:
            if data.dtype in NARROW:
                tensor.data = data.float()
            elif copies and data.dtype == torch.float32:
                tensor.data = data.clone()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
