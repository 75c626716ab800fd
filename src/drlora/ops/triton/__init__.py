"""The engine of Triton kernels; they need a GPU, or Triton's interpreter.

What computes is imported when it is asked for: it needs a package that torch brings on Linux with
CUDA and nowhere else.
"""

from __future__ import annotations

from torch import Tensor

from drlora.errors import ConfigError
from drlora.ops.engine import Engine, register_engine
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing
from drlora.ops.weights import ExpertMatrix, ExpertWeights


def _refuses(base: ExpertWeights) -> str | None:
    """The kernels were written for one layout: one stored tensor a matrix, and no extras.

    Raises:
        ConfigError: if the package triton is missing, which nothing stands in for silently.
    """
    try:
        import drlora.ops.triton.engine  # noqa: F401
    except (ImportError, AttributeError) as error:  # the second of an old triton
        if (error.name or "").partition(".")[0] not in ("triton", "knobs"):
            raise
        raise ConfigError(
            "engine='triton' needs the package triton, which cannot be imported; install the "
            "version that your torch asks for, or choose engine='auto'."
        ) from error
    extras = (base.gate_up_bias_EG, base.down_bias_EH, base.post_norm)
    is_bare = all(extra is None for extra in extras)
    if is_bare and _is_read(base.gate_up) and _is_read(base.down):
        return None
    return "the experts are not one contiguous tensor a matrix, without biases and norms"


def _is_read(matrix: ExpertMatrix) -> bool:
    """Whether the kernels can read it: one contiguous tensor, of numbers or of codes."""
    dense_EOI = matrix.dense()
    if dense_EOI is not None:
        return dense_EOI.is_contiguous()
    coded = matrix.coded()
    return coded is not None and coded.codes.is_contiguous() and coded.scale_EPQ.is_contiguous()


def _run(
    x_TH: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    base: ExpertWeights,
    pieces: list[LoraPiece],
    masks: DropoutMasks,
) -> Tensor:
    from drlora.ops.triton.engine import experts_triton

    return experts_triton(x_TH, weight_TK, routing, base, pieces, masks)


register_engine(
    Engine("triton", _run, _refuses, stand_ins=("grouped", "loop", "naive"), traced="grouped")
)
