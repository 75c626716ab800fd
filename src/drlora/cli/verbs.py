"""What each verb does: call the package, print what came of it, and give an exit code."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console

from drlora.cli import exits
from drlora.cli.comparison import print_comparison
from drlora.cli.doctor import print_health
from drlora.cli.dry_run import print_dry_run
from drlora.cli.exits import end
from drlora.cli.export import print_export
from drlora.cli.inspection import print_inspection
from drlora.cli.look import print_data
from drlora.cli.notes import notes_once
from drlora.cli.planning import print_plan
from drlora.cli.progress import ConsoleProgress, say
from drlora.cli.serve import print_serving, serve
from drlora.cli.summary import print_summary
from drlora.cli.talk import print_answer, print_end, talk
from drlora.cli.verification import print_verification
from drlora.compare.comparison import run_comparison
from drlora.doctor.examine import examine
from drlora.errors import CheckpointError, ConfigError, Terminated
from drlora.forecast.step import Batch
from drlora.io.settings import set_in, split_override
from drlora.planning.plan import plan
from drlora.report.follow import follow_report
from drlora.report.write import write_report
from drlora.runs.chat import chat
from drlora.runs.dry_run import dry_run
from drlora.runs.environment import describe
from drlora.runs.evaluate import evaluate
from drlora.runs.export import export_adapter
from drlora.runs.generate import generate
from drlora.runs.inspect import inspect
from drlora.runs.interrupt import sigterm_interrupts
from drlora.runs.look import look_at_data
from drlora.runs.memory import LENGTH
from drlora.runs.new_recipe import OWN_DATA, write_recipe
from drlora.runs.outcome import RunDiverged, RunInterrupted
from drlora.runs.prompts import read_prompts
from drlora.runs.recipe import load_recipe, make_adapter_config, quantise_section
from drlora.runs.rundir import RunDir
from drlora.runs.sampling import check_settings, settings_from
from drlora.runs.serving import plan_serving
from drlora.runs.train import train
from drlora.verification.verify import verify


def run(arguments: argparse.Namespace) -> int:
    """Carry out what was parsed; returns the exit code."""
    _quiet()
    with notes_once():
        return ACTIONS[arguments.verb](arguments)


def _quiet() -> None:
    """Keep other libraries' bars and notes out of the output; our own messages say enough."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _init(arguments: argparse.Namespace) -> int:
    names = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    if len(names) > 1:
        raise ConfigError(f"{names} are several recipes; name one.")
    made = write_recipe(arguments.output, overrides, names[0] if names else OWN_DATA)
    if arguments.json:
        print(json.dumps(made.to_dict(), indent=2))
        return 0
    for note in made.notes:
        print(note)
    print(f"written  {made.path}\nnext     drlora train {made.path} --dry-run")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True, markup=False, stderr=arguments.json)
    made = plan(
        arguments.model,
        arguments.data,
        arguments.output,
        arguments.overrides,
        gpu=arguments.gpu,
        memory=arguments.memory,
        measures=not arguments.no_timing,
        tests_rates=arguments.range_test,
        say=lambda text: say(console, text),
    )
    if arguments.json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print_plan(made, console)
    return 0 if made.fits else exits.UNFIT


def _data(arguments: argparse.Namespace) -> int:
    found = look_at_data(load_recipe(arguments.recipe, arguments.overrides), arguments.examples)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_data(found, Console(highlight=False, markup=False))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    found = generate(
        arguments.run,
        read_prompts(arguments.prompts),
        batch_size=arguments.batch_size,
        on_answer=None if arguments.json else print_answer,
        **_speaker(arguments),
    )
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_end(found)
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    talk(chat(arguments.run, system=arguments.system, **_speaker(arguments)), arguments.json)
    return 0


def _speaker(arguments: argparse.Namespace) -> dict[str, Any]:
    """Who answers, and how."""
    return {
        "compare": arguments.compare,
        "seed": arguments.seed,
        "chat_template": arguments.chat_template,
        "model": arguments.model,
        "trust_remote_code": arguments.trust_remote_code,
        **check_settings(settings_from(arguments.overrides)),
    }


def _train(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True, stderr=arguments.json)
    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.resume)
    how: dict[str, Any] = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    if arguments.dry_run:
        found = dry_run(recipe, **how)
        if arguments.json:
            print(json.dumps(found.to_dict(), indent=2))
        else:
            print_dry_run(found, console)
        return 0
    verdict = None
    run = RunDir(Path(recipe.output_dir))
    try:
        with sigterm_interrupts():
            result = train(recipe, progress=ConsoleProgress(console), **how)
    except RunDiverged as error:
        result, verdict = error.result, str(error)
    except KeyboardInterrupt as stop:
        return _interrupted(run, stop)
    except (CheckpointError, OSError) as error:
        if arguments.debug or not run.config.is_file() or run.result.is_file():
            raise
        # Such as a full disk: what is there stays good.
        return end(_way_on(run, f"error: {error}"), exits.BAD_INPUT)
    print_summary(result, console)
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=2))
    return 0 if verdict is None else end(verdict, exits.DIVERGED)


def _interrupted(run: RunDir, stop: KeyboardInterrupt) -> int:
    result = stop.result if isinstance(stop, RunInterrupted) else None
    is_term = isinstance(stop, Terminated) or (result and result.signal == signal.SIGTERM)
    what = "terminated" if is_term else "interrupted"
    if result:
        what = f"{what} at step {result.steps}; a checkpoint is saved"
    return end(_way_on(run, what), exits.TERMINATED if is_term else exits.INTERRUPTED)


def _way_on(run: RunDir, what: str) -> str:
    """What happened, and how to continue, if there is something to continue."""
    if not run.config.is_file():
        return f"{what} before the run began; nothing was written"
    return f"{what}. Continue with:\n  {run.resume_command}"


def _doctor(arguments: argparse.Namespace) -> int:
    found = examine(asks_hub=not arguments.offline)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_health(found, Console(highlight=False, soft_wrap=True, markup=False))
    return 0 if found.is_well else exits.UNSOUND


def _env(arguments: argparse.Namespace) -> int:
    found = describe().to_dict()
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
    found = evaluate(
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
    kept = settings.pop("quantise", {})
    if arguments.quantise:
        kept["experts"] = arguments.quantise
    config = make_adapter_config(settings, settings.pop("method", None))
    found = inspect(
        arguments.model,
        config,
        arguments.steps,
        arguments.dtype,
        _batch_of(arguments.tokens),
        quantise_section(kept),
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_inspection(found)
    return 0


def _batch_of(tokens: int | None) -> Batch | None:
    """So many tokens as examples of `LENGTH`, or one that is shorter."""
    if tokens is None:
        return None
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens} must be at least 1.")
    return Batch(max(1, tokens // LENGTH), min(tokens, LENGTH))


def _export(arguments: argparse.Namespace) -> int:
    result = export_adapter(
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
        merge_into=arguments.merge_into,
        routers=arguments.routers,
        by_shard=arguments.by_shard,
    )
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    print_export(result, arguments.output, Console(highlight=False, soft_wrap=True, markup=False))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    found = verify(arguments.adapter, arguments.base, arguments.merged)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_verification(found, Console(highlight=False, soft_wrap=True, markup=False))
    return 0 if found.is_sound else exits.UNSOUND


def _serve(arguments: argparse.Namespace) -> int:
    plan = plan_serving(
        arguments.run,
        arguments.engine,
        host=arguments.host,
        port=arguments.port,
        output=arguments.output,
        model=arguments.model,
        prompt=arguments.prompt,
        more=tuple(shlex.split(arguments.flags)),
    )
    console = Console(highlight=False, soft_wrap=True, markup=False, stderr=arguments.json)
    print_serving(plan, console)
    if arguments.dry_run:
        if arguments.json:
            print(json.dumps(plan.to_dict(), indent=2))
        return 0
    return serve(plan, console, arguments.json, arguments.check)


def _compare(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True, markup=False, stderr=arguments.json)
    found = run_comparison(
        arguments.plan,
        arguments.overrides,
        jobs=arguments.jobs,
        threads=arguments.threads,
        dry_run=arguments.dry_run,
        only_page=arguments.only_page,
        retry_failed=arguments.retry_failed,
        progress=console.print,
    )
    print_comparison(found, console)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    return exits.FAILED_CELL if found.failed and not arguments.dry_run else 0


def _report(arguments: argparse.Namespace) -> int:
    if arguments.follow:
        return _follow(arguments)
    path = write_report(arguments.runs, arguments.output, arguments.format)
    print(json.dumps({"report": str(path)}) if arguments.json else path)
    return 0


def _follow(arguments: argparse.Namespace) -> int:
    if arguments.format not in (None, "html"):
        raise ConfigError(f"--follow writes a page, not {arguments.format}; leave --format out.")
    told = None
    for path in follow_report(arguments.runs, arguments.output, arguments.every):
        if path != told:
            print(json.dumps({"report": str(path)}) if arguments.json else path, flush=True)
        told = path
    return 0


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "init": _init,
    "plan": _plan,
    "data": _data,
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "chat": _chat,
    "inspect": _inspect,
    "export": _export,
    "verify": _verify,
    "serve": _serve,
    "compare": _compare,
    "report": _report,
    "doctor": _doctor,
    "env": _env,
}
