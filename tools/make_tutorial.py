"""Make docs/tutorial.ipynb of docs/tutorial.md: its text, its code, and what the code prints.

python tools/make_tutorial.py

The cells run in this process, one after the other, in one namespace.
tests/project/test_docs.py runs them too and holds the notebook's sources against the page.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")


def cells_of(page: str) -> list[tuple[str, str]]:
    """(`markdown` or `code`, source) of each cell."""
    parts = re.split(r"^```python\n(.*?)^```\n", page, flags=re.M | re.S)
    kinds = ("markdown", "code")
    return [(kinds[i % 2], part.strip()) for i, part in enumerate(parts) if part.strip()]


def run(cells: list[tuple[str, str]]) -> list[str]:
    """What each code cell prints.

    Raises:
        Exception: whatever a cell raises.
    """
    names: dict[str, Any] = {"__name__": "tutorial"}
    printed = []
    for kind, source in cells:
        if kind == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(source, PAGE.name, "exec"), names)
            printed.append(out.getvalue())
    return printed


def notebook(cells: list[tuple[str, str]], printed: list[str]) -> dict[str, Any]:
    """The notebook, in format 4.5."""
    found: list[dict[str, Any]] = []
    for number, (kind, source) in enumerate(cells):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        if kind == "code":
            count = sum(other["cell_type"] == "code" for other in found)
            text = printed[count].splitlines(keepends=True)
            stream = {"output_type": "stream", "name": "stdout", "text": text}
            cell |= {"execution_count": count + 1, "outputs": [stream] if text else []}
        found.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Run the page's cells and write the notebook."""
    cells = cells_of(PAGE.read_text("utf-8"))
    text = json.dumps(notebook(cells, run(cells)), indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", "utf-8")
    print(NOTEBOOK)


if __name__ == "__main__":
    main()
