"""What a family says about the experts of its models; everything else is the same for all.

A family is one small file beside this one (docs/families.md shows how to write the next).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from drlora.ops.weights import ExpertWeights


class Run(Protocol):
    """The adapted experts, as `Family.call` uses them."""

    def __call__(
        self,
        x_TH: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        /,
        *,
        routing: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Routing-weighted sum of the adapted experts' outputs, (T, H).

        Args:
            x_TH: inputs.
            index_TK: experts of each row.
            weight_TK: their weights.
            routing: (index, weight) by token, to be counted in the place of the two above where
                these are not by token. The index E stands for no expert.
        """
        ...


class Place(NamedTuple):
    """A parameter that packed matrices can take the place of.

    Attributes:
        path: its name below the module.
        flat_experts: E where it is a matrix (E * rows, columns) of all of them; 0 where it is a
            tensor (E, rows, columns).
    """

    path: str
    flat_experts: int = 0


class Family(ABC):
    """How one kind of experts is recognised, read and called.

    Attributes:
        wraps_block: whether the adapter takes the place of the whole MoE block, router included,
            and not of a module inside it that holds the experts alone.
        left_alone: names of classes whose experts are of another kind and stay as they are.
        can_be_spread: whether they compute with a part of the experts, numbered from 0, where
            transformers has left this process no more (expert parallelism).
    """

    wraps_block: ClassVar[bool] = False
    left_alone: ClassVar[tuple[str, ...]] = ()
    can_be_spread: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Whether `module` is of this family, well-formed or not."""

    @abstractmethod
    def weights(self, module: Any) -> ExpertWeights:
        """The frozen weights, which stay the module's own. Called in each forward."""

    def missing(self, module: Any) -> str | None:
        """Why a recognised module cannot be adapted, or None."""
        return None

    def places(self, module: Any) -> list[Place]:
        """The parameters of all matrices, where packed ones can take their places."""
        return []

    def num_choices(self, module: Any) -> int:
        """How many rows the router's weight has; more than E where a choice can be no expert."""
        return self.weights(module).num_experts

    def is_interleaved(self, module: Any) -> bool:
        """Whether gate and up alternate in the output features, instead of gate before up."""
        return False

    def prepare(self, block: nn.Module) -> None:  # noqa: B027
        """Change the block around the experts before they are adapted, if it must be."""

    def call(self, module: Any, run: Run, *args: Any, **kwargs: Any) -> Any:
        """What `module(*args, **kwargs)` returns, with its experts' part done by `run`."""
        return run(*args, **kwargs)

    def router_logits(self, output: Any) -> Tensor | None:
        """The logits, a column for each expert (more may follow), in what the router returns."""
        logits = output[0] if isinstance(output, tuple) else output
        return logits if isinstance(logits, Tensor) else None


FAMILIES: list[Family] = []


def register_family(family: Family) -> Family:
    """Have experts recognised by `family` too, which is asked before all that are there."""
    FAMILIES.insert(0, family)
    return family


def family_of(module: nn.Module) -> Family | None:
    """The family that recognises `module` as its experts, or None."""
    return next((family for family in FAMILIES if family.recognises(module)), None)


def gated(act: Any) -> tuple[Any, bool]:
    """(apply_gate, is_silu) for `act(gate) * up` with gate before up."""

    def apply_gate(gate_up_nG: Tensor) -> Tensor:
        gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
        return act(gate_nI) * up_nI

    return apply_gate, is_silu(act)


def is_silu(act: object) -> bool:
    """Whether an activation is x * sigmoid(x)."""
    name = type(act).__name__
    return isinstance(act, nn.SiLU) or name == "SiLUActivation" or act is nn.functional.silu


def run_routed_rows(
    run: Run, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, num_experts: int
) -> Tensor:
    """`run` for a routing in which some places are no expert (an index of E or more)."""
    num_tokens, top_k = index_TK.shape
    index_S, weight_S = index_TK.reshape(-1), weight_TK.reshape(-1)
    (row_n,) = torch.where(index_S < num_experts)
    out_nH = run(
        x_TH[row_n // top_k],
        index_S[row_n, None],
        weight_S[row_n, None],
        routing=(index_TK.clamp(max=num_experts), weight_TK),
    )
    out_SH = out_nH.new_zeros(len(index_S), x_TH.shape[1]).index_copy(0, row_n, out_nH)
    return out_SH.view(num_tokens, top_k, -1).sum(dim=1)
