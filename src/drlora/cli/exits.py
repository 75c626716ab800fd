"""The exit codes, and how a command ends that was not carried out."""

from __future__ import annotations

import sys

FAILED_CELL = 1
UNSOUND = 1
UNFIT = 1
BAD_INPUT = 2
DIVERGED = 3
INTERRUPTED = 130
TERMINATED = 143


def end(message: str, code: int) -> int:
    """Say why on standard error; returns `code`."""
    print(message, file=sys.stderr)
    return code
