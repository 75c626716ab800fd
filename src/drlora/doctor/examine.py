"""Everything that can be tried here in a few seconds.

found = examine()
found.is_well, [finding for finding in found.findings if finding.verdict == "fails"]
"""

from __future__ import annotations

from pathlib import Path

from drlora.doctor.findings import Health
from drlora.doctor.kernels import engines, storages
from drlora.doctor.machine import devices, hub, memory_and_disk
from drlora.doctor.packages import packages


def examine(folder: str | Path = ".", asks_hub: bool = True) -> Health:
    """Try it.

    Args:
        folder: that runs would be written to.
        asks_hub: whether the hub is asked for a model's description.
    """
    return Health(
        (
            *packages(),
            *devices(),
            *memory_and_disk(Path(folder)),
            *engines(),
            *storages(),
            hub(asks_hub),
        )
    )
