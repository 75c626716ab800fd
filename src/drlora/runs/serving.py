"""`drlora serve`: what is started to serve a run, and in which form the run is given to it.

    plan = plan_serving("runs/own-data")      # the first engine that is installed and can
    plan.command                              # what is run
    prepare(plan)                             # the export that it reads, where it is not there yet

The commands and what each engine reads come from `drlora.export.engines`; nothing is served here.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drlora.embedded import resolve_model
from drlora.errors import CheckpointError, ConfigError
from drlora.export.base_files import CONFIG_NAME, base_file
from drlora.export.llama_cpp import OF_MODELS, convert_model, script_of
from drlora.export.plan import make_plan
from drlora.io.files import home, read_json
from drlora.io.places import from_root
from drlora.io.run_files import ADAPTER_WEIGHTS, EXPORT_RECORD, RESULT
from drlora.runs.export import export_adapter
from drlora.runs.export_source import adapter_without_base, find_adapter
from drlora.runs.sources import Source, find_source

PORT = 8000
FOLDER = "served"  # in the run: what was exported for engines


@dataclass(frozen=True)
class Server:
    """A program that serves, and how it is told where.

    Attributes:
        engine: its name in `drlora.export.engines`.
        program: what is looked for on PATH.
        formats: that it may be given, the first that it reads being taken.
        dtype: the option that names a dtype; "" if there is none.
    """

    engine: str
    program: str
    formats: tuple[str, ...]
    dtype: str = ""


SERVERS = {
    "vllm": Server("vLLM", "vllm", ("per-expert", "peft", "merged"), "--dtype"),
    "llama.cpp": Server("llama.cpp", "llama-server", ("gguf", "merged")),
    "transformers": Server("transformers serve", "transformers", ("merged",), "--dtype"),
}


@dataclass(frozen=True)
class ServingPlan:
    """What will be started.

    Attributes:
        engine: a name of `SERVERS`.
        folder: the run, or the export.
        format: that the engine is given.
        export: the folder of that export.
        is_there: whether it is there already.
        gguf: of llama.cpp: the model's file, and the folder that it is made from.
        command: the program and its words.
        url: where it answers.
        notes: what the user should know.
        prompt: that is asked when it answers, and
        expected: what the run answered in training; None where it is not known.
    """

    engine: str
    folder: Path
    format: str
    export: Path
    is_there: bool
    gguf: tuple[Path, Path] | None
    command: tuple[str, ...]
    url: str
    notes: tuple[str, ...]
    prompt: str
    expected: str | None
    model: str | None = None

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(self.command)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "engine": self.engine,
            "format": self.format,
            "export": str(self.export),
            "command": list(self.command),
            "url": self.url,
            "notes": list(self.notes),
        }


def plan_serving(
    folder: str | Path,
    engine: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    output: str | None = None,
    model: str | None = None,
    prompt: str | None = None,
    more: tuple[str, ...] = (),
) -> ServingPlan:
    """The engine, the export and the command; nothing is written or started.

    Args:
        folder: a run directory, a folder with a DR-LoRA adapter, or an export.
        engine: a name of `SERVERS`; by default the first that is installed and reads the run.
        host: that it listens on.
        port: that it listens on.
        output: where exports are; by default `served` in the run.
        model: the base model, where the adapter does not say or it has moved.
        prompt: what it is asked; by default one of the run's held-out examples.
        more: words for the engine that are handed on.

    Raises:
        ConfigError: if no engine is installed, or none of them reads the run in any form.
        CheckpointError: if there is no adapter and no export.
    """
    named = [engine] if engine is not None else list(SERVERS)
    if unknown := [name for name in named if name not in SERVERS]:
        raise ConfigError(f"engine={unknown[0]!r} is not known; choose one of {list(SERVERS)}.")
    installed = [name for name in named if shutil.which(SERVERS[name].program)]
    if not installed:
        programs = [SERVERS[name].program for name in named]
        raise ConfigError(
            f"none of {programs} is on PATH; install vLLM, llama.cpp or transformers[serving], or "
            f"put its environment's bin on PATH. drlora has no server of its own."
        )
    path = Path(home(str(folder)))
    source = _source(path, model)
    where = Path(home(output)) if output is not None else path / FOLDER
    reasons: list[str] = []
    for name in installed:
        found = _first_readable(name, source, where, reasons, model)
        if found is not None:
            asked, expected = _question(source, prompt)
            command = (*_told_where(name, found.command, source, host, port), *more)
            return replace(
                found, command=command, url=f"http://{host}:{port}", prompt=asked,
                expected=expected, model=model,
            )  # fmt: skip
    raise ConfigError(f"{path} cannot be served here: {'; '.join(reasons)}.")


def prepare(plan: ServingPlan) -> None:
    """Export and convert what is not there yet; raises as these do."""
    if not plan.is_there:
        export_adapter(plan.folder, plan.format, plan.export, model=plan.model)
    if plan.gguf is not None and not plan.gguf[0].is_file():
        plan.gguf[0].parent.mkdir(parents=True, exist_ok=True)
        convert_model(plan.gguf[1], plan.gguf[0])


def _source(path: Path, model: str | None) -> Source:
    """What is in the folder; of an export as GGUF its record says more than its files."""
    record = path / EXPORT_RECORD
    said = read_json(record) if record.is_file() else {}
    if said.get("format") != "gguf":
        return find_source(path, model)
    base, dtype = model or said.get("base_model"), said.get("dtype")
    if not base:
        raise CheckpointError(f"{record} does not name the base model; name it with --model.")
    run = Path(said["adapter"]) if isinstance(said.get("adapter"), str) else None
    return Source(path, None, str(base), None, str(dtype or "auto"), False, run=run)


def _first_readable(
    name: str, source: Source, where: Path, reasons: list[str], model: str | None
) -> ServingPlan | None:
    """The plan by the first form that the engine reads; else reasons are added."""
    server, record = SERVERS[name], source.folder / EXPORT_RECORD
    if record.is_file():  # an export is served as it is
        said = read_json(record)
        known = {str(said.get("format")): said.get("engines") or []}
    elif source.adapter == "DRLORA":
        known = dict.fromkeys(server.formats)
    else:
        raise CheckpointError(
            f"{source.folder} is neither a run nor an export of drlora's; serve it with the engine."
        )
    for format, engines in known.items():
        try:
            if engines is None:
                engines = _planned(source, format, model)
            if format == "gguf" or (name == "llama.cpp" and format == "merged"):
                script_of(OF_MODELS)
        except ConfigError as error:
            reasons.append(f"{name} with {format}: {error}")
            continue
        reading = next((e for e in engines if e["engine"] == server.engine), None)
        if reading is None or reading["reads"] is False or not reading["command"]:
            reasons.append(f"{name} with {format}: {reading['why'] if reading else 'not known'}")
            continue
        return _plan(name, source, format, reading, where)
    return None


def _planned(source: Source, format: str, model: str | None) -> list[dict[str, Any]]:
    """What each engine does with a run in this format."""
    adapted = adapter_without_base(find_adapter(source.folder, model, source.trust_remote_code))
    return [reading.to_dict() for reading in make_plan(adapted, format).readings]


def _plan(
    name: str, source: Source, format: str, reading: dict[str, Any], where: Path
) -> ServingPlan:
    is_export = (source.folder / EXPORT_RECORD).is_file()
    export = source.folder if is_export else where / format
    config = base_file(resolve_model(source.model), CONFIG_NAME)
    base = str(config.parent) if config is not None else source.model
    words = shlex.split(reading["command"].split("; ")[-1])
    places = {"THIS_FOLDER": str(export.absolute()), "BASE_MODEL": from_root(base)}
    gguf = None
    if name == "llama.cpp":
        is_merged = format == "merged"
        file = (where / f"{'merged' if is_merged else 'base'}.gguf").absolute()
        gguf = (file, export if is_merged else Path(base))
        if is_merged:  # what is said of merged weights is how they are converted
            words = [SERVERS[name].program, "-m", "base.gguf"]
        places["base.gguf"] = str(file)
    for place, meant in places.items():
        words = [word.replace(place, meant) for word in words]
    notes = [reading["why"]] if reading["reads"] is None and reading["why"] else []
    is_there = (export / EXPORT_RECORD).is_file()
    if is_there and not is_export:
        _refuse_older(export, source)
    return ServingPlan(
        name, source.folder, format, export, is_there, gguf, tuple(words), "", tuple(notes), "",
        None,
    )  # fmt: skip


def _refuse_older(export: Path, source: Source) -> None:
    """Raises:
    ConfigError: if the run was trained on since it was exported.
    """
    files = (export / EXPORT_RECORD, source.folder / ADAPTER_WEIGHTS)
    exported, trained = (path.stat().st_mtime for path in files)
    if exported < trained:
        raise ConfigError(
            f"the export in {export} is older than the adapter in {source.folder}; remove it, and "
            f"it is made anew, or name another place with --output."
        )


def _told_where(
    name: str, command: tuple[str, ...], source: Source, host: str, port: int
) -> tuple[str, ...]:
    own = SERVERS[name].dtype
    dtype = (own, source.dtype) if own and source.dtype != "auto" else ()
    return (*command, "--host", host, "--port", str(port), *dtype)


def _question(source: Source, prompt: str | None) -> tuple[str, str | None]:
    """What is asked, and what the run answered when it was measured after training."""
    if prompt is not None:
        return prompt, None
    run = source.run or source.folder
    if not (run / RESULT).is_file():
        return "Once upon a time", None
    match = (read_json(run / RESULT).get("after") or {}).get("match") or {}
    for sample in match.get("samples") or ():
        if isinstance(sample.get("prompt"), str):
            return sample["prompt"], str(sample["prediction"])
    return "Once upon a time", None
