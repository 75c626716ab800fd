"""Files that are there in full or not at all, whenever the process dies."""

from __future__ import annotations

import os
from pathlib import Path


def write_at_once(path: Path, text: str) -> None:
    """Write `text` to `path` under a temporary name beside it, then rename; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        move_into_place(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk is not to be filled with attempts
        raise


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file, once its content has left the system's memory for the disk."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when a file, or the list of names in a folder, is on the disk.

    Windows flushes only what is open for writing, and knows no handle of a folder.
    """
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    number = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
