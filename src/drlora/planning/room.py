"""Where a run is to take place, and how much memory there is: a GPU by name or size, or here."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from drlora.errors import ConfigError
from drlora.forecast.pace import GPUS, UNNAMED_BANDWIDTH, UNNAMED_SPEED, Gpu

MARGIN = 0.1  # of the memory, which stays free: what forecasts may be off by
NO_BF16 = ("T4",)


@dataclass(frozen=True)
class Room:
    """Where a run is to take place.

    Attributes:
        name: in words.
        memory_bytes: that there are.
        gpu: the card, if it is one that need not be here; None on this machine.
        device: `cpu` or `cuda`.
        has_bf16: whether it multiplies in bfloat16.
    """

    name: str
    memory_bytes: float
    gpu: Gpu | None
    device: str
    has_bf16: bool

    @property
    def on_cpu(self) -> bool:
        """Whether it is a processor's memory."""
        return self.device == "cpu"

    @property
    def usable_bytes(self) -> float:
        """What a forecast may take."""
        return (1 - MARGIN) * self.memory_bytes


def find_room(gpu: str | None = None, memory: str | None = None) -> Room:
    """The card that is named, or this machine.

    Args:
        gpu: `24GB`, or a card's name (`T4`, `RTX 4090`, `H100`).
        memory: of this machine that may be used, `8GB`; by default what is free.

    Raises:
        ConfigError: if neither a card nor a size is called so.
    """
    if gpu is not None:
        return _card(gpu)
    if torch.cuda.is_available():
        size = size_of(memory, "memory") if memory else float(torch.cuda.mem_get_info(0)[0])
        return Room(
            torch.cuda.get_device_name(0), size, None, "cuda", torch.cuda.is_bf16_supported()
        )
    size = size_of(memory, "memory") if memory else float(psutil.virtual_memory().available)
    cores = torch.get_num_threads()
    return Room(f"this machine, {cores} threads", size, None, "cpu", True)


def _card(gpu: str) -> Room:
    known = GPUS.get(gpu.lower())
    if known is None:
        size = size_of(gpu, "gpu")
        known = Gpu(f"a GPU of {gpu}", size / 1e9, UNNAMED_SPEED, UNNAMED_BANDWIDTH)
    return Room(known.name, known.gb * 1e9, known, "cuda", known.name not in NO_BF16)


def size_of(text: str, name: str) -> float:
    """Bytes of `24GB`, `900 MB`, `16`.

    Raises:
        ConfigError: if it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|G|MB|M)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        known = ", ".join(card.name for card in GPUS.values())
        raise ConfigError(f"{name}={text!r} is no size such as 24GB; cards by name are {known}.")
    unit = 1e6 if (found[2] or "G")[0].upper() == "M" else 1e9
    return float(found[1]) * unit
