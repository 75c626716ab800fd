"""The run directory: what lies where, and how it is written.

config.yaml                    the resolved recipe; the mark of a run
adapter_config.json, adapter_model.safetensors, tokenizer files
metrics.jsonl                  one line a log entry or evaluation
growth.jsonl                   one line a grant
checkpoints/checkpoint-N/      what --resume continues from
result.json                    the outcome; the mark of a finished run
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from drlora.checkpoint import newest_checkpoint
from drlora.errors import CheckpointError, ConfigError
from drlora.jsonl import finite
from drlora.moved import located
from drlora.recipe import Recipe, recipe_from
from drlora.settings import read_settings
from drlora.writing import move_into_place, write_at_once

LOCK = ".lock"  # held by the process that trains, and gone with it


@dataclass(frozen=True)
class RunDir:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Log entries and evaluations."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """The outcome of a finished run."""
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's output directory."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The weights of the trained adapter."""
        return self.path / SAFETENSORS_WEIGHTS_NAME

    @property
    def resume_command(self) -> str:
        """What to type to continue this run."""
        return f"drlora train {self.config} --resume"

    def refuse_second_run(self) -> None:
        """Refuse to start where a run already is.

        Raises:
            ConfigError: naming the ways out.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path} is a file; name a folder.")
        held = [p for p in (self.config, self.adapter, self.metrics, self.result) if p.exists()]
        if held:
            raise ConfigError(
                f"output_dir={self.path} already holds a run ({held[0].name} is there); choose "
                f"another output_dir, or continue that run with --resume."
            )

    def refuse_resume_of(self, recipe: Recipe) -> None:
        """Refuse to resume what is no unfinished run of `recipe`.

        Raises:
            CheckpointError: if there is no run, or a finished one.
            ConfigError: if the run was started with other settings; they are named.
        """
        if not self.config.is_file():
            raise CheckpointError(
                f"output_dir={self.path} holds no run to resume; leave --resume out to start one."
            )
        if self.result.is_file():
            raise CheckpointError(
                f"the run in {self.path} is finished, there is nothing to resume; choose another "
                f"output_dir for a new run."
            )
        asked = located(recipe, self.path)
        differing = list(_differences(self.read_config().to_dict(), asked.to_dict()))
        if differing:
            raise ConfigError(
                f"the run in {self.path} was started with other settings: {'; '.join(differing)}. "
                f"Resume it with its own: {self.resume_command}"
            )

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
            raise CheckpointError(f"{self.path} is no run directory: it has no config.yaml.")
        return recipe_from(read_settings(self.config))

    def newest_checkpoint(self, on_skip: Callable[[str], Any] = lambda reason: None) -> Path | None:
        """The whole checkpoint of the latest step; `on_skip` is told of those passed over."""
        return newest_checkpoint(self.checkpoints, on_skip)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the run while the block lasts, or this process does.

        Raises:
            ConfigError: if another process is in it.
        """
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
            if not any(self.path.iterdir()):
                self.path.rmdir()  # the run never began

    def write_adapter(self, save: Callable[[Path], Any]) -> None:
        """Put in place what `save(folder)` writes, file by file and the weights last.

        So where the weights are, all is there.
        """
        temporary = self.path / ".adapter.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save(temporary)
        for path in sorted(temporary.iterdir(), key=lambda p: p.name == SAFETENSORS_WEIGHTS_NAME):
            move_into_place(path, self.path / path.name)
        temporary.rmdir()


def write_yaml(path: Path, value: Any) -> None:
    """Write `value` to `path` at once or not at all."""
    write_at_once(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` at once or not at all."""
    write_at_once(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """`training.max_steps was 100, now 200` for each setting that is not the same."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield f"{name} was {old!r}, now {new!r}"
        return
    for key in {**old, **new}:
        yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
