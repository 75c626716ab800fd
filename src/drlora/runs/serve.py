"""A serving engine started, asked one question, and ended: what `drlora serve` does.

    with started(plan) as server:
        checked = server.check()        # waits until it answers
        server.wait()                   # until it ends, or Ctrl-C

The engine has a process group of its own, so that Ctrl-C reaches it through us alone, once, and
what it started ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any

from drlora.errors import CheckpointError
from drlora.runs.serving import ServingPlan

ANSWER_TOKENS = 16
READY_S, ANSWER_S = 900.0, 300.0
PATIENCE_S = 20.0  # that an engine has to end by itself
_POLL_S = 0.2
_ENDED = "the engine ended with code {code} before it answered; what it said is above"


@dataclass(frozen=True)
class Checked:
    """One answer.

    Attributes:
        model: the name that requests must give.
        prompt: what was asked.
        answer: what it said.
        expected: what the run said in training; None where that is not known.
    """

    model: str
    prompt: str
    answer: str
    expected: str | None

    @property
    def is_expected(self) -> bool | None:
        """Whether the answer begins as the run's own did; None where that is not known."""
        if self.expected is None:
            return None
        return self.answer.strip().startswith(self.expected.strip())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"is_expected": self.is_expected}


class Engine:
    """A running engine."""

    def __init__(self, plan: ServingPlan, process: subprocess.Popen[bytes]) -> None:
        self.plan, self.process = plan, process

    def check(self) -> Checked:
        """Wait until it answers, and ask.

        Raises:
            CheckpointError: if it ends, does not answer in time, or answers with nothing.
        """
        name = self._wait_until_ready()
        asked = {
            "model": name, "prompt": self.plan.prompt, "max_tokens": ANSWER_TOKENS,
            "temperature": 0.0,
        }  # fmt: skip
        found = self._ask("/v1/completions", asked, ANSWER_S)
        answer = str((found.get("choices") or [{}])[0].get("text") or "")
        if not answer.strip():
            raise CheckpointError(f"the engine answers {self.plan.prompt!r} with nothing.")
        return Checked(name, self.plan.prompt, answer, self.plan.expected)

    def wait(self) -> int:
        """Until it ends by itself; its exit code."""
        return self.process.wait()

    def _wait_until_ready(self) -> str:
        """The name of what it serves: an adapter's, where there is one."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                raise CheckpointError(_ENDED.format(code=code))
            with contextlib.suppress(OSError, ValueError):
                self._ask("/health", None, 5.0)
                return self._name()
            time.sleep(_POLL_S)
        raise CheckpointError(f"the engine did not answer at {self.plan.url} in {READY_S:.0f} s.")

    def _name(self) -> str:
        """The adapter's, or the model's; an engine may not list a model that it was given."""
        names: list[str] = []
        with contextlib.suppress(OSError, ValueError, KeyError):
            names = [str(m["id"]) for m in self._ask("/v1/models", None, 5.0)["data"]]
        return "a" if "a" in names else names[0] if names else str(self.plan.export.absolute())

    def _ask(self, path: str, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.plan.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            if body is None:
                raise
            said = error.read().decode(errors="replace")[:500]
            raise CheckpointError(f"the engine answers with code {error.code}: {said}") from error
        found = json.loads(text) if text.strip().startswith("{") else {}
        return found if isinstance(found, dict) else {}


@contextmanager
def started(plan: ServingPlan, output: IO[bytes] | int | None = None) -> Iterator[Engine]:
    """The engine of `plan`, ended when the block is left, however.

    Args:
        plan: of which everything is prepared.
        output: where what it says goes; by default to standard output and error as they are.

    Raises:
        CheckpointError: if the program cannot be started.
    """
    try:
        process = subprocess.Popen(
            plan.command, stdout=output, stderr=output, start_new_session=True
        )
    except OSError as error:
        raise CheckpointError(f"{plan.command[0]} cannot be started: {error}") from error
    try:
        yield Engine(plan, process)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; harder where that does not help, and at once at a second Ctrl-C."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            _tell(process, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
                break
    except KeyboardInterrupt:
        pass  # whoever presses it again is in a hurry
    finally:
        _tell(process, signal.SIGKILL)  # children that outlived it, too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)


def _tell(process: subprocess.Popen[bytes], number: int) -> None:
    """Its whole group, as far as there is any of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
