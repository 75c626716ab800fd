"""What an engine is, and which one computes: the one asked for, or one that can.

An engine is a function and what it refuses, said beside the function. It registers itself under its
name, and `DrLoraConfig(engine=name)` takes it; `drlora.ops.contract.check_engine` shows whether it
computes what `naive` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from drlora.config.registry import ENGINES
from drlora.errors import ConfigError
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing
from drlora.ops.stand_ins import tell_once
from drlora.ops.weights import ExpertWeights

Run = Callable[
    [Tensor, Tensor, Routing, ExpertWeights, list[LoraPiece], DropoutMasks],
    Tensor,
]
AUTO = "auto"


def _nothing(base: ExpertWeights) -> str | None:
    return None


@dataclass(frozen=True)
class Engine:
    """A way to compute adapted experts.

    Attributes:
        name: what `DrLoraConfig.engine` calls it.
        run: from (x_TH, weight_TK, routing, base, pieces, masks) to the (T, H) output; see
            `drlora.ops.adapted_experts`.
        refuses: why it cannot compute these experts, as a clause; None if it can. It is asked when
            an adapter is made too, when the experts may be on another device than later.
        stand_ins: names of the engines that compute what it refuses, the best first.
        traced: which of torch.compile's two ways takes its place in a compiled model.
    """

    name: str
    run: Run
    refuses: Callable[[ExpertWeights], str | None] = _nothing
    stand_ins: tuple[str, ...] = ("loop", "grouped", "naive")
    traced: Literal["loop", "grouped"] = "loop"


def register_engine(engine: Engine) -> Engine:
    """Make `engine` one that can be asked for by its name.

    Raises:
        ConfigError: if the name is taken.
    """
    if engine.name == AUTO:
        raise ConfigError(f"an engine cannot be called {AUTO!r}, which chooses one; rename it.")
    return ENGINES.add(engine.name, engine)


def choose_engine(name: str, base: ExpertWeights) -> Engine:
    """The engine called `name`; `auto` takes `loop` on the CPU and `grouped` elsewhere.

    Elsewhere that is until a training pass has tried what there is (`drlora.ops.trial`).

    Where an engine refuses the experts the first of its stand-ins that does not takes its place. Of
    one that was asked for by name that is said once.

    Raises:
        ConfigError: if no engine is called so, it is not installed, or all refuse.
    """
    wanted = ENGINES[automatic(base) if name == AUTO else name]
    reasons: list[str] = []
    for engine in (wanted, *(ENGINES[other] for other in wanted.stand_ins)):
        if (reason := engine.refuses(base)) is None:
            if reasons and name != AUTO:
                tell_once(name, engine.name, "; ".join(dict.fromkeys(reasons)))
            return engine
        reasons.append(reason)
    raise ConfigError(
        f"engine={name!r} cannot compute these experts, nor can {list(wanted.stand_ins)}: "
        f"{'; '.join(dict.fromkeys(reasons))}. Choose engine='naive'."
    )


def automatic(base: ExpertWeights) -> str:
    """The name of the engine that `auto` asks first."""
    return "loop" if base.device.type == "cpu" else "grouped"
