"""Checkpoints that are whole or are not used.

    with drlora.write_checkpoint(folder / f"checkpoint-{step}") as new:
        model.save_pretrained(new)
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
        save_file(dynamics.state_dict(), new / "dynamics.safetensors")

    newest = drlora.newest_checkpoint(folder)      # a Path, or None

The manifest, `manifest.json`, is written last: it names every file with its size and SHA-256. A
folder without one, or with a file that does not match, was cut off or has been damaged since.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drlora.errors import CheckpointError
from drlora.io.run_files import CHECKPOINT, MANIFEST
from drlora.io.writing import sync, write_at_once

_NAME = re.compile(CHECKPOINT.format(r"(\d+)"))


@contextmanager
def write_checkpoint(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` when the block ends without an error.

    Args:
        folder: `.../checkpoint-N`; one of that name that is there already is replaced.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        seal(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        # Without its manifest it is no checkpoint any more, also where a kill leaves half of it.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    temporary.rename(folder)
    sync(folder.parent)


def seal(folder: Path) -> None:
    """Bring all files of a finished checkpoint to the disk, then write its manifest."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = _fingerprint(path)
    write_at_once(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def refuse_damaged(folder: str | Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        CheckpointError: if it has none, or a file is missing or is not what was written.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was cut off while being written.")
    for name, written in _read_manifest(folder / MANIFEST).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing.")
        size = path.stat().st_size
        if size != written["bytes"]:
            raise CheckpointError(
                f"{folder} is damaged: {name} has {size} bytes, {written['bytes']} were written."
            )
        if _fingerprint(path) != written:
            raise CheckpointError(f"{folder} is damaged: {name} has another checksum.")


def newest_checkpoint(
    folder: str | Path, on_skip: Callable[[str], Any] = warnings.warn
) -> Path | None:
    """The whole checkpoint of the latest step among `folder/checkpoint-N`, None if there is none.

    Args:
        folder: the Trainer's output directory, or wherever checkpoints are written.
        on_skip: told of each later one that is passed over, and why.
    """
    paths = Path(folder).glob(CHECKPOINT.format("*"))
    found = [path for path in paths if _NAME.fullmatch(path.name)]
    for path in sorted(found, key=checkpoint_step, reverse=True):
        try:
            refuse_damaged(path)
            return path
        except (CheckpointError, OSError) as error:
            on_skip(f"checkpoint {path.name} is passed over: {error}")
    return None


def checkpoint_step(folder: Path) -> int:
    """The step N of `checkpoint-N`."""
    return int(folder.name.rpartition("-")[2])


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File -> its size and checksum; names that lead out of the folder are refused."""
    try:
        files = json.loads(path.read_text("utf-8"))["files"]
        for name, written in files.items():
            inside = (path.parent / name).resolve().is_relative_to(path.parent.resolve())
            if not inside or set(written) != {"bytes", "sha256"}:
                raise ValueError(f"{name!r} is no entry of a manifest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return files
