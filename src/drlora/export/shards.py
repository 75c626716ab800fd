"""Weights written file by file: never more than one file of them is in memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from drlora.errors import ConfigError
from drlora.export.base_weights import INDEX, SINGLE

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def bytes_of(size: str) -> int:
    """`5GB` as a number of bytes.

    Raises:
        ConfigError: if it is no size, or less than a byte.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    found = int(float(match[1]) * unit) if match and unit else 0
    if found < 1:
        raise ConfigError(f"max_shard_size={size!r} is no size; write 5GB or 500MB.")
    return found


class ShardWriter:
    """Writes tensors to safetensors files of at most a size, in the order in which they come.

    Args:
        folder: an empty one.
        max_bytes: of one file; a tensor that is larger has one of its own.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.total_bytes = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._files: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor; what is held is written when it is too much with this one."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_bytes:
            self._write()
        self._held[key] = tensor.contiguous()
        self._held_bytes += size
        self.total_bytes += size

    @property
    def keys(self) -> set[str]:
        """Of all tensors that were taken."""
        return set(self._held).union(*self._files)

    def close(self) -> None:
        """Write the rest, and name the files as transformers does."""
        if self._held:
            self._write()
        count = len(self._files)
        if count == 1:
            self._path(0).replace(self.folder / SINGLE)
            return
        places: dict[str, str] = {}
        for number, keys in enumerate(self._files):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).replace(self.folder / name)
            places |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _write(self) -> None:
        save_file(self._held, self._path(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}.safetensors"
