"""What an adapter shows by itself, or beside its base's configuration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from drlora.config.adapter import NOTHING
from drlora.export.base_weights import LEAVES, Base
from drlora.moe.stored.config import stored_settings
from drlora.moe.stored.refused import method_of
from drlora.verification.contents import Contents, Update
from drlora.verification.findings import Finding, fault, warning
from drlora.verification.keys import ROUTERS
from drlora.verification.packing import Likeness, Packing, alike, judge

LARGE = 1.0  # of the weights' own norm
_SHOWN = 8


@dataclass(frozen=True)
class Sizes:
    """How large the experts' updates are.

    Attributes:
        norms: name of a matrix -> (E,) Frobenius norm of each expert's update.
        packing: by which layout B is packed, where it is PEFT's.
    """

    norms: dict[str, Tensor]
    packing: Packing | None


def measure(contents: Contents) -> tuple[Sizes, list[Finding]]:
    """Read every tensor once, block by block: norms, packing, and what is not finite."""
    norms, found, likeness = {}, list[Finding](), list[tuple[Likeness, Likeness]]()
    for key, name in contents.keys.items():
        if name.kind in ("lora", "whole") and not _is_finite(contents.weights.read(key)):
            found.append(fault("not-finite", key))
    for update in contents.updates:
        pairs = [update.factors(expert) for expert in update.experts]
        bad = [e for e, pair in zip(update.experts, pairs, strict=True)
               if not all(map(_is_finite, pair))]  # fmt: skip
        if bad:
            found.append(fault("not-finite", update.name, f"experts {few(bad)}"))
            continue
        norms[update.name] = torch.tensor([_norm(a, b) for a, b in pairs])
        if len(pairs) > 1 and _all_same(pairs) and norms[update.name].any():
            found.append(warning("copied-experts", update.name))
        if update.packed is not None and update.rank and update.rank > 1 and len(pairs) > 1:
            _, b_OC = update.packed()
            count = len(pairs)
            likeness.append((alike(b_OC, count, False), alike(b_OC, count, True)))
        update.forget()
    packing = judge(likeness) if likeness else None
    if packing is not None and packing.verdict == "wrong":
        detail = (
            f"two columns of one expert have |cosine| {packing.claimed:.3f} as PEFT reads them "
            f"(expert fastest) and {packing.other:.3f} expert by expert; column k * E + e is "
            f"expert e's"
        )
        found.append(fault("packing", "lora_B", detail))
    return Sizes(norms, packing), found


def touched(contents: Contents, sizes: Sizes) -> list[Finding]:
    """Whether experts are touched at all, and which updates are zero."""
    if contents.config.get("start") == NOTHING:
        detail = f"by its settings (start={NOTHING}) the adapter is on other layers alone"
        return [warning("no-expert-touched", "", detail)]
    if not contents.updates:
        names = _named(contents)
        claimed = any("experts" in n or n.rpartition(".")[2] in LEAVES for n in names)
        detail = "the settings name them" if claimed else "the adapter is on other layers alone"
        return [(fault if claimed else warning)("no-expert-touched", "", detail)]
    found, inert = [], list[str]()
    by_module: dict[str, list[Tensor]] = defaultdict(list)
    for update in contents.updates:
        if update.name in sizes.norms and len(sizes.norms[update.name]):
            by_module[update.module].append(sizes.norms[update.name])
    for module, norms in by_module.items():
        count = max(map(len, norms))
        largest_E = torch.stack([n for n in norms if len(n) == count]).amax(dim=0)
        dead = torch.nonzero(largest_E == 0)[:, 0].tolist()
        if len(dead) == count:
            inert.append(module)
        elif dead:
            found.append(warning("dead-experts", module, f"experts {few(dead)} of {count}"))
    if inert:
        detail = f"B is zero in {len(inert)} of {len(by_module)} blocks"
        found.append(fault("inert-experts", few(inert), detail))
    return found


def whole(contents: Contents, base: Base | None) -> list[Finding]:
    """Whether every expert, projection and module is there that should be."""
    found = [fault("half-a-pair", few(contents.unpaired))] if contents.unpaired else []
    if contents.odd_ranks:
        more = len(contents.odd_ranks)
        found.append(fault("rank", f"{more} tensors", few(contents.odd_ranks, 2)))
    by_module: dict[str, list[Update]] = defaultdict(list)
    for update in contents.updates:
        by_module[update.module].append(update)
    usual = {update.matrix for update in contents.updates}
    wanted = {LEAVES[leaf] for name in _named(contents)
              if (leaf := name.rpartition(".")[2]) in LEAVES
              and ("experts" in name or "switch_mlp" in name or "." not in name)}  # fmt: skip
    if usual & {"gate", "up"}:
        wanted = wanted - {"gate_up"} | ({"gate", "up"} if "gate_up" in wanted else set())
    elif wanted & {"gate", "up"}:
        wanted = wanted - {"gate", "up"} | {"gate_up"}
    dropped = sorted(wanted - usual) if contents.updates else []
    if dropped and contents.kinds != {"pool"}:
        found.append(fault("dropped-projection", ", ".join(dropped), "the settings name it"))
    for module, updates in by_module.items():
        lacking = sorted(usual - {update.matrix for update in updates})
        if lacking and not _is_chosen(contents, module):
            found.append(fault("dropped-projection", module, ", ".join(lacking)))
        block = base.block_of(module) if base else None
        everyone = range(block.num_experts) if block else set().union(*(u.experts for u in updates))
        for update in updates:
            missing = sorted(set(everyone) - set(update.experts))
            if block is None and update.experts:
                missing += sorted(set(range(max(update.experts))) - set(update.experts))
            if missing:
                found.append(fault("missing-experts", update.name, f"experts {few(missing)}"))
        if any(update.rank is None and update.kind == "apart" for update in updates):
            found.append(warning("unequal-ranks", module))
    return found + _lost_modules(contents)


def fits(contents: Contents, base: Base) -> list[Finding]:
    """Whether shapes are those of the base's blocks."""
    found = []
    for update in contents.updates:
        block = base.block_of(update.module)
        if block is None:
            found.append(fault("wrong-base", update.module, f"{base.name} has no such block"))
            continue
        beyond = [expert for expert in update.experts if expert >= block.num_experts]
        if beyond:
            detail = f"experts {few(beyond)}, the base has {block.num_experts}"
            found.append(fault("wrong-base", update.name, detail))
            continue
        if not update.experts:
            continue
        a_rI, b_Or = update.factors(update.experts[0])
        own, wanted = (a_rI.shape[1], b_Or.shape[0]), block.shape_of(update.matrix)
        if own not in (wanted, wanted[::-1]):
            detail = f"in- and out-features {own}, the base's are {wanted}"
            found.append(fault("wrong-base", update.name, detail))
    return found


def relative(
    contents: Contents, sizes: Sizes, base: Base
) -> tuple[dict[str, float], list[Finding]]:
    """For each matrix the largest update of an expert, as a share of the norm of its weight."""
    settings = stored_settings(base.model.config)
    if settings is not None:  # its files have codes, which are no weights to have a norm
        detail = f"the base is quantised ({method_of(settings)}), so updates have no share of it"
        return {}, [warning("not-compared", base.name, detail)]
    shares, found = {}, []
    for update in contents.updates:
        block = base.block_of(update.module)
        if block is None or update.name not in sizes.norms or not base.has_weights(block):
            continue
        position = int(sizes.norms[update.name].argmax())
        expert = update.experts[position]
        if expert >= block.num_experts:
            continue
        weight = base.read(block, update.matrix, expert, base.weights)
        norm = weight.float().norm().item()
        shares[update.name] = sizes.norms[update.name][position].item() / max(norm, 1e-30)
        if shares[update.name] > LARGE:
            detail = f"expert {expert}: {shares[update.name]:.3g} times; is alpha / r in B already?"
            found.append(warning("larger-than-weights", update.name, detail))
    return shares, found


def _lost_modules(contents: Contents) -> list[Finding]:
    saved = [str(name) for name in contents.config.get("modules_to_save") or ()]
    there = {key.module for key in contents.keys.values() if key.kind in ("whole", "lora")}
    lost = [n for n in saved if not any(m == n or m.endswith(f".{n}") for m in there)]
    routers = [name for name in lost if name.rpartition(".")[2] in ROUTERS]
    plain = [name.removesuffix(".weight") for name in _named(contents)]
    routers += [
        name
        for name in plain
        if name.rpartition(".")[2] in ROUTERS
        and not any(m == name or m.endswith(f".{name}") for m in there)
    ]
    others = sorted(set(lost) - set(routers))
    found = [fault("lost-routers", few(sorted(set(routers))))] if routers else []
    return found + ([fault("lost-modules", few(others))] if others else [])


def _named(contents: Contents) -> list[str]:
    """What the settings target, by name; a pattern names nothing that can be looked for."""
    found: list[str] = []
    for setting in ("target_modules", "target_parameters"):
        value = contents.config.get(setting)
        found += [str(name) for name in value] if isinstance(value, (list, tuple)) else []
    if contents.is_mlx:
        own = contents.config.get("lora_parameters") or {}
        found += [str(name) for name in own.get("keys") or ()]
    return found


def _is_chosen(contents: Contents, module: str) -> bool:
    """Whether the settings name single layers, so that layers may differ."""
    return any(any(part.isdigit() for part in name.split(".")) for name in _named(contents))


def few(things: Iterable[object], shown: int = _SHOWN) -> str:
    """The first of them, and how many there are."""
    texts = [str(thing) for thing in things]
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


def _norm(a_rI: Tensor, b_Or: Tensor) -> float:
    """Of the product, which is never formed."""
    square = ((b_Or.T @ b_Or) * (a_rI @ a_rI.T)).sum().item()
    return max(square, 0.0) ** 0.5


def _all_same(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    first = pairs[0]
    return all(
        own.shape == other.shape and torch.equal(own, other)
        for pair in pairs[1:]
        for own, other in zip(first, pair, strict=True)
    )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
