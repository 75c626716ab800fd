"""A hook of mkdocs: the reports of the kept runs, written into the site as it is built.

    hooks: [tools/site_reports.py]      # in mkdocs.yml

docs/gallery.md links to them. They are made of docs/runs by the code of the same tree, so that the
repository holds none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drlora.report.write import write_report

RUNS = Path(__file__).parents[1] / "docs" / "runs"
# File in the site -> the runs that it shows.
REPORTS = {
    "embedded.html": ("embedded",),
    "planned.html": ("planned",),
    "too-high.html": ("planned", "too-high", "diverged"),
}


def on_post_build(config: Any) -> None:
    """Write them beside the pages."""
    folder = Path(config["site_dir"]) / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    for name, runs in REPORTS.items():
        write_report([RUNS / run for run in runs], folder / name)
