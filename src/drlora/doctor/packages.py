"""Versions that go together: what drlora's own metadata asks for, against what is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from drlora.doctor.findings import Finding, works

# What may be absent -> what it is for, and how it comes.
OPTIONAL = {
    "bitsandbytes": ("other layers in four bits, moments in eight", "pip install 'drlora[bnb]'"),
    "triton": ("the engine `triton` on a GPU", "it comes with torch's builds for CUDA"),
    "deepspeed": ("ZeRO", "pip install deepspeed"),
    "liger-kernel": ("training.use_liger_kernel", "pip install liger-kernel"),
    "tensorboard": ("training.report_to: tensorboard", "pip install tensorboard"),
    "wandb": ("training.report_to: wandb", "pip install wandb"),
    "mlflow": ("training.report_to: mlflow", "pip install mlflow"),
}


def packages() -> Iterator[Finding]:
    """Each that is needed, and each that may be."""
    try:
        needed = metadata.requires("drlora") or []
    except metadata.PackageNotFoundError:
        needed = []
        yield Finding(
            "drlora", "fails", "is not installed, only found on the path",
            "pip install drlora, or pip install -e . in its repository",
        )  # fmt: skip
    for line in needed:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _needed(requirement)
    for name, (purpose, way_out) in OPTIONAL.items():
        version = _version(name)
        if version is None:
            yield Finding(name, "absent", f"not installed; for {purpose}", way_out)
        else:
            yield works(name, version)


def _needed(requirement: Requirement) -> Finding:
    version = _version(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return Finding(requirement.name, "fails", "is missing", f"pip install '{wanted}'")
    if not requirement.specifier.contains(version, prereleases=True):
        said = f"{version}, where {requirement.specifier} is needed"
        return Finding(requirement.name, "fails", said, f"pip install '{wanted}'")
    return works(requirement.name, version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
