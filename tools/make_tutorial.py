"""Make the notebooks of their pages: the text, the code, and what the code prints.

python tools/make_tutorial.py

docs/tutorial.md and docs/free-gpu.md. The cells of a page run in this process, one after the other,
in one namespace and a folder of their own. tests/project/test_docs.py runs them too and holds the
notebooks' sources against the pages.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "tutorial.md", DOCS / "free-gpu.md")


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
                exec(compile(source, "page", "exec"), names)
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
    """Run the pages' cells and write the notebooks."""
    for page in PAGES:
        cells = cells_of(page.read_text("utf-8"))
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            printed = run(cells)
        text = json.dumps(notebook(cells, printed), indent=1, ensure_ascii=False)
        page.with_suffix(".ipynb").write_text(text + "\n", "utf-8")
        print(page.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
