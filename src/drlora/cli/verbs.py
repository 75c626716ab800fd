"""What each verb does: call the package, print what came of it, and give an exit code."""

from __future__ import annotations

import argparse
import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console

from drlora.cli import exits
from drlora.cli.dry_run import print_dry_run
from drlora.cli.exits import end
from drlora.cli.inspection import print_inspection
from drlora.cli.summary import print_summary
from drlora.compare import compare
from drlora.errors import CheckpointError, ConfigError, Terminated
from drlora.io.files import read_json, refuse_links_out
from drlora.io.settings import set_in, split_override
from drlora.report.write import write_report
from drlora.runs.dry_run import dry_run
from drlora.runs.environment import describe
from drlora.runs.evaluate import evaluate_run
from drlora.runs.export import ExportResult, export_run, print_plan
from drlora.runs.inspect import inspect_model
from drlora.runs.moved import located_at
from drlora.runs.outcome import verdict_line
from drlora.runs.progress import sigterm_interrupts
from drlora.runs.recipe import load_recipe, make_adapter_config
from drlora.runs.rundir import RunDir
from drlora.runs.train import train


def run(arguments: argparse.Namespace) -> int:
    """Carry out what was parsed; returns the exit code."""
    _quiet()
    return ACTIONS[arguments.verb](arguments)


def _quiet() -> None:
    """Keep other libraries' bars and notes out of the output; our own messages say enough."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.resume and arguments.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; keep one.")
    console = Console(highlight=False, soft_wrap=True, stderr=arguments.json)
    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.resume)
    recipe = located_at(recipe, arguments.recipe, arguments.overrides)
    run = RunDir(Path(recipe.output_dir))
    if arguments.resume or arguments.overwrite:
        refuse_links_out(run.path)
    if arguments.dry_run:
        found = dry_run(recipe, arguments.resume, arguments.overwrite)
        if arguments.json:
            print(json.dumps(found, indent=2))
        else:
            print_dry_run(found, console)
        return 0
    try:
        with sigterm_interrupts():
            result = train(recipe, arguments.resume, console, arguments.overwrite)
    except KeyboardInterrupt as stop:
        is_term = isinstance(stop, Terminated)
        what = "terminated" if is_term else "interrupted"
        return end(_way_on(run, what), exits.TERMINATED if is_term else exits.INTERRUPTED)
    except (CheckpointError, OSError) as error:
        if arguments.debug or not run.config.is_file() or run.result.is_file():
            raise
        # Such as a full disk: what is there stays good.
        return end(_way_on(run, f"error: {error}"), exits.BAD_INPUT)
    if result.interrupted:
        is_term = result.signal == signal.SIGTERM
        what = "terminated" if is_term else "interrupted"
        what = f"{what} at step {result.steps}; a checkpoint is saved"
        return end(_way_on(run, what), exits.TERMINATED if is_term else exits.INTERRUPTED)
    print_summary(result, console)
    if arguments.json:
        print(json.dumps({"run": str(run.path), **read_json(run.result)}, indent=2))
    if result.diverged:
        rate = float(recipe.training["learning_rate"])
        return end(verdict_line(result, rate), exits.DIVERGED)
    return 0


def _way_on(run: RunDir, what: str) -> str:
    """What happened, and how to continue, if there is something to continue."""
    if not run.config.is_file():
        return f"{what} before the run began; nothing was written"
    return f"{what}. Continue with:\n  {run.resume_command}"


def _env(arguments: argparse.Namespace) -> int:
    found = describe()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        if not isinstance(value, (dict, list)):
            print(f"{name:12} {value}")
            continue
        inside = value.items() if isinstance(value, dict) else enumerate(value, start=1)
        print(f"{name:12} {'none' if not value else ''}".rstrip())
        for key, one in inside:
            print(f"  {key:<24} {one}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    found = evaluate_run(
        arguments.run,
        arguments.split,
        arguments.data,
        model=arguments.model,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    settings: dict[str, Any] = {}
    for override in arguments.overrides:
        path, value = split_override(override)
        set_in(settings, path[1:] if path[0] == "adapter" else path, value)
    config = make_adapter_config(settings, settings.pop("method", None))
    found = inspect_model(
        arguments.model, config, arguments.steps, arguments.dtype, arguments.tokens
    )
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print_inspection(found)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    result = export_run(
        arguments.run,
        arguments.format,
        arguments.output,
        arguments.rank,
        dry_run=arguments.dry_run,
        model=arguments.model,
        data=arguments.data,
        trust_remote_code=arguments.trust_remote_code,
        max_shard_size=arguments.max_shard_size,
        rounding=arguments.rounding,
        seed=arguments.seed,
    )
    if arguments.json:
        print(json.dumps(_export_to_json(result, arguments.output), indent=2))
        return 0
    print_plan(result, arguments.output, Console(highlight=False, soft_wrap=True, markup=False))
    return 0


def _export_to_json(result: ExportResult, output: str) -> dict[str, Any]:
    found = {**result.plan.to_dict(), "output": None, "logits": None}
    found["notes"] += result.notes
    if result.difference is not None:
        found |= {"output": output, "logits": result.difference.to_dict()}
    return found


def _compare(arguments: argparse.Namespace) -> int:
    return compare(
        arguments.plan,
        arguments.overrides,
        jobs=arguments.jobs,
        threads=arguments.threads,
        dry_run=arguments.dry_run,
        only_page=arguments.only_page,
        retry_failed=arguments.retry_failed,
        as_json=arguments.json,
    )


def _report(arguments: argparse.Namespace) -> int:
    path = write_report(arguments.runs, arguments.output, arguments.format)
    print(json.dumps({"report": str(path)}) if arguments.json else path)
    return 0


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "eval": _eval,
    "inspect": _inspect,
    "export": _export,
    "compare": _compare,
    "report": _report,
    "env": _env,
}
