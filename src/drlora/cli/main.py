"""The command line: verbs, arguments, and errors as one message.

    drlora train RECIPE.yaml [key=value ...] [--resume | --overwrite] [--dry-run]
    drlora eval RUN|EXPORT [--split SPLIT] [--data FILE]
    drlora inspect MODEL [key=value ...] [--steps N] [--tokens N]
    drlora export RUN --format peft|per-expert|merged -o DIR [--rank auto] [--dry-run]
    drlora report RUN [RUN ...] [-o FILE] [--format html|png|svg|md]
    drlora compare PLAN.yaml [key=value ...] [--jobs N] [--dry-run] [--retry-failed]
    drlora env

Every verb takes --json and --help (with examples). `drlora --print-completion bash` writes a
completion script, where shtab is installed.

Exit codes: 0 done, 1 a run of a comparison failed, 2 something to put right (one message on
standard error), 3 a run that diverged, 130 interrupted, 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console

from drlora.cli.arguments import Parser, make_parser
from drlora.cli.dry_run import print_dry_run
from drlora.cli.inspection import print_inspection
from drlora.cli.summary import print_summary
from drlora.compare import compare
from drlora.errors import CheckpointError, ConfigError, DrLoraError
from drlora.io.files import read_json, refuse_links_out
from drlora.io.settings import set_in, split_override
from drlora.report import write_report
from drlora.runs.dry_run import dry_run
from drlora.runs.environment import describe
from drlora.runs.evaluate import evaluate_run
from drlora.runs.export import ExportResult, export_run, print_plan
from drlora.runs.inspect import inspect_model
from drlora.runs.moved import located_at
from drlora.runs.outcome import verdict_line
from drlora.runs.progress import Terminated, sigterm_interrupts
from drlora.runs.recipe import load_recipe, make_adapter_config
from drlora.runs.rundir import RunDir
from drlora.runs.train import train

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    arguments = _parse(parser, argv)
    shell = arguments.print_completion
    if shell is None and not hasattr(arguments, "verb"):
        parser.print_help()
        return 0
    _quiet()
    try:
        return _print_completion(parser, shell) if shell else arguments.verb(arguments)
    except Terminated:
        return _report("terminated", EXIT_TERMINATED)
    except KeyboardInterrupt:
        return _report("interrupted", EXIT_INTERRUPTED)
    except (DrLoraError, OSError) as error:
        if getattr(arguments, "debug", False):
            raise
        return _report(f"error: {error}", EXIT_BAD_INPUT)


def _parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As argparse does, but `key=value` may stand after options too."""
    arguments, left = parser.parse_known_args(argv)
    late = [word for word in left if "=" in word and not word.startswith("-")]
    if hasattr(arguments, "overrides"):
        arguments.overrides += late
        left = [word for word in left if word not in late]
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return arguments


def _parser() -> Parser:
    return make_parser(
        {
            "train": _train,
            "eval": _eval,
            "inspect": _inspect,
            "export": _export,
            "compare": _compare,
            "report": _write_report,
            "env": _env,
        }
    )


def _print_completion(parser: Parser, shell: str) -> int:
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError:
        raise ConfigError(
            "a completion script needs the package shtab: pip install 'drlora[completion]'"
        ) from None
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ConfigError(f"--print-completion {shell}: choose one of {shtab.SUPPORTED_SHELLS}.")
    print(shtab.complete(parser, shell))
    return 0


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
        return _report(_way_on(run, what), EXIT_TERMINATED if is_term else EXIT_INTERRUPTED)
    except (CheckpointError, OSError) as error:
        if arguments.debug or not run.config.is_file() or run.result.is_file():
            raise
        # Such as a full disk: what is there stays good.
        return _report(_way_on(run, f"error: {error}"), EXIT_BAD_INPUT)
    if result.interrupted:
        is_term = result.signal == signal.SIGTERM
        what = "terminated" if is_term else "interrupted"
        what = f"{what} at step {result.steps}; a checkpoint is saved"
        return _report(_way_on(run, what), EXIT_TERMINATED if is_term else EXIT_INTERRUPTED)
    print_summary(result, console)
    if arguments.json:
        print(json.dumps({"run": str(run.path), **read_json(run.result)}, indent=2))
    if result.diverged:
        rate = float(recipe.training["learning_rate"])
        return _report(verdict_line(result, rate), EXIT_DIVERGED)
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


def _write_report(arguments: argparse.Namespace) -> int:
    path = write_report(arguments.runs, arguments.output, arguments.format)
    print(json.dumps({"report": str(path)}) if arguments.json else path)
    return 0


def _quiet() -> None:
    """Keep other libraries' bars and notes out of the output; our own messages say enough."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _report(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
