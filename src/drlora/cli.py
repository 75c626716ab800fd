"""The command line: verbs, arguments, and errors as one message.

    drlora train RECIPE.yaml [key=value ...] [--resume]
    drlora eval RUN|EXPORT [--split SPLIT] [--data FILE]
    drlora inspect MODEL [key=value ...] [--steps N] [--tokens N]
    drlora export RUN --format peft|per-expert|merged -o DIR [--rank auto] [--dry-run]
    drlora report RUN [RUN ...] [-o FILE] [--format html|png|svg|md]
    drlora compare PLAN.yaml [key=value ...] [--jobs N] [--dry-run] [--retry-failed]

Exit codes: 0 done, 1 a run of a comparison failed, 2 something to put right (one message on
standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import transformers
from rich.console import Console

from drlora.compare import compare
from drlora.errors import CheckpointError, DrLoraError
from drlora.evaluate_run import evaluate_run
from drlora.export import FORMATS, RANKS
from drlora.export_run import export_run, print_plan
from drlora.files import refuse_links_out
from drlora.inspection import inspect_model
from drlora.inspection_text import print_inspection
from drlora.memory_plan import TOKENS
from drlora.recipe import load_recipe, make_adapter_config
from drlora.report import FORMATS as REPORT_FORMATS
from drlora.report import write_report
from drlora.rundir import RunDir
from drlora.settings import split_override
from drlora.summary import print_summary
from drlora.train import train

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    _quiet()
    try:
        return arguments.verb(arguments)
    except KeyboardInterrupt:
        return _report("interrupted", EXIT_INTERRUPTED)
    except (DrLoraError, OSError) as error:
        if arguments.debug:
            raise
        return _report(f"error: {error}", EXIT_BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drlora", description="Fine-tune Mixture-of-Experts language models with DR-LoRA."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_train(verbs, common)
    _add_eval(verbs, common)
    _add_inspect(verbs, common)
    _add_export(verbs, common)
    _add_compare(verbs, common)
    _add_report(verbs, common)
    return parser


def _add_train(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser("train", parents=[common], help="fine-tune as a recipe says")
    verb.add_argument("recipe", metavar="RECIPE.yaml")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="training.max_steps=100")
    verb.add_argument("--resume", action="store_true", help="continue the run in output_dir")
    verb.set_defaults(verb=_train)


def _add_eval(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser("eval", parents=[common], help="measure a run or an export on data")
    verb.add_argument("run", metavar="RUN", help="a run, or a folder with an adapter or a model")
    verb.add_argument("--split", default="eval", help="train, eval, test or a split's name")
    verb.add_argument("--data", metavar="FILE", help="other data than the recipe's")
    verb.add_argument("--model", help="the base model, where it is not where the adapter says")
    verb.add_argument("--trust-remote-code", action="store_true")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(verb=_eval)


def _add_inspect(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser(
        "inspect", parents=[common], help="blocks, experts, memory and growth plan of a model"
    )
    verb.add_argument("model", metavar="MODEL", help="embedded, a folder, a config.json, or a name")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="r_target=16, preset=...")
    verb.add_argument("--steps", type=int, metavar="N", help="show the growth plan of N steps")
    verb.add_argument("--dtype", help="of the weights; by default what they are stored in")
    verb.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help="of a batch, for activations"
    )
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(verb=_inspect)


def _add_export(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser(
        "export", parents=[common], help="write an adapter for PEFT, serving engines or as a model"
    )
    verb.add_argument("run", metavar="RUN", help="a run directory, or a folder with an adapter")
    verb.add_argument("--format", required=True, choices=FORMATS)
    verb.add_argument("-o", "--output", required=True, metavar="DIR", help="a new or empty folder")
    verb.add_argument("--rank", default="padded", choices=RANKS, help="auto: as small as it gets")
    verb.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    verb.add_argument("--model", help="the base model, where it is not where the adapter says")
    verb.add_argument("--data", metavar="FILE", help="examples to compare logits on")
    verb.add_argument("--max-shard-size", metavar="5GB", help="of one file of merged weights")
    verb.add_argument("--trust-remote-code", action="store_true")
    verb.set_defaults(verb=_export)


def _add_compare(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser(
        "compare", parents=[common], help="run a plan of models, tasks, methods and seeds"
    )
    verb.add_argument("plan", metavar="PLAN.yaml")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="seeds=[1,2]")
    verb.add_argument("--jobs", type=int, metavar="N", help="runs at once; default: one a core")
    verb.add_argument("--threads", type=int, metavar="N", help="threads of each run")
    verb.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    verb.add_argument("--only-page", action="store_true", help="write the page, run nothing")
    verb.add_argument("--dry-run", action="store_true", help="print the cells, run nothing")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(verb=_compare)


def _add_report(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser(
        "report", parents=[common], help="write a page on one or several runs, to look at"
    )
    verb.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    verb.add_argument("-o", "--output", metavar="FILE", help="default: report.html in the run")
    verb.add_argument(
        "--format", choices=REPORT_FORMATS, help="default: what FILE ends in, else html"
    )
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(verb=_write_report)


def _train(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = RunDir(Path(recipe.output_dir))
    if arguments.resume:
        refuse_links_out(run.path)
    try:
        result = train(recipe, arguments.resume, console)
    except KeyboardInterrupt:
        return _report(_way_on(run, "interrupted"), EXIT_INTERRUPTED)
    except (CheckpointError, OSError) as error:
        if arguments.debug or not run.config.is_file() or run.result.is_file():
            raise
        # Such as a full disk: what is there stays good.
        return _report(_way_on(run, f"error: {error}"), EXIT_BAD_INPUT)
    if result.interrupted:
        what = f"interrupted at step {result.steps}; a checkpoint is saved"
        return _report(_way_on(run, what), EXIT_INTERRUPTED)
    print_summary(result, console)
    return 0


def _way_on(run: RunDir, what: str) -> str:
    """What happened, and how to continue, if there is something to continue."""
    if not run.config.is_file():
        return f"{what} before the run began; nothing was written"
    return f"{what}. Continue with:\n  {run.resume_command}"


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
    settings = {}
    for override in arguments.overrides:
        path, value = split_override(override)
        settings[".".join(path).removeprefix("adapter.")] = value
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
    )
    print_plan(result, arguments.output, Console(highlight=False, soft_wrap=True, markup=False))
    return 0


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
