"""What became of a run: its result, and whether it is one that anybody wants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from drlora.errors import DrLoraError
from drlora.evaluation.measure import Measurement
from drlora.io.files import read_json
from drlora.ranks.rank_map import Budget, Ranks
from drlora.runs.rundir import RunDir

# Without a held-out loss to compare with, the training loss must have risen by this factor: it
# differs between batches too.
RISEN = 1.2


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run; result.json in its directory says more.

    Attributes:
        run: the run directory.
        before: held-out measurement at step 0, None if the recipe does without.
        after: the same at the end, None if the run was interrupted.
        ranks: block -> projection -> rank of each expert.
        budget: spent and stored ranks, and the factors of the stored ones.
        trainable_parameters: numbers in rows that experts own at the end, and in all else that is
            trained (routers, other layers): what methods are compared at.
        stored_parameters: the same with the rows that nobody owns.
        steps: optimizer steps taken in all.
        seconds: time in training of the whole run, its resumed parts included, measurements not.
        interrupted: whether Ctrl-C or SIGTERM ended it early.
        diverged: why it is no success; empty if it is one.
        signal: what ended it early.
    """

    run: RunDir
    before: Measurement | None
    after: Measurement | None
    ranks: Ranks
    budget: Budget
    trainable_parameters: int
    stored_parameters: int
    steps: int
    seconds: float
    interrupted: bool
    diverged: tuple[str, ...] = ()
    signal: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """`run`, the run directory, and all that result.json says of a finished run."""
        return {"run": str(self.run.path), **read_json(self.run.result)}


class RunDiverged(DrLoraError, RuntimeError):  # noqa: N818  # an outcome, as KeyboardInterrupt is
    """A run that is finished and whose result nobody wants; its files are there all the same.

    Attributes:
        result: what came of it; `result.diverged` has the reasons.
    """

    def __init__(self, result: TrainResult, learning_rate: float) -> None:
        super().__init__(verdict_line(result, learning_rate))
        self.result, self._made_of = result, (result, learning_rate)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of  # for processes that hand it on


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a training after the step under way, and a checkpoint is saved.

    Attributes:
        result: as far as the run came; `result.signal` says what ended it.
    """

    def __init__(self, result: TrainResult) -> None:
        super().__init__(f"interrupted at step {result.steps}; a checkpoint is saved")
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.result,)


def reasons_of_divergence(
    before: Measurement | None, after: Measurement | None, entries: Iterable[Mapping[str, Any]]
) -> tuple[str, ...]:
    """Why a run is no success, each reason as a clause; none if it may be one.

    A held-out loss that rose above where it began; without one from before the training, a training
    loss that did. A loss that is NaN or infinite. A training loss of exactly 0, which no model
    reaches: nothing was learned from, or 16 bits were not enough. Where answers are rewarded, the
    held-out reward is looked at (beyond chance, for answers are drawn), and of the training loss,
    which is 0 there by its making, no more than whether it is a number.

    Args:
        before: held-out measurement at step 0, None where there is none.
        after: at the end.
        entries: of metrics.jsonl.
    """
    kept = [e for e in entries if e.get("kind") == "log" and "loss" in e]
    logged = [(e["step"], e["loss"]) for e in kept]
    is_rewarded = any("reward" in e for e in kept)
    of_rise = () if is_rewarded else _of_rise(before, logged)
    return tuple([*_of_training(logged, is_rewarded), *_of_held_out(before, after), *of_rise])


def _of_training(logged: list[tuple[int, Any]], is_rewarded: bool) -> Iterator[str]:
    signs = {"NaN or infinite": _is_no_number, "exactly 0": lambda loss: loss == 0}
    if is_rewarded:
        del signs["exactly 0"]
    for what, is_so in signs.items():
        steps = [step for step, loss in logged if is_so(loss)]
        # A step without a token to learn has a loss of 0 too, but others follow.
        stays_so = what != "exactly 0" or is_so(logged[-1][1]) if logged else False
        if steps and stays_so:
            yield f"the training loss was {what} at step {steps[0]}"


def _of_held_out(before: Measurement | None, after: Measurement | None) -> Iterator[str]:
    if after is None:
        return
    name, way, end = _aim(after)
    if not math.isfinite(end):
        yield f"the held-out {name} is {end}"
    elif before is not None and way * (end - _aim(before)[2]) > _chance(before, after):
        how = "rose" if way > 0 else "fell"
        yield f"the held-out {name} {how} from {_aim(before)[2]:.4g} to {end:.4g}"


def _chance(before: Measurement, after: Measurement) -> float:
    """By how much answers that are drawn may differ in reward: two standard errors; else 0."""
    spreads = [(found.objective or {}).get("reward_std", 0.0) for found in (before, after)]
    return 2 * math.hypot(*spreads) / math.sqrt(max(1, after.loss.examples))


def _aim(found: Measurement) -> tuple[str, int, float]:
    """What the run is about, whether a higher one is worse (1) or better (-1), and what it is.

    The loss of answers; the objective's own where it learns from preferences; or the reward.
    """
    if found.objective and "reward" in found.objective:
        return "reward", -1, found.objective["reward"]
    return "loss", 1, found.objective["loss"] if found.objective else found.loss.loss


def _of_rise(before: Measurement | None, logged: list[tuple[int, Any]]) -> Iterator[str]:
    losses = [loss for _, loss in logged if not _is_no_number(loss)]
    if before is not None or len(losses) < 2:
        return
    late = losses[-max(1, len(losses) // 4) :]
    end = math.fsum(late) / len(late)
    if end > RISEN * losses[0]:
        yield f"the training loss rose from {losses[0]:.4g} to {end:.4g}"


def _is_no_number(loss: Any) -> bool:
    """Also null, which a log has for NaN and infinity."""
    return not isinstance(loss, (int, float)) or not math.isfinite(loss)


def verdict_line(result: TrainResult, learning_rate: float) -> str:
    """What a diverged run says last."""
    return (
        f"DIVERGED: {'; '.join(result.diverged)}. Nothing here is worth keeping: lower "
        f"training.learning_rate ({learning_rate:g}), warm up longer, or see what the labels and "
        f"the precision are, and start again with --overwrite"
    )
