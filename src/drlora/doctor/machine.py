"""The machine: devices, memory, disk, and the way to the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import psutil
import torch
from huggingface_hub import constants

from drlora.doctor.findings import Finding, works
from drlora.errors import first_line

LEAST_DISK = 5e9  # bytes: a model in 16 bits and some checkpoints
LEAST_MEMORY = 2e9
SECONDS = 5


def devices() -> Iterator[Finding]:
    """GPUs, and what the processor multiplies in."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield works(f"GPU {number}", f"{card.name}, {card.total_memory / 1e9:.0f} GB")
    else:
        built = torch.version.cuda is not None
        way_out = (
            "see nvidia-smi and CUDA_VISIBLE_DEVICES" if built
            else "on a machine with one, install a build of torch for CUDA (pytorch.org)"
        )  # fmt: skip
        yield Finding("GPU", "absent", "torch sees none: runs take place on the CPU", way_out)
    able = torch.cpu.get_capabilities()
    if any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16")):
        yield works("bfloat16 on the CPU", "the processor has products for it")
    else:
        yield Finding(
            "bfloat16 on the CPU", "absent", "no products for it: experts are widened to float32",
            "dtype: float32 is as fast here",
        )  # fmt: skip


def memory_and_disk(folder: Path) -> Iterator[Finding]:
    """What is free.

    Args:
        folder: that runs would be written to.
    """
    free = psutil.virtual_memory().available
    said = f"{free / 1e9:.1f} GB free, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if free < LEAST_MEMORY:
        yield Finding("memory", "fails", said, "end other programs; drlora plan says what fits")
    else:
        yield works("memory", said)
    left = shutil.disk_usage(folder).free
    if left < LEAST_DISK:
        way_out = "make room, or set output_dir and HF_HOME to another disk"
        yield Finding("disk", "fails", f"{left / 1e9:.1f} GB free", way_out)
    else:
        yield works("disk", f"{left / 1e9:.0f} GB free")


def hub(asks: bool) -> Finding:
    """Whether models of the hub can be had.

    Args:
        asks: whether to try; otherwise only what the environment says.
    """
    what = "Hugging Face hub"
    if constants.HF_HUB_OFFLINE:
        return Finding(what, "absent", "HF_HUB_OFFLINE is set", "unset it, or name local folders")
    if not asks:
        return Finding(what, "absent", "not asked", "leave --offline out")
    try:
        huggingface_hub.HfApi().model_info("allenai/OLMoE-1B-7B-0924", timeout=SECONDS)
    except Exception as error:  # whatever the network makes of it
        way_out = "see the network and HF_ENDPOINT, or name local folders; `embedded` needs neither"
        return Finding(what, "absent", f"not reached: {first_line(error)[:80]}", way_out)
    return works(what, "reached")
