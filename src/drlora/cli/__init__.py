"""The command line, the only place that prints."""

from drlora.cli.main import main

__all__ = ["main"]
