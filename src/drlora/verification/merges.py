"""A merged model against its base and the adapter: what became of each update.

Experts one by one, routers and other layers beside them.

    c = <W' - W, U> / <U, U>

for the update U is the part of it that is in the merged weights, along itself: 1 if all of it is
there, 2 if it is there twice, less than 1 where rounding swallowed some. Where it is none of these
the other ways that a merge goes wrong are tried: B read by the other layout, and updates on other
experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from drlora.export.base_weights import Base, Weights
from drlora.moe.blocks import MoEBlock
from drlora.verification.checks import few
from drlora.verification.contents import Contents, Update
from drlora.verification.findings import Finding, fault, warning
from drlora.verification.packing import other_factors

NEAR = 0.02  # of an update may be anywhere else
LOST = 0.1  # of an update, and rounding has swallowed too much
SURE = 4.0  # standard errors of rounding
_PROBES = 8
_TOKENS, _RESIZED = "trainable_tokens_delta", "base_layer"
_COPIES = (_RESIZED, "original_module", "modules_to_save")  # of embeddings that were resized


@dataclass
class Merged:
    """What became of one matrix of a block; sums over its experts.

    Attributes:
        name: of the matrix.
        along: <W' - W, U>.
        effect: <U, U>.
        moved: <W' - W, W' - W>.
        noise: variance that stochastic rounding gives `along`, at most.
        unmoved: entries with an update that are as they were.
        entries: entries with an update.
        off: entries that are not the sum rounded to the nearest, once or as PEFT rounds it: the
            update first.
        other: <W' - W, V> / <V, V> for V read by the other layout of B.
        order: for each expert, the one whose update its weight moved by; -1 for none.
    """

    name: str
    along: float = 0.0
    effect: float = 0.0
    moved: float = 0.0
    noise: float = 0.0
    unmoved: int = 0
    entries: int = 0
    off: int = 0
    other: float = 0.0
    order: tuple[int, ...] = ()

    def add(self, before_OI: Tensor, after_OI: Tensor, update_OI: Tensor) -> Tensor:
        """Note one weight, before and after the merge; returns by how much it moved."""
        moved_OI = after_OI.float() - before_OI.float()
        nearest_OI = (before_OI.float() + update_OI).to(after_OI.dtype)
        is_updated = update_OI != 0
        self.along += float((moved_OI * update_OI).sum(dtype=torch.float64))
        self.effect += float(update_OI.square().sum(dtype=torch.float64))
        self.moved += float(moved_OI.square().sum(dtype=torch.float64))
        spacing_OI = torch.finfo(after_OI.dtype).eps * after_OI.float().abs()
        self.noise += float((update_OI * spacing_OI).square().sum(dtype=torch.float64)) / 4
        self.entries += int(is_updated.sum())
        self.unmoved += int((is_updated & (moved_OI == 0)).sum())
        slack = 4.0 if after_OI.dtype == torch.float32 else 0.0  # spacings: sums differ in order
        rounded = (nearest_OI, before_OI + update_OI.to(before_OI.dtype))  # as exact, and as PEFT
        gaps = [(after_OI.float() - one.to(after_OI.dtype).float()).abs() for one in rounded]
        self.off += int((torch.minimum(*gaps) > slack * spacing_OI).sum())
        return moved_OI

    @property
    def share(self) -> float:
        """The part of the update that is in the weights, along itself."""
        return self.along / self.effect if self.effect else 1.0

    @property
    def error(self) -> float:
        """Standard error of `share` under stochastic rounding."""
        return math.sqrt(self.noise) / self.effect if self.effect else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"share": self.share}


def compare_merged(
    contents: Contents, base: Base, merged: Weights
) -> tuple[list[Merged], list[Finding]]:
    """Each matrix that the adapter changes, experts one by one; and what could not be compared."""
    found, left = [], list[str]()
    for update in contents.updates:
        block = base.block_of(update.module)
        if block is None or not base.has_weights(block) or not update.experts:
            left.append(update.name)
            continue
        found.append(_compare(update, block, base, merged))
        update.forget()
    unseen = [(fault if not found else warning)("not-compared", few(left, 2))] if left else []
    for name, before, after, wanted in _others(contents, base, merged):
        if before is None or after is None or not before.shape == after.shape == wanted.shape:
            unseen.append(_unlike(name, before, after, wanted))
        elif before.is_floating_point():
            one = Merged(name)
            one.add(before, after, wanted)
            found.append(one)
    return found, unseen


# Name, and as it was, as it is in the merged model, and what it must have moved by.
Other = tuple[str, Tensor | None, Tensor | None, Tensor]


def _others(contents: Contents, base: Base, merged: Weights) -> Iterator[Other]:
    """Layers beside the experts: LoRA, and what was trained in full, routers for one."""
    own = {key: f"{name.module}.{name.part}".replace(f".{_RESIZED}.bias", ".bias")
           for key, name in contents.keys.items() if name.kind == "whole"}  # fmt: skip
    # The base's own embeddings, of other rows than in its checkpoint.
    resized = {name.replace(f".{_RESIZED}.", "."): key
               for key, name in own.items() if f".{_RESIZED}." in name}  # fmt: skip
    for module, factors in contents.linears():
        name = f"{module}.weight"
        before, after = _both(base, merged, name)
        if name in resized:
            before = contents.weights.read(resized[name])
        like = next((x for x in (after, before) if x is not None), None)
        product = factors()[1] @ factors()[0] if like is None else _product(factors(), like)
        yield module, before, after, product
    for key, name in own.items():
        trained = contents.weights.read(key).float()
        module, _, part = name.rpartition(".")
        if part == _TOKENS:
            name = f"{module.removesuffix('.token_adapter')}.weight"
            rows = _tokens(contents, name)
            before, after = (_rows(whole, rows) for whole in _both(base, merged, name))
        elif module.rpartition(".")[2] in _COPIES or not part:
            continue
        else:
            before, after = _both(base, merged, name)
        if before is not None and before.shape == trained.shape:
            yield name, before, after, trained - before.float()
        elif after is not None:  # new rows, or a head that was tied
            yield name, torch.zeros_like(trained), after, trained
        else:
            yield name, before, after, trained


def _both(base: Base, merged: Weights, name: str) -> tuple[Tensor | None, Tensor | None]:
    """A tensor of the base, and of the merged model; None where it is not in the files."""
    key = base.stored_name(name)
    found = (w.read(key) if key in w.files else None for w in (base.weights, merged))
    before, after = found
    return before, after


def _tokens(contents: Contents, name: str) -> list[int]:
    """Which rows of an embedding were trained alone."""
    said: Any = contents.config.get("trainable_token_indices")
    if isinstance(said, dict):
        module = name.removesuffix(".weight")
        return next((v for k, v in said.items() if f".{module}".endswith(f".{k}")), [])
    return list(said or ())


def _rows(whole: Tensor | None, rows: list[int]) -> Tensor | None:
    return None if whole is None or max(rows, default=0) >= len(whole) else whole[rows]


def _unlike(name: str, before: Tensor | None, after: Tensor | None, update: Tensor) -> Finding:
    """Of what could not be subtracted from each other."""
    if before is None:
        return warning("not-compared", name, "the base's files have no such tensor")
    if after is None:
        return fault("dropped-in-merge", name, "its files have no such tensor")
    shapes = [tuple(x.shape) for x in (after, before, update)]
    return fault("differs-in-merge", name, "merged {}, base {}, update {}".format(*shapes))


def judge_merged(matrices: list[Merged]) -> list[Finding]:
    """What is wrong with the merge, by name."""
    found = []
    for one in matrices:
        if one.effect == 0:
            continue
        share = f"{one.share:.1%} of the update is in the weights"
        if one.moved == 0 and one.off:
            found.append(fault("dropped-in-merge", one.name, "its weights are the base's"))
        elif abs(one.share - 1) <= NEAR + SURE * one.error:
            continue
        elif one.off <= one.entries * 1e-3:  # a right merge, rounded to the nearest
            detail = f"{share}, {one.unmoved / one.entries:.1%} of its entries are as they were"
            name = "lost-in-rounding"
            found.append((fault if one.share < 1 - LOST else warning)(name, one.name, detail))
        elif abs(one.other - 1) <= NEAR:
            detail = "the merge read B expert by expert, and the adapter's layout is expert fastest"
            found.append(fault("packing", one.name, detail))
        elif _is_permuted(one.order):
            pairs = [f"{e} has that of {o}" for e, o in enumerate(one.order) if e != o]
            found.append(fault("expert-order", one.name, few(pairs, 3)))
        elif one.along**2 > (1 - NEAR) * one.effect * one.moved:
            detail = f"it counts {one.share:.3g} times; is alpha / r both in B and in the settings?"
            found.append(fault("scale", one.name, detail))
        else:
            found.append(fault("differs-in-merge", one.name, share))
    return found


def _compare(update: Update, block: MoEBlock, base: Base, merged: Weights) -> Merged:
    found = Merged(update.name)
    sketches, moves = [], []
    width = block.shape_of(update.matrix)
    probes_KI = torch.randn(_PROBES, max(width), generator=torch.Generator().manual_seed(0))
    along_other = effect_other = 0.0
    for expert in update.experts:
        before_OI = base.read(block, update.matrix, expert, base.weights)
        after_OI = base.read(block, update.matrix, expert, merged)
        update_OI = _product(update.factors(expert), before_OI)
        moved_OI = found.add(before_OI, after_OI, update_OI)
        sketches.append((update_OI @ probes_KI[:, : update_OI.shape[1]].T).flatten())
        moves.append((moved_OI @ probes_KI[:, : update_OI.shape[1]].T).flatten())
        if update.packed is not None and update.rank:
            pair = other_factors(update.packed(), expert, update.rank)
            other_OI = _product(pair, moved_OI)
            along_other += float((moved_OI * other_OI).sum(dtype=torch.float64))
            effect_other += float(other_OI.square().sum(dtype=torch.float64))
    found.other = along_other / effect_other if effect_other else 0.0
    found.order = _order(torch.stack(moves), torch.stack(sketches))
    return found


def _product(pair: tuple[Tensor, Tensor], like_OI: Tensor) -> Tensor:
    """B A, turned where the adapter takes in- for out-features, as PEFT does for some models."""
    a_rI, b_Or = pair
    product = b_Or @ a_rI
    return product if product.shape == like_OI.shape else product.T


def _order(moves_ES: Tensor, sketches_ES: Tensor) -> tuple[int, ...]:
    """For each expert the update that its move is most like; -1 where it did not move."""
    moves_ES = moves_ES / moves_ES.norm(dim=1, keepdim=True).clamp_min(1e-30)
    sketches_ES = sketches_ES / sketches_ES.norm(dim=1, keepdim=True).clamp_min(1e-30)
    best = (moves_ES @ sketches_ES.T).max(dim=1)
    return tuple(int(i) if c > 0.9 else -1 for c, i in zip(*best, strict=True))


def _is_permuted(order: tuple[int, ...]) -> bool:
    known = [one for one in order if one >= 0]
    wrong = sum(one != expert for expert, one in enumerate(order) if one >= 0)
    return wrong > 0 and len(set(known)) == len(known) and len(known) > len(order) // 2


def other_base(contents: Contents, base: Base, merged: Weights) -> list[Finding]:
    """Whether the merged model is of another base.

    It has the base's experts by their names and shapes. Norms are not adapted: they are the base's.
    """
    blocks = {update.module: base.block_of(update.module) for update in contents.updates}
    for key in (k for block in blocks.values() if block for k in base.keys_of(block)):
        if key in base.weights.files:
            if key not in merged.files:
                return [fault("wrong-base", key, "the merged model has no such tensor")]
            own, other = base.weights.shape(key), merged.shape(key)
            if own != other:
                return [fault("wrong-base", key, f"it is {other} in the merged model, not {own}")]
    for key in base.weights.files:
        if not key.endswith("norm.weight") or key not in merged.files:
            continue
        before, after = base.weights.read(key), merged.read(key)
        if before.shape != after.shape or not torch.equal(
            before.float(), after.to(before.dtype).float()
        ):
            return [fault("wrong-base", key, "the merged model is of another base")]
    return []
