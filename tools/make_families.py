"""Write the tables of docs/families.md from docs/families.json, which the tests write.

python tools/make_families.py

tests/moe/test_architectures.py says how to make the JSON anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
START, END = "<!-- tables: tools/make_families.py -->\n", "<!-- end of tables -->\n"
CHECKS = ("outputs and gradients", "routing", "growth", "save and load", "merge")
EXPORTS = ("peft", "per-expert", "merged")


def make_tables(said: dict[str, Any]) -> str:
    """What was shown of each class, those with a family of their own last; what was not tried."""
    classes: dict[str, Any] = said["classes"]
    head = ["model class", "family", "how its experts differ", "shared experts", "router"]
    ordered = sorted(
        classes.items(), key=lambda item: (item[1]["family"] != "InterfaceExperts", item[0].lower())
    )
    return (
        f"{len(classes)} classes of transformers {said['transformers']}:\n\n"
        + _table([*head, *CHECKS, *(f"export: {name}" for name in EXPORTS)], map(_cells, ordered))
        + "\nModels of transformers with experts that are not in the table:\n\n"
        + _table(["folder", "why"], [[f"`{k}`", v] for k, v in said["untested"].items()])
    )


def with_tables(page: str, said: dict[str, Any]) -> str:
    """The page with the tables between the two marks."""
    before, rest = page.split(START)
    return before + START + make_tables(said) + END + rest.split(END)[1]


def _cells(item: tuple[str, dict[str, Any]]) -> list[str]:
    name, row = item
    return [
        f"`{name}`",
        f"`{row['family']}`",
        ", ".join(row["differs"]) or "–",
        "yes" if row["shared_experts"] else "–",
        "found" if row["router"] else "not recognised",
        *("yes" if check in row["shown"] else "no" for check in CHECKS),
        *("yes" if (s := row["exports"][e]) == "yes" else f"no: {s}" for e in EXPORTS),
    ]


def _table(head: list[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    page = DOCS / "families.md"
    said = json.loads((DOCS / "families.json").read_text())
    page.write_text(with_tables(page.read_text(), said))
