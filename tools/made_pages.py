"""Pages that scripts keep right: written by them, or only compared with what they would write."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from drlora.io.writing import write_at_once


def write_or_check(page: Path, remake: Callable[[str], str], description: str | None) -> int:
    """Put what a script makes into its page, or with --check only say whether it is there.

    Args:
        page: the file.
        remake: the page's text -> the same text with what the script makes as it is now.
        description: what `--help` says.

    Returns:
        The script's exit status: 1 where --check finds the page out of date.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="change nothing")
    is_checked = parser.parse_args().check
    text = page.read_text("utf-8")
    made = remake(text)
    if is_checked:
        return int(made != text)
    write_at_once(page, made)
    return 0
