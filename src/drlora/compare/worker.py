"""What happens in the process of one cell: train, then leave one result file and nothing else."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from drlora.compare.cells import contents_of
from drlora.compare.results import read_result, write_result
from drlora.errors import CheckpointError, ConfigError
from drlora.evaluation.measure import Measurement
from drlora.io.jsonl import read_lines
from drlora.io.plugins import load_plugins
from drlora.runs.environment import peak_memory, processor, source_state
from drlora.runs.outcome import RunDiverged, RunInterrupted, TrainResult
from drlora.runs.recipe import Recipe
from drlora.runs.rundir import RunDir
from drlora.runs.train import train

CURVE_POINTS = 50
EXIT_FAILED = 1
LOG_NAME = "log.txt"


@dataclass(frozen=True)
class Work:
    """A cell as its process gets it.

    Attributes:
        recipe: of the run.
        labels: what the result says of its place in the plan.
        folder: where the run and the log go; removed at the end.
        target: the result file.
        threads: of torch.
        plugins: files that register what the recipe names.
    """

    recipe: Recipe
    labels: dict[str, Any]
    folder: Path
    target: Path
    threads: int
    plugins: tuple[str, ...] = ()


def run_cell(work: Work) -> None:
    """Train one cell, or continue it where an earlier process was stopped.

    The process ends with an exit code other than 0 if the cell failed; the log says why.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work.folder.mkdir(parents=True, exist_ok=True)
    _log_to(work.folder / LOG_NAME)
    load_plugins(work.plugins)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(work.threads)
    started = time.monotonic()
    recipe = work.recipe
    is_resumed = RunDir(Path(recipe.output_dir)).newest_checkpoint() is not None
    outcome = _train(recipe)
    seconds = {"wall_seconds": round(time.monotonic() - started, 2), "is_resumed": is_resumed}
    result = _harvest(outcome, recipe, {**work.labels, **seconds})
    write_result(work.target, result)
    shutil.rmtree(work.folder)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, so that no two train one cell."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(EXIT_FAILED)


def _log_to(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _train(recipe: Recipe) -> TrainResult:
    """The outcome of the run; what an earlier process left is continued where it can be."""
    run = RunDir(Path(recipe.output_dir))
    try:
        return _trained(recipe, resume=run.config.is_file())
    except (CheckpointError, ConfigError):
        if not run.path.exists():
            raise
        # A finished run without its result file, one of an older drlora, or one cut off too early.
        shutil.rmtree(run.path)
        return _trained(recipe)


def _trained(recipe: Recipe, resume: bool = False) -> TrainResult:
    """Also of a run that diverged: that is a result of a method, too."""
    try:
        return train(recipe, resume=resume, progress=_log)
    except RunDiverged as error:
        return error.result
    except RunInterrupted:
        raise SystemExit(130) from None


def _log(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _harvest(outcome: TrainResult, recipe: Recipe, labels: dict[str, Any]) -> dict[str, Any]:
    """The result of a cell, from its run."""
    run = outcome.run
    found = read_result(run.result)
    assert found is not None
    for measured in (found["before"], found["after"]):
        (measured or {}).pop("samples", None)
        ((measured or {}).get("match") or {}).pop("samples", None)
    for key in ("held_out", "restarts"):  # which rows, and what was tried in vain
        found.pop(key, None)
    config = found.pop("config")
    config.pop("output_dir")
    return {
        **labels,
        # The recipe may name no method, or another one than the plan.
        **{key: value for key, value in found.items() if key not in labels},
        **peak_memory(),
        "machine": _machine(),
        "source": asdict(source_state()),
        "contents": contents_of(recipe),
        "curve": _thinned(_curve(run, "loss")),
        "held_out_curve": _curve(run, "eval_loss"),
        "items": _items(outcome.after),
        "recipe": config,
    }


def _items(measured: Measurement | None) -> dict[str, Any]:
    """Each held-out example, in short: its loss in hundredths of a nat, and 1 where it is right."""
    assert measured is not None
    nats = [round(100 * n) if math.isfinite(n) else None for n in measured.loss.example_nats]
    is_correct = measured.match.is_correct if measured.match else ()
    return {"loss_centinats": nats, "is_correct": "".join(str(int(right)) for right in is_correct)}


def _curve(run: RunDir, key: str) -> list[list[float]]:
    """[step, loss] of the log, of training or held out."""
    return [
        [entry["step"], round(entry[key], 5)]
        for entry in read_lines(run.metrics)
        if entry.get("kind") == "log" and isinstance(entry.get(key), float)
    ]


def _thinned(curve: list[list[float]]) -> list[list[float]]:
    """A curve thinned out evenly, with its last entry."""
    stride = -(-len(curve) // CURVE_POINTS) or 1
    return curve[::-1][::stride][::-1]


def _machine() -> dict[str, Any]:
    found = {
        "system": platform.system(),
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),  # they decide how sums are rounded
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
