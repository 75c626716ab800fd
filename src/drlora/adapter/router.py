"""The routers that an adapter trains, and what is noted of any router's logits.

PEFT keeps the trained copy of a router in a ModulesToSaveWrapper. The copy computes in float32, as
PEFT's adapters do; what it is given and what it returns are as the model around it expects.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from drlora.adapter.inject import adapted_layers
from drlora.adapter.layer import DrLoraExperts

_KNOWN = "_drlora_output_dtypes"


def note_router_logits(router: nn.Module, layer: DrLoraExperts) -> None:
    """Have the router's logits at hand when the experts of the same block are called next."""
    # A partial is copied and pickled along with the model, and points to the copy's layer then.
    router.register_forward_hook(partial(_note_logits, layer))


def forget_router_logits(model: nn.Module) -> None:
    """Undo `note_router_logits` everywhere."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "func", None) is _note_logits:
                del module._forward_hooks[key]


def _note_logits(layer: DrLoraExperts, module: nn.Module, args: Any, output: Any) -> None:
    logits = layer.family.router_logits(output)
    layer.router_logits = None if logits is None else logits.detach()


class TrainedRouters:
    """The routers that one adapter trains: none, unless its setting `router` is `train`.

    Their copies are in float32, without the model around them noticing, and can be held still for
    the first steps of a run.

    Args:
        model: a PeftModel, or the model with the adapter in it.
        adapter: its name.

    Attributes:
        copies: PEFT's wrappers of the routers, in model order.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self.adapter = adapter
        layers = adapted_layers(model, adapter).values()
        trained = [la.block for la in layers if la.adapter(adapter).config.router == "train"]
        names = {block.router_name for block in trained}
        inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
        self.copies = [
            module
            for name, module in inner.named_modules()
            if name in names and isinstance(module, ModulesToSaveWrapper)
        ]
        self._hooks: list[RemovableHandle] = []
        self._is_over: Callable[[], bool] = lambda: True

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the trained copies."""
        return [
            p for copies in self.copies for p in copies.modules_to_save[self.adapter].parameters()
        ]

    def train_in_float32(self) -> None:
        """Keep the copies in float32.

        In bfloat16, steps at usual learning rates are smaller than the spacing of the weights, so
        most entries would never move. A copy is handed input of its own dtype, and its output goes
        back to the dtypes that the original router returns.
        """
        for copies in self.copies:
            router = copies.modules_to_save[self.adapter]
            router.to(torch.float32)
            router.register_forward_pre_hook(_input_in_own_dtype, with_kwargs=True)
            if _output_in_original_dtype not in copies._forward_hooks.values():
                # First: what is noted of the output is then what the model sees.
                copies.register_forward_hook(
                    _output_in_original_dtype, with_kwargs=True, prepend=True
                )

    def train_as_the_model(self) -> None:
        """Undo `train_in_float32`, for routers that become part of the merged model."""
        for copies in self.copies:
            router = copies.modules_to_save[self.adapter]
            for key, hook in list(router._forward_pre_hooks.items()):
                if hook is _input_in_own_dtype:
                    del router._forward_pre_hooks[key], router._forward_pre_hooks_with_kwargs[key]
            router.to(_dtype_of(copies.original_module))

    def hold(self, until: Callable[[], bool]) -> None:
        """Keep them as they are until `until()` is true; it is asked in every step.

        A held router's gradient is zero, so that it does not weigh in gradient clipping; call
        `skip_step` before the optimizer steps, too.
        """
        self.let_go()
        self._is_over = until
        for copies in self.copies:
            for module in copies.modules_to_save[self.adapter].modules():
                own = list(module.parameters(recurse=False))
                # FSDP2 computes with others than those that it shows.
                if any(isinstance(parameter, DTensor) for parameter in own):
                    self._hooks += self._hold_in_calls(module)
                else:
                    trained = [parameter for parameter in own if parameter.requires_grad]
                    self._hooks += [p.register_hook(self._held_gradient) for p in trained]

    @property
    def are_held(self) -> bool:
        """Whether they are kept as they are now."""
        return not self._is_over()

    def skip_step(self) -> None:
        """Leave held routers out of the optimizer's next step."""
        if self.are_held:
            for parameter in self.parameters:
                # Not a zero gradient: weight decay and Adam's step count must not run either.
                parameter.grad = None

    def let_go(self) -> None:
        """Hold them no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._is_over = lambda: True

    def _held_gradient(self, grad: Tensor) -> Tensor:
        return grad if self._is_over() else torch.zeros_like(grad)

    def _hold_in_calls(self, module: nn.Module) -> list[RemovableHandle]:
        """While it is called, a held module computes with its weights without their gradients."""
        kept: dict[str, nn.Parameter | None] = {}

        def take(module: nn.Module, args: Any) -> None:
            if self.are_held:
                kept.update(module._parameters)
                for name, weight in kept.items():
                    if weight is not None:
                        module._parameters[name] = _WithoutGradient.apply(weight)

        def put_back(module: nn.Module, args: Any, output: Any) -> None:
            module._parameters.update(kept)
            kept.clear()

        return [
            module.register_forward_pre_hook(take),
            module.register_forward_hook(put_back, always_call=True),
        ]


class _WithoutGradient(torch.autograd.Function):
    """A tensor as it is, whose gradient is zero: engines still wait for one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _input_in_own_dtype(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = _dtype_of(module)  # another one if the whole model was moved since

    def cast(value: Any) -> Any:
        return value.to(dtype) if _is_float(value) else value

    return tuple(cast(a) for a in args), {name: cast(value) for name, value in kwargs.items()}


def _output_in_original_dtype(
    copies: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Not the model's dtype: many routers return some of their output in float32 on purpose."""
    names = [name for name in copies.active_adapters if name in copies.modules_to_save]
    if copies.disable_adapters or not names:
        return output
    if _dtype_of(copies.modules_to_save[names[0]]) == _dtype_of(copies.original_module):
        return output
    dtypes = _original_dtypes(copies, args, kwargs)
    return tree_map(lambda v, dtype: v.to(dtype) if _is_float(v) else v, output, dtypes)


def _original_dtypes(copies: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the original router returns for such a call, as its dtypes; None for no tensor."""
    if torch.compiler.is_compiling():  # a graph keeps no computation that only dtypes are read of
        return _call_original(copies, args, kwargs)
    given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    device = given[0].device.type if given else "cpu"
    can_cast = torch.amp.is_autocast_available(device)  # not on paper, on the device `meta`
    is_cast = can_cast and torch.is_autocast_enabled(device)
    autocast = torch.get_autocast_dtype(device) if is_cast else None
    key = (copies.training, autocast, _dtype_of(copies.original_module), *(v.dtype for v in given))
    known: dict[Any, Any] = copies.__dict__.setdefault(_KNOWN, {})
    if key not in known:
        with torch.random.fork_rng({v.device for v in given if v.device.type == "cuda"}):
            known[key] = _call_original(copies, args, kwargs)
    return known[key]


@torch.no_grad()
def _call_original(copies: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    original = copies.original_module
    # Past its hooks, with which transformers records logits: these would be recorded twice. But
    # DeepSpeed's ZeRO needs its own, to bring the weights together.
    is_split = any(hasattr(parameter, "ds_id") for parameter in original.parameters())
    output = (original if is_split else original.forward)(*args, **kwargs)
    return tree_map(lambda v: v.dtype if isinstance(v, Tensor) else None, output)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
