"""What `drlora doctor` prints."""

from __future__ import annotations

from rich.console import Console

from drlora.cli.progress import say
from drlora.doctor.findings import Health
from drlora.errors import counted

MARKS = {"works": "works ", "absent": "absent", "fails": "FAILS "}


def print_health(found: Health, console: Console) -> None:
    """A line each; the way out below what does not work."""
    for finding in found.findings:
        say(console, f"{MARKS[finding.verdict]}  {finding.what:28} {finding.said}")
        if finding.way_out:
            say(console, f"        {'':28} -> {finding.way_out}")
    failed = sum(finding.verdict == "fails" for finding in found.findings)
    console.print(
        f"{counted(failed, 'fault')}; what is absent is needed by what asks for it alone"
        if failed
        else "all is well; what is absent is needed by what asks for it alone"
    )
