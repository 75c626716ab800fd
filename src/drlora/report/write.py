"""`drlora report`: read the runs, write the report in the format that was asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drlora.errors import CheckpointError, ConfigError
from drlora.io.files import home
from drlora.io.run_files import REPORT
from drlora.io.writing import move_into_place
from drlora.report import FORMATS
from drlora.report.markdown import markdown
from drlora.report.page import page
from drlora.report.read import RunRecord, read_run


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    format: str | None = None,
    refresh: int | None = None,
) -> Path:
    """Write the report of these runs; returns the file.

    Args:
        folders: run directories, or folders with an adapter and its growth.jsonl.
        output: the file; by default `report` with the format's ending, in the first run's folder.
        format: one of FORMATS; by default what `output` ends in, else html.
        refresh: seconds after which the page loads itself anew, of a run that is under way.

    Raises:
        ConfigError: if the format is not known.
        CheckpointError: if a folder holds no run, or files that do not fit each other.
    """
    folders = [home(os.fspath(folder)) for folder in folders]
    output = home(os.fspath(output)) if output else None
    ending = Path(output).suffix.removeprefix(".").lower() if output else ""
    format = format or (ending if ending in FORMATS else "html")
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not known; choose one of {list(FORMATS)}.")
    paths = [Path(folder).resolve() for folder in folders]
    runs = [
        replace(read_run(path), name=name)
        for path, name in zip(paths, distinct_names(paths), strict=True)
    ]
    path = Path(output) if output else Path(folders[0]) / f"{REPORT}.{format}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write(runs, temporary, format, refresh)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"the files of {' or '.join(str(folder) for folder in folders)} are damaged: "
            f"{type(error).__name__}: {error}"
        ) from error
    move_into_place(temporary, path)
    return path


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many folders above them as it takes to tell them apart.

    >>> distinct_names([Path("/a/seed1/run"), Path("/a/seed2/run")])
    ['seed1/run', 'seed2/run']
    """
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[1:][-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    # One folder given twice is still two columns.
    return [
        name if name not in names[:number] else f"{name} ({number + 1})"
        for number, name in enumerate(names)
    ]


def _write(runs: Sequence[RunRecord], path: Path, format: str, refresh: int | None) -> None:
    if format in ("png", "svg"):
        from drlora.report.figures import draw_report  # matplotlib takes a second to import

        draw_report(runs, path, format)
    else:
        path.write_text(page(runs, refresh) if format == "html" else markdown(runs), "utf-8")
