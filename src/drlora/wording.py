"""Numbers in sentences: `1 event`, `2 events`, `1:05:00`."""

from __future__ import annotations


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
