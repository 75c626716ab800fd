"""The engine of the CPU: one expert after the other, forward and backward by hand."""

from drlora.ops.loop import engine as _engine  # noqa: F401  # it registers itself
