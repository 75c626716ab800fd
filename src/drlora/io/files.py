"""Reading files that somebody else wrote: sizes first, then contents, and one kind of error.

A file is refused for its size before it is read, and a safetensors file by its header before any
of its tensors is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from drlora.errors import CheckpointError, ConfigError, DrLoraError, first_line, shown
from drlora.io.run_files import ADAPTER_CONFIG

LARGEST_JSON_BYTES = 64 * 2**20
_RANKS_OF_A_CONFIG = ("r", "r_init", "r_target", "target_rank")


def read_text(path: Path, largest_bytes: int, error: type[DrLoraError], what: str = "") -> str:
    """The text in a UTF-8 file of at most `largest_bytes`; `what` is what messages call it.

    Raises:
        error: naming the file and what is wrong with it.
    """
    name = f"{what} {path}".strip()
    try:
        size = path.stat().st_size
        if size > largest_bytes:
            raise error(f"{name} has {size} bytes, more than such a file can have.")
        return path.read_text("utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, ValueError) as fault:
        if isinstance(fault, DrLoraError):
            raise
        reason = getattr(fault, "strerror", None) or str(fault)
        raise error(f"{name} cannot be read: {reason}.") from fault


def read_json(path: Path, what: str = "") -> dict[str, Any]:
    """The object in a JSON file; `what` is what messages call it.

    Raises:
        CheckpointError: if the file is missing or too large, or holds anything else.
    """
    name = f"{what} {path}".strip()
    text = read_text(path, LARGEST_JSON_BYTES, CheckpointError, what)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must hold one JSON object, not {shown(value)}.")
    return value


def home(name: str) -> str:
    """`name` with a `~` or `~user` at its start written out; the one place where that is done.

    Raises:
        ConfigError: if there is no such user.
    """
    if not name.startswith("~"):
        return name
    try:
        return str(Path(name).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{name!r}: {first_line(error)}; write the folder out.") from error


def local_path(name: str) -> Path | None:
    """The file or folder that `name` stands for, if there is one; a hub's name stands for none."""
    try:
        path = Path(home(name))
        return path if path.exists() else None
    except (OSError, ValueError):  # too long, with a null byte, of an unknown user
        return None


def refuse_links_out(folder: Path) -> None:
    """Refuse a folder that is to be written to and holds links to files that are not its own.

    Raises:
        CheckpointError: naming the link.
    """
    home = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise CheckpointError(
                f"{path} leads out of the run, to {path.resolve()}; what is written to the run "
                f"would land there. Put the file or folder itself in its place."
            )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, by its header alone.

    safetensors checks the header's length and every tensor's place against the file's size.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error


def read_adapter_config(folder: Path, weights: str) -> dict[str, Any]:
    """adapter_config.json of a saved adapter, with ranks that its weights can have.

    The ranks say how much memory an adapter takes when it is made, which is before its weights are
    looked at.

    Args:
        folder: holds both files.
        weights: name of the safetensors file.

    Raises:
        CheckpointError: if either is missing or damaged, or they cannot belong together.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    shapes = read_shapes(folder / weights)
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    ranks = {name: config.get(name) for name in _RANKS_OF_A_CONFIG}
    pattern = config.get("rank_pattern")
    if isinstance(pattern, Mapping):
        ranks |= {f"rank_pattern of {name!r}": rank for name, rank in pattern.items()}
    for name, rank in ranks.items():
        if isinstance(rank, (int, float)) and rank > largest:
            raise CheckpointError(
                f"{path} says {shown(name)}={shown(rank)}, but no tensor in {weights} has so many "
                f"rows: the two do not belong together, or are damaged."
            )
    return config
