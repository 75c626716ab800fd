"""What may be asked of an export, for the command line to show without importing torch."""

from __future__ import annotations

RANKS = ("padded", "auto")
# auto: as the readers of the format take them, with nothing lost.
ROUTERS = ("auto", "lora", "exact", "full")
ROUNDINGS = ("stochastic", "nearest")
MERGE_INTO = ("trained", "original")
# That can be started to serve, in the order in which they are looked for.
ENGINES = ("vllm", "llama.cpp", "transformers")
