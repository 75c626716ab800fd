"""Where cases of `benchmarks.gpu` run, and what they leave where they cannot.

It needs torch alone, so that what is missing of the rest costs a case and not all of them.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass

import torch

from benchmarks.harness import Row, where


class OutOfTimeError(Exception):
    """The time of a case is up."""


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure."""

    device: str
    rounds: int
    warmup: int
    calls: int
    scattermoe: str | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def failure(case: str, implementation: str | None, error: Exception) -> Row:
    """The row of something that could not be measured, with the reason."""
    if isinstance(error, OutOfTimeError):
        raise error
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    trace = traceback.extract_tb(error.__traceback__)
    at = f" ({os.path.basename(trace[-1].filename)}:{trace[-1].lineno})" if trace else ""
    text = " ".join(str(error).split())[:300]
    return {"case": case, "implementation": implementation, "error": f"{kind}: {text}{at}",
            **where()}  # fmt: skip
