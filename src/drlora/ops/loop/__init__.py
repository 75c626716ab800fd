"""The engine of the CPU: one expert after the other, forward and backward by hand."""
