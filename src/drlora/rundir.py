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
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from drlora.errors import CheckpointError, ConfigError
from drlora.jsonl import finite
from drlora.recipe import Recipe, recipe_from
from drlora.settings import read_settings


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
        return self.path / "adapter_model.safetensors"

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
        differing = list(_differences(self.read_config().to_dict(), recipe.to_dict()))
        if differing:
            raise ConfigError(
                f"the run in {self.path} was started with other settings: {'; '.join(differing)}. "
                f"Resume it with its own: {self.resume_command}"
            )

    def read_config(self) -> Recipe:
        """The recipe that the run was started with.

        Raises:
            CheckpointError: if there is none.
        """
        if not self.config.is_file():
            raise CheckpointError(f"{self.path} is no run directory: it has no config.yaml.")
        return recipe_from(read_settings(self.config))

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the latest step, if there is one."""
        complete = [c for c in self.checkpoints.glob("checkpoint-*") if _is_complete(c)]
        return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(folder: Path) -> int:
    """The step N of `checkpoint-N`."""
    return int(folder.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    """Whether nothing was cut off when it was written."""
    try:
        with safe_open(checkpoint / "adapter_model.safetensors", "pt"):
            json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError, SafetensorError):
        return False
    return zipfile.is_zipfile(checkpoint / "optimizer.pt")


def write_yaml(path: Path, value: Any) -> None:
    """Write `value` to `path` at once or not at all."""
    _write(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` at once or not at all."""
    _write(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """`training.max_steps was 100, now 200` for each setting that is not the same."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield f"{name} was {old!r}, now {new!r}"
        return
    for key in {**old, **new}:
        yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
