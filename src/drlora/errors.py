"""The errors that drlora raises for what a user can put right, and the words they are made of.

Each message names the value at fault and the way out: `1 event`, `1:05 min`, a value cut short.
"""

from __future__ import annotations

from typing import Any


class DrLoraError(Exception):
    """Base of all errors raised by drlora."""


class ConfigError(DrLoraError, ValueError):
    """A setting, or a pair of settings, that cannot work."""


class DataError(DrLoraError, ValueError):
    """Data that is missing, malformed or not of a known form."""


class SyncError(DrLoraError, RuntimeError):
    """Processes of one run that no longer hold the same ranks or statistics."""


class CheckpointError(DrLoraError, ValueError):
    """A checkpoint or adapter that is missing, incomplete or does not fit the model."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where no training is under way that could end after its step."""


def counted(number: int, noun: str) -> str:
    """The number and its noun, in the plural where it is not one.

    >>> counted(1, "MoE block"), counted(1200, "event")
    ('1 MoE block', '1,200 events')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as short as they can be read.

    >>> duration(42), duration(65), duration(7265)
    ('42 s', '1:05 min', '2:01 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02} h"


def shown(value: Any, longest: int = 60) -> str:
    """`value` as in Python, cut where it is long; for messages."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop; its type if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
