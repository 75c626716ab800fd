"""The bars that a GPU is held to, from the rows of `benchmarks.gpu`: met, missed, not measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.harness import Row


class Bar(NamedTuple):
    """One of them.

    Attributes:
        says: what is measured.
        found: the figure, or None.
        bound: that it is held to.
        is_least: whether it is to be at least that.
    """

    says: str
    found: float | None
    bound: float
    is_least: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the figure is on the right side."""
        assert self.found is not None
        return self.found >= self.bound if self.is_least else self.found <= self.bound

    def __str__(self) -> str:
        if self.found is None:
            return f"not measured  {self.says}"
        side = "at least" if self.is_least else "at most"
        verdict = "met" if self.is_met else "MISSED"
        return f"{verdict:12}  {self.says}: {self.found:.3g} ({side} {self.bound:g})"


def bars(rows: Iterable[Row]) -> list[Bar]:
    """The newest figures; of several engines that are ours, the better one's."""
    rows = list(rows)
    found = []
    for case in ("gpu layer bfloat16 d2048 m768 E128 k8 T4096 r16",
                 "gpu layer bfloat16 d2048 m1024 E64 k8 T8192 r64",
                 "gpu layer bfloat16 d2048 m768 E128 k8 T8192 r64"):  # fmt: skip
        rank = case.rpartition(" ")[2]
        uniform = best(rows, case, [f"triton {rank}", f"grouped {rank}"])
        ragged = best(rows, case, ["triton following", "grouped following"])
        name = case.removeprefix("gpu ")
        found += [
            Bar(f"{name}: time over frozen", value(uniform, "to_frozen"), 1.15),
            Bar(f"{name}: PEFT's time over ours", value(uniform, "peft_over_this"), 1.8, True),
        ]
        if rank == "r16":  # the mean of the unequal ones too
            ratio = over(ragged, uniform, "median_s")
            found.append(Bar(f"{name}: unequal ranks over equal", ratio, 1.02))
    step = "gpu step bfloat16 d2048 m1024 E64 k8 L16 T4096 r16 checkpointing"
    ours = best(rows, step, ["triton", "grouped"])
    theirs = best(rows, step, ["peft"])
    found += [
        Bar("OLMoE step: tokens/s over PEFT's", over(ours, theirs, "tokens_per_s"), 1.5, True),
        Bar("OLMoE step: memory over PEFT's", over(ours, theirs, "peak_extra_bytes"), 0.7),
    ]
    layer = "gpu packed layer bfloat16 d2048 m768 E128 k8 T4096 r16"
    packed = best(rows, layer, ["nf4 triton r16", "nf4 grouped r16"])
    ragged = best(rows, layer, ["nf4 triton following", "nf4 grouped following"])
    model = best(rows, "gpu packed model bfloat16 d2048 m768 E128 k8 L48 T2048 r16 nf4-nested "
                       "checkpointing", ["ours"])  # fmt: skip
    peak = value(model, "computed_peak_bytes")
    found += [
        Bar("NF4 layer over 16-bit grouped", value(packed, "to_16_bit"), 1.25),
        Bar("NF4 layer: unequal ranks over equal", over(ragged, packed, "median_s"), 1.02),
        Bar("Qwen3-30B-A3B in NF4: GB at the peak", None if peak is None else peak / 1e9, 22.5),
    ]
    tests = best(rows, "gpu tests", ["pytest"])
    found.append(Bar("tests that failed", failed_tests(tests), 0))
    return found


def failed_tests(row: Row | None) -> float | None:
    """How many failed; None where that is not known: none ran, or not all did and none failed."""
    if row is None or not row["passed"] + len(row["failed"]):
        return None
    ran_to_the_end = row.get("ended") in ("exit 0", "exit 1")
    return float(len(row["failed"])) if row["failed"] or ran_to_the_end else None


def best(rows: list[Row], case: str, kinds: list[str]) -> Row | None:
    """The newest row of each kind, and of these the fastest."""
    newest = {row["implementation"]: row for row in rows if row.get("case") == case and
              row.get("implementation") in kinds and "error" not in row}  # fmt: skip
    return min(newest.values(), key=lambda row: row.get("median_s", 0.0), default=None)


def value(row: Row | None, key: str) -> float | None:
    """A figure of a row, where there is one."""
    return None if row is None else row.get(key)


def over(row: Row | None, other: Row | None, key: str) -> float | None:
    """The ratio of a figure of two rows."""
    mine, its = value(row, key), value(other, key)
    return mine / its if mine is not None and its else None


def report(rows: Iterable[Row]) -> str:
    """A line for each bar."""
    return "\n".join(str(bar) for bar in bars(rows))
