"""`drlora chat` and `drlora generate` on the terminal.

A turn of a chat is a line. Ctrl-C stops an answer, and ends the chat where none is under way, as
Ctrl-D and /exit do.
"""

from __future__ import annotations

import contextlib
import json
import sys

from drlora.errors import DrLoraError, Terminated
from drlora.runs.chat import Chat
from drlora.runs.generate import Answer, Generation
from drlora.runs.speaker import Said

HELP = "/reset begins anew, /exit (or Ctrl-D) ends, Ctrl-C stops an answer"


def talk(chat: Chat, as_json: bool) -> None:
    """Read lines until the end, and answer each."""
    with contextlib.suppress(ImportError):  # arrow keys and history, where the system has them
        import readline  # noqa: F401
    is_asking = sys.stdin.isatty() and not as_json
    if not as_json:
        for line in (*chat.speaker.notes, HELP):
            print(line, file=sys.stderr)
    while True:
        try:
            text = input("> " if is_asking else "").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            print(f"{text} is not known: {HELP}", file=sys.stderr)
        elif text:
            _answer(chat, text, as_json)


def _answer(chat: Chat, text: str, as_json: bool) -> None:
    shown = None if as_json else _Shown(is_named=len(chat.sides) > 1)
    try:
        said = chat.say_to_all(text, shown)
    except Terminated:
        raise
    except KeyboardInterrupt:
        print("\nstopped; the turn is forgotten", file=sys.stderr)
        return
    except DrLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    if as_json:
        print(json.dumps({"user": text, **{side: one.text for side, one in said.items()}}))
        sys.stdout.flush()
        return
    print()
    for side, one in said.items():
        _print_cut(side, one, len(said) > 1)


def _print_cut(side: str, said: Said, is_named: bool) -> None:
    if not said.is_ended:
        whose = f"{side}: " if is_named else ""
        print(
            f"({whose}cut after {said.tokens} tokens; max_new_tokens allows more)", file=sys.stderr
        )


class _Shown:
    """Prints the pieces as they come, each side under its name where there are several."""

    def __init__(self, is_named: bool) -> None:
        self.is_named = is_named
        self.side: str | None = None

    def __call__(self, side: str, piece: str) -> None:
        if self.is_named and side != self.side:
            print(f"{'' if self.side is None else chr(10)}{side}: ", end="")
        self.side = side
        print(piece, end="", flush=True)


def print_answer(answer: Answer) -> None:
    """One prompt with its answers, as soon as it is there."""
    asked = answer.prompt if isinstance(answer.prompt, str) else answer.prompt[-1].get("content")
    lines = {"prompt": asked, "adapter" if answer.base is not None else "answer": answer.text}
    if answer.base is not None:
        lines["base"] = answer.base
    if answer.expected is not None:
        lines["expected"] = answer.expected
    for name, text in lines.items():
        print(f"{name:9} {str(text).strip()}")
    print(flush=True)


def print_end(found: Generation) -> None:
    """By what was answered, and what to know of it, on standard error."""
    settings = " ".join(f"{name}={value}" for name, value in found.settings.items())
    with_adapter = f" with {found.adapter}" if found.adapter else ""
    print(
        f"{found.model}{with_adapter}, {found.dtype} on {found.device}, {settings}", file=sys.stderr
    )
    for note in found.notes:
        print(note, file=sys.stderr)
