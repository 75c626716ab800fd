"""What can be wrong with an adapter, by name.

A fault makes `drlora verify` end with code 1. A warning is what is right for some readers and
wrong for others, or may be meant.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Name -> what it means; what a finding says besides is where it is and what was measured.
NAMES = {
    "no-expert-touched": "no expert of the model has an update",
    "inert-experts": "the update of these experts is zero: they compute as before training",
    "dead-experts": "single experts have an update of zero, as those that no token went to",
    "copied-experts": "every expert of a block has the same update",
    "not-finite": "there are NaN or infinite numbers",
    "half-a-pair": "lora_A without lora_B, or the other way round",
    "missing-experts": "some experts of a block have no update",
    "dropped-projection": "a projection has no update where the settings or other blocks have one",
    "lost-routers": "the settings name routers, and the file has none",
    "lost-modules": "the settings name modules trained in full, and the file lacks them",
    "rank": "tensors have another rank than the settings say, so readers scale them differently",
    "unequal-ranks": "experts differ in rank, which engines with stacked experts refuse",
    "rank-beyond-engine": "the rank is larger than an engine takes",
    "packing": "the columns of B are in another order than the layout says",
    "expert-order": "updates are on other experts than they belong to",
    "scale": "the update counts more or less often than once",
    "larger-than-weights": "the update is larger than the weights that it is added to",
    "wrong-base": "the adapter was made for another model",
    "keys-of-transformers-4": "names of transformers 4 that PEFT does not translate for this model",
    "unread-keys": "names that PEFT does not find in the model, or misses in the file",
    "dropped-in-merge": "the merged model lacks the update",
    "lost-in-rounding": "rounding to the stored dtype has swallowed a part of the update",
    "not-compared": "nothing is known of this: it could not be compared",
    "differs-in-merge": "the merged model has something else than the update",
}
# What may be a warning: right for some readers, or meant. All others are faults each time.
WARNINGS = (
    "no-expert-touched",  # where the settings name no experts either
    "dead-experts",
    "copied-experts",
    "unequal-ranks",
    "rank-beyond-engine",
    "larger-than-weights",
    "keys-of-transformers-4",
    "not-compared",  # where something of the experts was
    "lost-in-rounding",  # of less than a tenth of the update
)


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: one of `NAMES`.
        is_fault: whether it is a fault, or a warning.
        where: module, expert or key; "" for the adapter as a whole.
        detail: what was measured, and the way out.
    """

    name: str
    is_fault: bool
    where: str
    detail: str

    def __post_init__(self) -> None:
        assert self.name in NAMES and (self.is_fault or self.name in WARNINGS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"meaning": NAMES[self.name]}

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.name}{place}: {NAMES[self.name]}{detail}"


def fault(name: str, where: str = "", detail: str = "") -> Finding:
    """What makes the adapter wrong."""
    return Finding(name, True, where, detail)


def warning(name: str, where: str = "", detail: str = "") -> Finding:
    """What may be meant, or troubles some readers."""
    return Finding(name, False, where, detail)
