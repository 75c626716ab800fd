"""What `drlora serve` prints and does: the command, one checked answer, and a clean end."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

from drlora.cli.exits import BAD_INPUT, end
from drlora.runs.interrupt import sigterm_interrupts
from drlora.runs.serve import Checked, Engine, started
from drlora.runs.serving import ServingPlan, prepare

_ENDED = "the engine ended by itself, with code {code}"


def print_serving(plan: ServingPlan, console: Console) -> None:
    """What will be started, before anything is."""
    console.print(f"engine   {plan.engine}")
    there = "is there" if plan.is_there else "will be made"
    console.print(f"export   {plan.format}, {plan.export} ({there})")
    if plan.gguf is not None:
        there = "is there" if plan.gguf[0].is_file() else "will be converted"
        console.print(f"gguf     {plan.gguf[0]} ({there})")
    for note in plan.notes:
        console.print(f"note     {note}")
    console.print(f"command  {plan.line}")


def serve(plan: ServingPlan, console: Console, is_json: bool, is_checked_only: bool) -> int:
    """Prepare, start, check, and wait for Ctrl-C; returns the exit code."""
    try:
        with sigterm_interrupts():
            prepare(plan)
            # Of two programs that print, ours alone may write to standard output as JSON.
            with started(plan, sys.stderr.fileno() if is_json else None) as engine:
                return _serve(engine, console, is_json, is_checked_only)
    except KeyboardInterrupt:
        console.print("ended    the engine is stopped")
        return 0


def _serve(engine: Engine, console: Console, is_json: bool, is_checked_only: bool) -> int:
    checked = engine.check()
    if is_json:
        print(json.dumps(_said(engine.plan, checked), indent=2), flush=True)
    else:
        print_checked(engine.plan, checked, console)
    if is_checked_only:
        return 0
    return end(_ENDED.format(code=engine.wait()), BAD_INPUT)


def print_checked(plan: ServingPlan, checked: Checked, console: Console) -> None:
    """The answer, and whether it is the run's own."""
    verdict = {
        True: "as the run did after training",
        False: f"the run said {checked.expected!r} after training",
        None: "",
    }[checked.is_expected]
    console.print(f"asked    {checked.prompt!r}")
    console.print(f"answer   {checked.answer!r}{f' ({verdict})' if verdict else ''}")
    console.print(f'serving  {plan.url}/v1, model "{checked.model}"; Ctrl-C ends it')


def _said(plan: ServingPlan, checked: Checked) -> dict[str, Any]:
    return {**plan.to_dict(), "checked": checked.to_dict()}
