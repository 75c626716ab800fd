"""What a path in a stored file means: `config.yaml` of a run, `drlora_export.json` of an export.

Paths are stored from the root on, so a folder works from any working directory. When things move:

- a path that leads somewhere is taken as it is;
- where a folder was moved together with what lies around it, the way from the one to the other is
  the same: if a run was stored as /old/runs/a and lies in /new/runs/a, then /old/models/m is looked
  for as /new/models/m;
- a relative path, as earlier versions stored them, is one of the directory that the run was started
  in, which the end of its output_dir shows; in an export, of the nearest folder above it in which
  it leads somewhere; and else of the working directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePath

NO_PATHS = ("", "embedded")  # whatever lies in the working directory


@dataclass(frozen=True)
class Place:
    """Where a folder is, and where it was when its files were written.

    Attributes:
        before: what was above the folder then, as far as its path has changed; None if not known.
        now: what is above it now.
    """

    before: Path | None
    now: Path

    @classmethod
    def of(cls, folder: Path, written: object) -> Place:
        """Of `folder`, which named itself `written` when it was written."""
        now = Path(os.path.abspath(folder))
        if not isinstance(written, str) or not written:
            return cls(None, now)
        before = Path(os.path.normpath(written))
        while before.name and before.name == now.name:
            before, now = before.parent, now.parent
        return cls(before, now)

    def find(self, name: str) -> str:
        """The path that a stored `name` means now; what is no path of a file, as it is."""
        if name in NO_PATHS:
            return name
        path = PurePath(name)
        if self.before is None:
            return name if path.is_absolute() else self._above(name) or name
        if path.is_absolute():
            return name if leads_somewhere(name) else self._moved(path) or name
        return (None if self.before.is_absolute() else self._moved(path)) or name

    def _above(self, name: str) -> str | None:
        """The nearest `name` in a folder above."""
        found = (str(folder / name) for folder in self.now.parents)
        return next((path for path in found if leads_somewhere(path)), None)

    def _moved(self, path: PurePath) -> str | None:
        """Where `path` is if it went with the folder, and if something is there."""
        assert self.before is not None
        try:
            moved = str(self.now / path.relative_to(self.before))
        except ValueError:
            return None
        return moved if leads_somewhere(moved) else None


def leads_somewhere(name: str) -> bool:
    """Whether a file or folder is at `name`."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def from_root(name: str) -> str:
    """`name` as it is to be stored: from the root on, if a file or folder is there.

    Links stay as they are, for what they lead to may change.
    """
    if name in NO_PATHS:
        return name
    path = os.path.expanduser(name)
    return os.path.abspath(path) if leads_somewhere(path) else name
