"""What an adapter does, taken from its own rows before anything is exported.

An export is compared with this. It is made from the pieces that the engines compute with, not from
the factors that exports are made of, so that an error in those does not compare with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from drlora.adapter.inject import adapted_layers
from drlora.adapter.layer import DrLoraExperts
from drlora.export.factors import Factors
from drlora.export.updates import linear_updates
from drlora.ops import LoraPiece
from drlora.ops.merge import Rounding, exact_device, place
from drlora.ops.weights import MATRICES, Matrix

ALLOWED = 0.01  # of the adapter's own effect


@dataclass(frozen=True)
class BlockReference:
    """The updates of one block's experts.

    Attributes:
        name: of the experts module.
        num_experts: E.
        shapes: matrix -> (out-features, in-features).
        pieces: float32, on the CPU.
        dtype: of the base weights.
        transposed: the matrices that the model keeps as (E, in-features, out-features).
    """

    name: str
    num_experts: int
    shapes: dict[Matrix, tuple[int, int]]
    pieces: tuple[LoraPiece, ...]
    dtype: torch.dtype
    transposed: frozenset[Matrix]

    def update(self, matrix: Matrix, expert: int) -> Tensor:
        """(O, I) float64: what is added to the expert's weight; zero where nothing is."""
        update_OI = torch.zeros(self.shapes[matrix], dtype=torch.float64)
        for piece in self.pieces:
            rows = slice(piece.offsets[expert], piece.offsets[expert + 1])
            if piece.matrix == matrix and rows.start < rows.stop:
                product_OI = piece.b_RO[rows].double().T @ piece.a_RI[rows].double()
                update_OI[piece.columns] += product_OI * piece.scaling
        return update_OI

    def merged(self, matrix: Matrix, expert: int, base_OI: Tensor, rounding: Rounding) -> Tensor:
        """What the weight `base_OI` must be when the update has been added and rounded."""
        device = exact_device(base_OI)
        update_OI = self.update(matrix, expert).to(device)
        exact_OI = base_OI.to(device, torch.float64) + update_OI
        return rounding(exact_OI, self.dtype, place(self.name, matrix, expert))


@dataclass(frozen=True)
class Reference:
    """All that an adapter changes.

    Attributes:
        blocks: name of the experts module -> its updates.
        linears: full name of a linear layer with ordinary LoRA -> its update.
        trained: full name of a module trained in full -> its tensors, and
        originals: the same of the base model.
    """

    blocks: dict[str, BlockReference]
    linears: dict[str, Factors]
    trained: dict[str, dict[str, Tensor]]
    originals: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, model: PeftModel, adapter: str) -> Reference:
        """Of the adapter of this name, whose tensors are shared, not copied."""
        inner = model.get_base_model()
        layers = adapted_layers(inner, adapter).values()
        blocks = (block_reference(layer, adapter) for layer in layers)
        copies = dict(_trained(inner, adapter))
        return cls(
            {block.name: block for block in blocks},
            linear_updates(inner, adapter),
            {name: _copied(m.modules_to_save[adapter]) for name, m in copies.items()},
            {name: _copied(m.original_module) for name, m in copies.items()},
        )

    def with_routers_as_lora(self, names: Collection[str]) -> Reference:
        """The same, where these of the modules trained in full are LoRA in the export."""
        linears = dict(self.linears)
        for name in names:
            before_EH = self.originals[name]["weight"].double()
            update_EH = self.trained[name]["weight"].double() - before_EH
            linears[name] = Factors((update_EH,), (torch.eye(len(update_EH)),))
        trained = {name: state for name, state in self.trained.items() if name not in names}
        return replace(self, linears=linears, trained=trained)

    def linear_update(self, name: str) -> Tensor:
        """(O, I) float64: what is added to a linear layer's weight."""
        factors = self.linears[name]
        return factors.b[0].double() @ factors.a[0].double()

    @property
    def is_nothing(self) -> bool:
        """Whether the adapter leaves every weight as it is."""
        products = [(p.a_RI, p.b_RO) for b in self.blocks.values() for p in b.pieces]
        products += [pair for f in self.linears.values() for pair in zip(f.a, f.b, strict=True)]
        same = all(
            torch.equal(value, self.originals[name][key].to(value.dtype))
            for name, state in self.trained.items()
            for key, value in state.items()
        )
        return same and not any(bool(a.any()) and bool(b.any()) for a, b in products)


def block_reference(layer: DrLoraExperts, adapter: str) -> BlockReference:
    """Of one layer's adapter; its tensors are shared, not copied. Base weights are not read."""
    block = layer.block
    pieces = tuple(
        piece._replace(a_RI=piece.a_RI.detach().cpu(), b_RO=piece.b_RO.detach().cpu())
        for piece in layer.adapter(adapter).pieces(torch.float32)
    )
    shapes = {}
    for matrix in MATRICES:
        in_features, out_features = block.shape_of(matrix)
        shapes[matrix] = (out_features, in_features)
    transposed = frozenset(m for m in MATRICES if layer.base_weights.matrix(m).is_transposed)
    name, dtype = block.experts_name, layer.base_weights.dtype
    return BlockReference(name, block.num_experts, shapes, pieces, dtype, transposed)


def _trained(inner: nn.Module, adapter: str) -> list[tuple[str, ModulesToSaveWrapper]]:
    return [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    ]


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def compare_trained(
    found: Deviation, module_of: Callable[[str], nn.Module], reference: Reference
) -> None:
    """Compare the modules that were trained in full, in the dtype that they are exported in.

    Args:
        found: is added to.
        module_of: the exported module of that full name.
        reference: the adapter, with these modules rounded to the base's dtype if they have to be.
    """
    for name, state in reference.trained.items():
        exported = module_of(name).state_dict()
        for key, wanted in state.items():
            effect = wanted.double() - reference.originals[name][key].double()
            got = exported[key].detach().cpu().double()
            found.add(f"{name}.{key}", got - wanted.double(), effect)


@dataclass
class Deviation:
    """The largest error of any one weight, as a share of what the adapter does to that weight."""

    share: float = 0.0
    where: str = ""
    weights: int = 0

    def add(self, where: str, error: Tensor, effect: Tensor) -> None:
        """Note the error of one weight; both are differences of weights of one shape."""
        self.weights += 1
        found, own = error.double().norm().item(), effect.double().norm().item()
        share = 0.0 if found == 0 else math.inf if own == 0 else found / own
        if not share <= self.share:
            # No number is further off than NaN.
            self.share, self.where = (math.inf if math.isnan(share) else share), where

    @property
    def is_rounding(self) -> bool:
        """Whether every weight is as it must be."""
        return self.share <= ALLOWED
