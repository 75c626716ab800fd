"""The report of one or several runs, from their files alone: `drlora report RUN [RUN ...]`."""

from __future__ import annotations

from drlora.report.write import FORMATS, write_report

__all__ = ["FORMATS", "write_report"]
