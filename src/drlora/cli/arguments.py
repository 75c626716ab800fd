"""The command line's verbs and what may be said to them, each with examples.

Nothing here imports torch: `drlora --help` is there at once. verbs.py says what a verb does.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from drlora.export.choices import ENGINES, MERGE_INTO, RANKS, ROUNDINGS, ROUTERS
from drlora.export.formats import FORMATS
from drlora.io.files import home
from drlora.report import FORMATS as REPORT_FORMATS
from drlora.version import __version__

INIT = """examples:
  drlora init model=path/to/model data.train=path/to/train.jsonl -o own-data.yaml
  drlora init embedded training.max_steps=400
  drlora init --list
"""
PLAN = """examples:
  drlora plan path/to/model path/to/train.jsonl -o own.yaml
  drlora plan allenai/OLMoE-1B-7B-0924 train.jsonl --gpu 24GB
  drlora plan embedded embedded:kinds --memory 2GB --range-test
"""
DATA = """examples:
  drlora data own-data.yaml
  drlora data embedded data.train=embedded:definitions --examples 5
"""
TRAIN = """examples:
  drlora train embedded
  drlora train own-data.yaml model=path/to/model training.max_steps=500 --dry-run
  drlora train runs/own-data/config.yaml --resume
  drlora train runs/own-data/config.yaml training.max_steps=8000 --resume
"""
EVAL = """examples:
  drlora eval runs/own-data
  drlora eval runs/own-data --split test --json
  drlora eval out/peft --data held-out.jsonl
"""
GENERATE = """examples:
  drlora generate runs/own-data --prompts held-out.jsonl
  drlora generate out/merged max_new_tokens=64 temperature=0.7 --prompts questions.txt
  drlora generate runs/own-data --prompts held-out.jsonl --compare --json
"""
CHAT = """examples:
  drlora chat runs/own-data
  drlora chat out/peft temperature=0.7 top_p=0.9 --compare
"""
INSPECT = """examples:
  drlora inspect embedded --steps 800
  drlora inspect allenai/OLMoE-1B-7B-0924 preset=paper-v5 --steps 3750
  drlora inspect path/to/config.json r_target=32 r_max=64 --json
"""
EXPORT = """examples:
  drlora export runs/own-data --format peft -o out/peft --dry-run
  drlora export runs/own-data --format merged -o out/merged --max-shard-size 5GB
"""
VERIFY = """examples:
  drlora verify path/to/adapter
  drlora verify path/to/adapter --base path/to/model --merged path/to/merged --json
"""
SERVE = """examples:
  drlora serve runs/own-data --dry-run
  drlora serve runs/own-data --engine vllm --port 8001
  drlora serve out/per-expert --engine vllm --flags="--max-model-len 4096"
"""
COMPARE = """examples:
  drlora compare experiments/quick.yaml --dry-run
  drlora compare experiments/quick.yaml 'seeds=[1, 2]' --jobs 2
"""
DOCTOR = """examples:
  drlora doctor
  drlora doctor --json
"""
ENV = """examples:
  drlora env
  drlora env --json
"""
REPORT = """examples:
  drlora report runs/own-data
  drlora report runs/one runs/two -o both.html
  drlora report runs/own-data --format md
  drlora report runs/own-data --follow
"""


class Parser(argparse.ArgumentParser):
    """Says which word was probably meant."""

    def error(self, message: str) -> NoReturn:
        """One message on standard error, and exit code 2.

        Raises:
            SystemExit: always.
        """
        word = message.partition("invalid choice: '")[2].partition("'")[0]
        if "unrecognized arguments: " in message:
            word = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        near = difflib.get_close_matches(word, {*_words(self)} - {word}, n=1) if word else []
        hint = f"; did you mean {near[0]}?" if near else ""
        if others := _verbs_with(self, word):
            hint = f"; it is an option of drlora {', '.join(others)}"
        self.exit(2, f"error: {message}{hint}\n(drlora --help shows what there is)\n")


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """Verbs, options and choices of a parser and of its verbs."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        found += [str(choice) for choice in action.choices or ()]
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                found += _words(verb)
    return found


def _verbs_with(parser: argparse.ArgumentParser, option: str) -> list[str]:
    """The verbs of a parser that have an option."""
    subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    verbs = [verb for sub in subs for verb in sub.choices.items()]
    return [name for name, verb in verbs if option in verb._option_string_actions]


def plugins_in(words: Sequence[str]) -> list[str]:
    """The files that `--plugin` names: they may add to what the other arguments can be."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--plugin", action="append", default=[], type=home)
    try:
        return early.parse_known_args(words)[0].plugin
    except argparse.ArgumentError:  # without a file; the parser of the verb says it better
        return []


def make_parser() -> Parser:
    """The parser of all verbs; what it parsed has the name of one as `verb`."""
    parser = Parser(
        prog="drlora",
        description="Fine-tune Mixture-of-Experts language models with DR-LoRA.",
        epilog="drlora VERB --help shows the verb's options and examples.",
    )
    parser.add_argument(
        "--print-completion", metavar="SHELL", help="a completion script for bash, zsh or tcsh"
    )
    parser.add_argument("--version", action="version", version=f"drlora {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for name, (help_text, examples, add_options) in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.add_argument(
            "--plugin",
            action="append",
            default=[],
            type=home,
            metavar="FILE.py",
            help="run this file first: it registers rules, methods, formats of yours",
        )
        verb.set_defaults(verb=name)
    return parser


def _init(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "words", nargs="*", metavar="[NAME] key=value", help="model=..., data.train=..."
    )
    verb.add_argument("--list", action="store_true", help="the recipes that come with drlora")
    verb.add_argument(
        "-o", "--output", metavar="FILE", type=home, help="a new file; default: NAME.yaml"
    )


def _plan(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", type=home, help="embedded, a folder, or a name")
    verb.add_argument("data", metavar="DATA", type=home, help="a file, a folder, or a name")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="data.eval=..., ...")
    verb.add_argument(
        "-o", "--output", metavar="FILE", type=home, default="plan.yaml", help="a new file"
    )
    where = verb.add_mutually_exclusive_group()
    where.add_argument("--gpu", metavar="24GB", help="a size or a card (T4, RTX 4090, H100)")
    where.add_argument("--machine", action="store_true", help="this machine, which is the default")
    verb.add_argument("--memory", metavar="8GB", help="of this machine; default: what is free")
    verb.add_argument("--no-timing", action="store_true", help="do not time layers of the model")
    verb.add_argument(
        "--range-test", action="store_true", help="short runs choose the learning rate"
    )


def _data(verb: argparse.ArgumentParser) -> None:
    _recipe(verb)
    verb.add_argument("--examples", type=int, default=3, metavar="N", help="to show of each role")


def _recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "recipe", metavar="RECIPE.yaml", type=home, help="a file, or a name of drlora init --list"
    )
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="training.max_steps=100")


def _train(verb: argparse.ArgumentParser) -> None:
    _recipe(verb)
    verb.add_argument("--resume", action="store_true", help="continue the run in output_dir")
    verb.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    _dry_run(verb, "check everything but the weights and print the plan")


def _eval(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "run", metavar="RUN", type=home, help="a run, or a folder with an adapter or a model"
    )
    verb.add_argument("--split", default="eval", help="train, eval, test or a split's name")
    verb.add_argument("--data", metavar="FILE", type=home, help="other data than the recipe's")
    _base_model(verb)


def _generate(verb: argparse.ArgumentParser) -> None:
    _speaker(verb)
    verb.add_argument(
        "--prompts", required=True, metavar="FILE", type=home, help="a .jsonl, .json or .txt file"
    )
    verb.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once")


def _chat(verb: argparse.ArgumentParser) -> None:
    _speaker(verb)
    verb.add_argument("--system", metavar="TEXT", help="what the conversation begins with")


def _speaker(verb: argparse.ArgumentParser) -> None:
    """What answers, and how."""
    verb.add_argument(
        "run",
        metavar="RUN",
        type=home,
        help="a run, a folder with an adapter or a model, or one of the hub by its name",
    )
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="max_new_tokens=64, temperature=0.7, ..."
    )
    verb.add_argument("--compare", action="store_true", help="the base model answers too")
    verb.add_argument("--seed", type=int, default=0, help="of answers that are drawn")
    verb.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="whether a text is a turn of a conversation; by default as in training",
    )
    _base_model(verb)


def _inspect(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "model", metavar="MODEL", type=home, help="embedded, a folder, a config.json, or a name"
    )
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="r_target=16, preset=...")
    verb.add_argument("--steps", type=int, metavar="N", help="show the growth plan of N steps")
    verb.add_argument("--dtype", help="of the weights; by default what they are stored in")
    verb.add_argument("--quantise", metavar="STORAGE", help="of experts: nf4, int8, mxfp4, ...")
    verb.add_argument("--tokens", type=int, metavar="N", help="of a batch, for activations")
    _remote_code(verb)


def _export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "run", metavar="RUN", type=home, help="a run directory, or a folder with an adapter"
    )
    verb.add_argument("--format", required=True, choices=FORMATS)
    verb.add_argument(
        "-o", "--output", required=True, metavar="DIR", type=home, help="a new or empty folder"
    )
    verb.add_argument("--rank", default="padded", choices=RANKS, help="auto: as small as it gets")
    verb.add_argument(
        "--routers",
        default=ROUTERS[0],
        choices=ROUTERS,
        help="trained ones as LoRA (exact: at a rank that holds them; lora: without) or full",
    )
    _dry_run(verb, "print the plan, write nothing")
    verb.add_argument("--data", metavar="FILE", type=home, help="examples to compare logits on")
    verb.add_argument("--max-shard-size", metavar="5GB", help="of one file of merged weights")
    verb.add_argument("--by-shard", action="store_true", help="merge in the memory of one file")
    verb.add_argument(
        "--rounding",
        default=ROUNDINGS[0],
        choices=ROUNDINGS,
        help=f"of merged weights in 16 bits (default {ROUNDINGS[0]})",
    )
    verb.add_argument("--seed", type=int, default=0, help="of stochastic rounding")
    verb.add_argument(
        "--merge-into",
        default=MERGE_INTO[0],
        choices=MERGE_INTO,
        help="of a base that was quantised in training: the numbers it stood for, or the original",
    )
    _base_model(verb)


def _verify(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("adapter", metavar="ADAPTER", type=home, help="a folder with an adapter")
    verb.add_argument("--base", metavar="MODEL", type=home, help="default: what the adapter names")
    verb.add_argument("--merged", metavar="DIR", type=home, help="the base with the adapter in it")


def _serve(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN", type=home, help="a run, or an export of one")
    verb.add_argument("--engine", choices=ENGINES, help="default: the first that is on PATH")
    verb.add_argument("--host", default="127.0.0.1", help="that it listens on")
    verb.add_argument("--port", type=int, default=8000, metavar="N", help="that it listens on")
    verb.add_argument(
        "-o", "--output", metavar="DIR", type=home, help="of exports; default: served in the run"
    )
    verb.add_argument("--prompt", metavar="TEXT", help="asked once it runs; default: held out")
    verb.add_argument("--flags", default="", metavar="WORDS", help="handed on to the engine")
    verb.add_argument("--check", action="store_true", help="end it when it has answered")
    _dry_run(verb, "print the command, start nothing")
    verb.add_argument(
        "--model", type=home, help="the base model, where it is not where the adapter says"
    )


def _compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("plan", metavar="PLAN.yaml", type=home)
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="seeds=[1,2]")
    verb.add_argument("--jobs", type=int, metavar="N", help="runs at once; default: one a core")
    verb.add_argument("--threads", type=int, metavar="N", help="threads of each run")
    verb.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    verb.add_argument("--only-page", action="store_true", help="write the page, run nothing")
    _dry_run(verb, "print the cells, run nothing")


def _report(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", nargs="+", metavar="RUN", type=home, help="a run directory")
    verb.add_argument(
        "-o", "--output", metavar="FILE", type=home, help="default: report.html in the run"
    )
    verb.add_argument(
        "--format", choices=REPORT_FORMATS, help="default: what FILE ends in, else html"
    )
    verb.add_argument(
        "--follow", action="store_true", help="write the page again and again until the run is over"
    )
    verb.add_argument("--every", type=float, default=10, metavar="S", help="seconds, of --follow")


def _doctor(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--offline", action="store_true", help="do not ask the hub")


def _env(verb: argparse.ArgumentParser) -> None:
    """No options but those of every verb."""


def _dry_run(verb: argparse.ArgumentParser, what: str) -> None:
    verb.add_argument("--dry-run", action="store_true", help=what)


def _base_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--model", type=home, help="the base model, where it is not where the adapter says"
    )
    _remote_code(verb)


def _remote_code(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )


# Verb -> what it does, examples, its options.
VERBS: dict[str, tuple[str, str, Callable[[Any], None]]] = {
    "init": ("write a commented recipe for a model and data", INIT, _init),
    "plan": ("write a recipe that fits into the memory there is", PLAN, _plan),
    "data": ("show what a recipe would learn from, the trained part marked", DATA, _data),
    "train": ("fine-tune as a recipe says", TRAIN, _train),
    "eval": ("measure a run or an export on data", EVAL, _eval),
    "generate": ("answer the prompts in a file", GENERATE, _generate),
    "chat": ("talk to a run, an export or a model", CHAT, _chat),
    "inspect": ("blocks, experts, memory and growth plan of a model", INSPECT, _inspect),
    "export": ("write an adapter for PEFT, serving engines or as a model", EXPORT, _export),
    "verify": ("check anybody's LoRA on the experts of a model", VERIFY, _verify),
    "serve": ("start a serving engine that is installed, with the right export", SERVE, _serve),
    "compare": ("run a plan of models, tasks, methods and seeds", COMPARE, _compare),
    "report": ("write a page on one or several runs, to look at", REPORT, _report),
    "doctor": ("try what works here, and say how to mend what does not", DOCTOR, _doctor),
    "env": ("what a report of a fault needs: versions, machine, devices", ENV, _env),
}
