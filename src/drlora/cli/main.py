"""The command line: verbs, arguments, and errors as one message.

    drlora init [NAME] [key=value ...] [-o FILE] | --list
    drlora plan MODEL DATA [key=value ...] [--gpu 24GB | --memory 8GB] [-o FILE] [--range-test]
    drlora data RECIPE [key=value ...] [--examples N]
    drlora train RECIPE [key=value ...] [--resume | --overwrite] [--dry-run]
    drlora eval RUN|EXPORT [--split SPLIT] [--data FILE]
    drlora generate RUN|EXPORT --prompts FILE [key=value ...] [--compare]
    drlora chat RUN|EXPORT [key=value ...] [--compare] [--system TEXT]
    drlora inspect MODEL [key=value ...] [--steps N] [--tokens N]
    drlora export RUN --format peft|per-expert|mlx|gguf|sglang|merged -o DIR [--dry-run]
    drlora verify ADAPTER [--base MODEL] [--merged DIR]
    drlora serve RUN [--engine vllm|llama.cpp|transformers] [--port N] [--check] [--dry-run]
    drlora report RUN [RUN ...] [-o FILE] [--format html|png|svg|md] [--follow]
    drlora compare PLAN.yaml [key=value ...] [--jobs N] [--dry-run] [--retry-failed]
    drlora doctor
    drlora env

Every verb takes --json, --plugin FILE and --help (with examples). `drlora --print-completion bash`
writes a completion script, where shtab is installed.

Exit codes: 0 done, 1 a run of a comparison failed, an adapter has a fault, a plan does not fit or
something here does not work, 2 something to put
right (one message on standard error), 3 a run that diverged, 130 interrupted, 143 terminated
(SIGTERM).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from drlora.cli import exits
from drlora.cli.arguments import Parser, make_parser, plugins_in
from drlora.cli.exits import end
from drlora.cli.recipe_list import print_recipes
from drlora.errors import ConfigError, DrLoraError, Terminated
from drlora.io.plugins import load_plugins


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        load_plugins(plugins_in(words))
    except DrLoraError as error:
        return end(f"error: {error}", exits.BAD_INPUT)
    parser = make_parser()
    arguments = _parse(parser, words)
    shell = arguments.print_completion
    if shell is None and not hasattr(arguments, "verb"):
        parser.print_help()
        return 0
    try:
        return _print_completion(parser, shell) if shell else _run(arguments)
    except Terminated:
        return end("terminated", exits.TERMINATED)
    except KeyboardInterrupt:
        return end("interrupted", exits.INTERRUPTED)
    except (DrLoraError, OSError) as error:
        if getattr(arguments, "debug", False):
            raise
        return end(f"error: {error}", exits.BAD_INPUT)


def _run(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "list", False):
        return print_recipes(arguments.json)
    # Imported here, for torch comes with it: help, completion and lists need none of it.
    from drlora.cli.verbs import run

    return run(arguments)


def _parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """As argparse does, but `key=value` may stand after options too."""
    arguments, left = parser.parse_known_args(words)
    late = [word for word in left if "=" in word and not word.startswith("-")]
    words_of = getattr(arguments, "overrides", getattr(arguments, "words", None))
    if words_of is not None:
        words_of += late
        left = [word for word in left if word not in late]
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return arguments


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
