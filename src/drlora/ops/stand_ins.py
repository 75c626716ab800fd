"""An engine that is asked for by name and cannot run is replaced, and that is said once."""

from __future__ import annotations

import warnings

import torch

_TOLD: set[tuple[str, str, str]] = set()


# While torch.compile traces, this is run at once and leaves nothing in the graph.
@torch.compiler.assume_constant_result
def tell_once(engine: str, stand_in: str, reason: str) -> bool:
    """Warn that `stand_in` computes what `engine` was asked to; True."""
    if (engine, stand_in, reason) not in _TOLD:
        _TOLD.add((engine, stand_in, reason))
        warnings.warn(
            f"engine={engine!r} cannot run here: {reason}. {stand_in!r} computes the experts "
            f"instead, to the same result; engine='auto' chooses by itself.",
            stacklevel=2,
        )
    return True
