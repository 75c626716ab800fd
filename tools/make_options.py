"""The table of options in docs/methods.md, from what the rules have registered.

python tools/make_options.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from made_pages import write_or_check

import drlora.config.adapter  # noqa: F401  (registers the rules that come with the package)
from drlora.config.options import GENERAL, Option
from drlora.config.registry import REGISTRIES, WITH_OPTIONS

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
START, END = "<!-- options -->\n", "<!-- end of options -->\n"


def row(name: str, option: Option, rule: str) -> str:
    """One line of the table."""
    default = f"{option.default:g}" if type(option.default) is float else str(option.default)
    choices = ", ".join(f"`{choice}`" for choice in option.choices)
    says = f"{option.says} ({choices})" if choices else option.says
    return f"| `{name}` | `{default}` | {rule} | {says} |"


def table() -> str:
    """General options first, then those of each rule."""
    lines = ["| option | default | goes with | what it is |", "|---|---|---|---|"]
    lines += [row(name, option, "all") for name, option in GENERAL.items()]
    for setting in WITH_OPTIONS:
        for choice in REGISTRIES[setting].names():
            for name, option in REGISTRIES[setting].options_of(choice).items():
                lines.append(row(name, option, f"`{setting}={choice}`"))
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The page with the table made anew."""
    head, rest = text.split(START)
    return head + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, with_table, __doc__))
