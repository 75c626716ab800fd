"""What a run was made with: versions, processor, device, memory.

`drlora env` prints it for a report of a fault; result files of runs carry the parts that matter.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from drlora.distributed import are_several, best_device
from drlora.version import __version__

COMPUTING = ("torch", "transformers", "peft", "accelerate", "datasets")
# Also told in a report of a fault, where they are installed.
OTHERS = (
    "safetensors", "tokenizers", "huggingface-hub", "numpy", "triton", "trl", "bitsandbytes",
    "deepspeed", "flash-attn", "liger-kernel",
)  # fmt: skip
# Variables that change what torch, transformers or this package do.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "PYTORCH_ALLOC_CONF",
    "ACCELERATE_MIXED_PRECISION", "TRITON_INTERPRET",
)  # fmt: skip


def versions() -> dict[str, str]:
    """The versions of what computes."""
    found = {"drlora": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: metadata.version(name) for name in COMPUTING if name != "torch"}


def peak_memory() -> dict[str, int]:
    """Most memory that this process held, in bytes; on a GPU what torch allocated there too."""
    found = {"peak_memory_bytes": _peak_bytes()}
    if torch.cuda.is_available():
        found["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # on Windows psutil knows the peak
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class SourceState:
    """The commit of the package's source, and whether it was changed since; None if unknown."""

    commit: str | None
    dirty: bool | None


@dataclass(frozen=True)
class Accelerator:
    """One accelerator; of another kind than CUDA only the name is known."""

    name: str
    memory_gb: float | None = None
    capability: str | None = None
    cuda: str | None = None


@dataclass(frozen=True)
class Environment:
    """What a report of a fault needs; no names of users, folders or hosts.

    Attributes:
        versions: package -> version, of what is installed.
        system: its name and release.
        processor: its name.
        source: of the package.
        vector_unit: the instructions that torch computes with; they decide how sums are rounded.
        cores, threads: of the machine, of torch.
        memory_gb: of the machine.
        accelerators: that torch can use.
        processes: of this run.
        variables: those that change what torch, transformers or drlora do, where they are set.
    """

    versions: dict[str, str]
    system: str
    processor: str
    source: SourceState
    vector_unit: str
    cores: int | None
    threads: int
    memory_gb: float
    accelerators: tuple[Accelerator, ...]
    processes: int
    variables: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = asdict(self)
        found["accelerators"] = [
            {name: value for name, value in one.items() if value is not None}
            for one in found["accelerators"]
        ]
        return found


def describe() -> Environment:
    """What this process runs in."""
    installed = {name: _version_of(name) for name in OTHERS}
    return Environment(
        versions=versions() | {name: v for name, v in installed.items() if v is not None},
        system=f"{platform.system()} {platform.release()}",
        processor=processor(),
        source=source_state(),
        vector_unit=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        accelerators=tuple(_accelerators()),
        processes=torch.distributed.get_world_size() if are_several() else 1,
        variables={
            name: os.environ[name] if name != "HF_HOME" else "(set)"
            for name in VARIABLES
            if name in os.environ
        },
    )


def source_state() -> SourceState:
    """Of the package, where git is at hand and knows it."""
    here = Path(__file__).parents[1]
    try:
        commit = _git(here, "rev-parse", "HEAD")
        is_tracked = bool(_git(here, "ls-files", "--", "version.py"))
        dirty = bool(_git(here, "status", "--porcelain", "--untracked-files=no", "--", "."))
    except (OSError, subprocess.SubprocessError):
        is_tracked = False
    return SourceState(commit, dirty) if is_tracked else SourceState(None, None)


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _accelerators() -> Iterator[Accelerator]:
    if not torch.cuda.is_available():
        device = best_device()
        if device.type != "cpu":
            yield Accelerator(device.type)
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield Accelerator(
            name=properties.name,
            memory_gb=round(properties.total_memory / 1e9, 1),
            capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
        )
