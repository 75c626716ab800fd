"""The run directory: what lies where, and how it is written.

config.yaml                    the resolved recipe; the mark of a run
run.json                       how long it is, in which batches, and on which data (run_record.py)
adapter_config.json, adapter_model.safetensors, tokenizer files
metrics.jsonl                  one line a log entry or evaluation
growth.jsonl, events.jsonl     one line a grant, and what an event knew
checkpoints/checkpoint-N/      what --resume continues from
result.json                    the outcome; the mark of a finished run
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from drlora.config.adapter import with_options_apart
from drlora.errors import CheckpointError, ConfigError, DrLoraError
from drlora.io.checkpoint import newest_checkpoint
from drlora.io.files import read_json, refuse_links_out
from drlora.io.jsonl import finite, forget_after, read_lines
from drlora.io.run_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKPOINT,
    CHECKPOINTS,
    CONFIG,
    EARLIER_RESULT,
    EVENT_LOG,
    FORECAST,
    GROWTH_LOG,
    LOCK,
    METRICS,
    RECORD,
    RESULT,
)
from drlora.io.settings import read_settings
from drlora.io.writing import move_into_place, write_at_once
from drlora.runs.moved import located
from drlora.runs.recipe import LENGTHS, Recipe, recipe_from

_PARTIAL = ".adapter.partial"
# What a run writes into its folder, the mark of a run last; nothing else is ever deleted there.
_OWN = (
    RESULT,
    EARLIER_RESULT.format("*"),
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    f"{CHECKPOINTS}/{CHECKPOINT.format('*')}",
    f"{CHECKPOINTS}/runs",
    CHECKPOINTS,
    METRICS,
    FORECAST,
    GROWTH_LOG,
    EVENT_LOG,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    _PARTIAL,
    RECORD,
    CONFIG,
)


@dataclass(frozen=True)
class RunDir:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / CONFIG

    @property
    def record(self) -> Path:
        """Length, batches and data of the run."""
        return self.path / RECORD

    @property
    def forecast(self) -> Path:
        """What the run was said to take, before it began."""
        return self.path / FORECAST

    @property
    def logs(self) -> list[Path]:
        """The logs, which have a step in each line."""
        return [self.metrics, self.path / GROWTH_LOG, self.path / EVENT_LOG]

    @property
    def metrics(self) -> Path:
        """Log entries and evaluations."""
        return self.path / METRICS

    @property
    def result(self) -> Path:
        """The outcome of a finished run."""
        return self.path / RESULT

    @property
    def checkpoints(self) -> Path:
        """The Trainer's output directory."""
        return self.path / CHECKPOINTS

    @property
    def adapter(self) -> Path:
        """The weights of the trained adapter."""
        return self.path / ADAPTER_WEIGHTS

    @property
    def resume_command(self) -> str:
        """What to type to continue this run."""
        return f"drlora train {self.config} --resume"

    def refuse(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        """Refuse to begin `recipe` here, or to go on with it, where that cannot be.

        Raises:
            ConfigError: if there is another run, or one of other settings.
            CheckpointError: if what is to be continued is finished or not there, or a link in the
                folder leads out of it.
        """
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite contradict each other; keep one.")
        if resume or overwrite:
            refuse_links_out(self.path)
        if resume:
            self.refuse_resume_of(recipe)
        else:
            self.refuse_second_run(overwrite)

    def refuse_second_run(self, overwrite: bool = False) -> None:
        """Refuse to start where a run already is; one that took no step is none.

        Args:
            overwrite: whether a run that is there is to be replaced; anything else is not.

        Raises:
            ConfigError: naming the ways out.
        """
        self._refuse_no_folder()
        trace = self._trace_of_a_run()
        if trace is None:
            return
        if not overwrite:
            raise ConfigError(
                f"output_dir={self.path} already holds a run ({trace} is there); choose another "
                f"output_dir, continue that run with --resume, or replace it with --overwrite."
            )
        if self.path.is_symlink() or not self.config.is_file():
            what = "is a link" if self.path.is_symlink() else f"has no {CONFIG}"
            raise ConfigError(
                f"output_dir={self.path} {what}, so it is no run directory that --overwrite could "
                f"replace; name another output_dir, or delete it yourself."
            )
        try:
            self.read_config()
        except DrLoraError as error:
            raise ConfigError(
                f"output_dir={self.path} is no run directory that --overwrite could replace: "
                f"{error} Name another output_dir, or delete it yourself."
            ) from error

    def _refuse_no_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path} is a file; name a folder.")
        there = next((p for p in (self.path, *self.path.parents) if p.exists()), Path("."))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            what = "cannot be written to" if there.is_dir() else "is a file"
            raise ConfigError(f"output_dir={self.path}: {there} {what}; name another folder.")

    def _trace_of_a_run(self) -> str | None:
        """The name of what says that a step was taken here; None if nothing does."""
        checkpoints = self.checkpoints.glob(CHECKPOINT.format("*"))
        held = [*checkpoints, self.adapter, self.result, *self.logs[1:]]
        found = next((path.name for path in held if path.exists()), None)
        if found is None and any(e.get("kind") != "before" for e in read_lines(self.metrics)):
            found = self.metrics.name
        if found is None and self.config.exists() and not self.record.is_file():
            # Of a run of an older drlora that took no step, or somebody's own file.
            found = None if self.metrics.exists() else self.config.name
        return found

    def clear(self) -> None:
        """Delete what a run wrote here, and nothing else; links go, not what they lead to."""
        inside = [p for p in _OWN if not (self.checkpoints.is_symlink() and "/" in p)]
        for pattern in inside:
            for path in sorted(self.path.glob(pattern)):
                if path.is_symlink() or path.is_file():
                    path.unlink()
                elif path.name == self.checkpoints.name:  # whatever else somebody put there stays
                    with suppress(OSError):
                        path.rmdir()
                else:
                    shutil.rmtree(path)

    def refuse_resume_of(self, recipe: Recipe) -> None:
        """Refuse to resume what is no run of `recipe`, or a finished one that gets no more steps.

        Raises:
            CheckpointError: if there is no run, or a finished one.
            ConfigError: if the run was started with other settings; they are named.
        """
        if not self.config.is_file():
            raise CheckpointError(
                f"output_dir={self.path} holds no run to resume; leave --resume out to start one."
            )
        is_longer = self.is_given_another_length(recipe)
        if self.result.is_file():
            if read_json(self.result).get("verdict") == "diverged":
                raise CheckpointError(
                    f"the run in {self.path} is finished and has diverged, there is nothing to go "
                    f"on from; begin again with other settings and --overwrite."
                )
            if not is_longer:
                raise CheckpointError(
                    f"the run in {self.path} is finished, there is nothing to resume; give it more "
                    f"steps (training.max_steps=... or training.num_train_epochs=...), or choose "
                    f"another output_dir for a new run."
                )
        asked = located(recipe, self.path)
        differing = list(_differences(_comparable(self.read_config()), _comparable(asked)))
        if differing:
            raise ConfigError(
                f"the run in {self.path} was started with other settings: {'; '.join(differing)}. "
                f"Resume it with its own: {self.resume_command}"
            )

    def is_given_another_length(self, recipe: Recipe) -> bool:
        """Whether `recipe` gives the run that is here another number of steps or epochs."""
        before = self.read_config().training
        return any(before.get(name) != recipe.training.get(name) for name in LENGTHS)

    def set_result_aside(self) -> None:
        """Keep the result of a finished run that is to go on under another name."""
        if self.result.is_file():
            steps = read_json(self.result).get("steps")
            self.result.rename(self.path / EARLIER_RESULT.format(steps))

    def start_logs_at(self, step: int) -> None:
        """Drop what the logs have beyond `step`, which a run that goes on there writes again."""
        for log in self.logs:
            forget_after(log, step)

    def read_config(self) -> Recipe:
        """The recipe that the run was started with, with its paths as they are from here.

        Raises:
            CheckpointError: if there is none.
        """
        return located(self.stored_config(), self.path)

    def stored_config(self) -> Recipe:
        """The recipe as it was stored.

        Raises:
            CheckpointError: if there is none.
        """
        if not self.config.is_file():
            raise CheckpointError(f"{self.path} is no run directory: it has no {CONFIG}.")
        tree = read_settings(self.config)
        if isinstance(tree.get("adapter"), dict):  # of version 0.1, perhaps
            tree["adapter"] = with_options_apart(tree["adapter"])
            tree["adapter"].pop("record", None)
        return recipe_from(tree, is_record=True)

    def newest_checkpoint(self, on_skip: Callable[[str], Any] = lambda reason: None) -> Path | None:
        """The whole checkpoint of the latest step; `on_skip` is told of those passed over."""
        return newest_checkpoint(self.checkpoints, on_skip)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the run while the block lasts, or this process does.

        Raises:
            ConfigError: if another process is in it.
        """
        made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"another process is training in {self.path} now; wait for it, or choose another "
                f"output_dir."
            ) from None
        try:
            yield
        finally:
            lock.release()
            (self.path / LOCK).unlink(missing_ok=True)
            for path in (self.checkpoints, *(made or [self.path])):
                with suppress(OSError):
                    path.rmdir()  # only where it is empty: the run never began

    def write_adapter(self, save: Callable[[Path], Any]) -> None:
        """Put in place what `save(folder)` writes, file by file and the weights last.

        So where the weights are, all is there.
        """
        temporary = self.path / _PARTIAL
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save(temporary)
        for path in sorted(temporary.iterdir(), key=lambda p: p.name == ADAPTER_WEIGHTS):
            if path.is_dir():  # which is not renamed onto one that is filled
                shutil.rmtree(self.path / path.name, ignore_errors=True)
            move_into_place(path, self.path / path.name)
        temporary.rmdir()


def write_yaml(path: Path, value: Any) -> None:
    """Write `value` to `path` at once or not at all."""
    write_at_once(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` at once or not at all."""
    write_at_once(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """What must be the same in a run that is resumed; its length and its place may change."""
    values = recipe.resolved().to_dict()
    del values["output_dir"]
    values["training"] = {k: v for k, v in values["training"].items() if k not in LENGTHS}
    return values


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """`training.max_steps was 100, now 200` for each setting that is not the same."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield f"{name} was {old!r}, now {new!r}"
        return
    for key in {**old, **new}:
        yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
