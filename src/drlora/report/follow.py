"""A report of a run that is under way, written again and again until it is over.

    for path in follow_report(["runs/own"], seconds=10):
        print(path)       # after each time

The page loads itself anew as often; the last one, of a finished run, does not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from drlora.errors import ConfigError
from drlora.io.files import home
from drlora.io.run_files import RESULT
from drlora.report.write import write_report

SECONDS = 10


def follow_report(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    seconds: float = SECONDS,
) -> Iterator[Path]:
    """Write the page of these runs every few seconds, until all of them have a result.

    Args:
        folders: run directories.
        output: the page; by default in the first run's folder.
        seconds: between two times, and after which the page loads itself anew; at least 1.

    Yields:
        The page's file, each time that it was written.

    Raises:
        ConfigError: if `seconds` is less than 1.
        CheckpointError: if a folder holds no run.
    """
    if seconds < 1:
        raise ConfigError(f"seconds={seconds} must be at least 1.")
    while True:
        is_over = all((Path(home(os.fspath(f))) / RESULT).is_file() for f in folders)
        yield write_report(folders, output, "html", refresh=None if is_over else round(seconds))
        if is_over:
            return
        time.sleep(seconds)
