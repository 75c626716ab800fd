"""What the package logs, on standard error: each sentence once, however often data are read."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Once(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print what was not said yet."""
        text = self.format(record)
        if text not in self._said:
            self._said.add(text)
            print(text, file=sys.stderr)


@contextmanager
def notes_once() -> Iterator[None]:
    """While it lasts, a warning of drlora's is printed the first time that it comes."""
    handler, logger = _Once(), logging.getLogger("drlora")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
