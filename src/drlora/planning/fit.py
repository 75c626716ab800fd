"""Make a recipe fit: what is tried where memory is short, the cheapest first.

fewer examples at once     the same step, in more passes
checkpointed layers        a third more time, the same numbers
experts in four bits       level with 16 bits within the spread of seeds (docs/evidence.md)
eight-bit moments          where bitsandbytes is installed
shorter examples, fewer ranks   change what is learned, so they come last
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Change:
    """A change to a recipe and what it costs; `values` by dotted key."""

    says: str
    values: dict[str, Any] = field(default_factory=dict)


def changes(
    batch: int, accumulated: int, length: int, r_target: int, storage: str | None, on_cpu: bool
) -> Iterator[Change]:
    """One after the other, each on top of those before."""
    whole, at_once = batch * accumulated, batch
    while at_once > 1:
        at_once = max(1, at_once // 2)
        yield Change(
            f"{at_once} at once, {-(-whole // at_once)} accumulated: the same step in more passes",
            _at_once(at_once, whole),
        )
    yield Change(
        "layers computed again in the backward pass: about a third more time, the same numbers",
        {"training.gradient_checkpointing": True},
    )
    if storage is None:
        yield Change(
            "experts in four bits (nf4): level with 16 bits within the spread of seeds",
            {"quantise.experts": "nf4"},
        )
        yield Change("their scales in eight bits", {"quantise.nested": True})
    if not on_cpu and find_spec("bitsandbytes"):
        yield Change("the optimizer's moments in eight bits", {"training.optim": "adamw_8bit"})
    for shorter in (length // 2, length // 4):
        if shorter >= 64:
            yield Change(
                f"examples of {shorter} tokens: longer ones lose their end",
                {"data.max_length": shorter},
            )
    rank = r_target
    while rank > 4:
        rank //= 2
        yield Change(
            f"r_target {rank}: fewer numbers to learn with",
            {"adapter.r_init": rank // 2, "adapter.r_target": rank, "adapter.r_max": 2 * rank},
        )


def _at_once(at_once: int, whole: int) -> dict[str, Any]:
    return {
        "training.per_device_train_batch_size": at_once,
        "training.gradient_accumulation_steps": -(-whole // at_once),
        "evaluation.batch_size": at_once,
    }
