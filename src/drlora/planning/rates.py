"""A learning rate to begin with: by a rule, or by short runs that are compared.

The rule is that of the field for LoRA (`LoRA Without Regret`, 2025): ten times the rate of full
fine-tuning, which falls with the width of the model,

    rate = 10 x 5e-5 x (2000 / hidden size) ^ 0.781

A range test trains `TRIED` multiples of it for some steps each and takes the one with the least
held-out loss.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drlora.errors import ConfigError, DrLoraError
from drlora.runs.outcome import RunDiverged
from drlora.runs.recipe import Recipe
from drlora.runs.train import train

FULL_RATE, TIMES, WIDTH, POWER = 5e-5, 10, 2000, 0.781
TRIED = (0.25, 0.5, 1.0, 2.0, 4.0)
TEST_STEPS = 40
TEST_EXAMPLES = 64


@dataclass(frozen=True)
class TriedRate:
    """A rate of the range test and the held-out loss after it; None where it diverged."""

    rate: float
    loss: float | None


def rate_by_width(hidden_size: int) -> float:
    """The rule, rounded to two digits.

    >>> rate_by_width(2048)
    0.00049
    """
    return float(f"{TIMES * FULL_RATE * (WIDTH / hidden_size) ** POWER:.1e}")


def range_test(
    recipe: Recipe,
    rate: float,
    steps: int = TEST_STEPS,
    multiples: Sequence[float] = TRIED,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[float, tuple[TriedRate, ...]]:
    """The best of a few rates, and what each came to.

    Args:
        recipe: of the run; its steps are as many as are tried, so its end is not what is compared.
        rate: around which they lie.
        steps: of each run.
        multiples: of `rate` that are tried.
        say: is told each.

    Raises:
        ConfigError: if all of them diverged.
    """
    found = []
    for times in multiples:
        tried = float(f"{times * rate:.1e}")
        loss = _loss_after(recipe, tried, steps)
        found.append(TriedRate(tried, loss))
        say(
            f"learning rate {tried:g}: held-out loss "
            + ("diverged" if loss is None else f"{loss:.4f}")
        )
    ended = [(one.loss, one.rate) for one in found if one.loss is not None]
    if not ended:
        raise ConfigError(
            f"training diverged at all of {[one.rate for one in found]}; see the data."
        )
    return min(ended)[1], tuple(found)


def _share(warmup: float, steps: int) -> float:
    """A warm-up as a share of a run, which a shorter one has too; of an unknown length a tenth."""
    if warmup < 1:
        return warmup
    return warmup / steps if steps > warmup else 0.1


def _loss_after(recipe: Recipe, rate: float, steps: int) -> float | None:
    with tempfile.TemporaryDirectory() as folder:
        whole = recipe.training.get("max_steps", 0)
        short: dict[str, Any] = {
            "learning_rate": rate, "max_steps": steps, "save_strategy": "no",
            "warmup_steps": _share(recipe.training["warmup_steps"], whole),
        }  # fmt: skip
        training = {k: v for k, v in recipe.training.items() if k != "num_train_epochs"} | short
        evaluation = replace(
            recipe.evaluation, before=False, exact_match=False, samples=0,
            loss_examples=min(TEST_EXAMPLES, recipe.evaluation.loss_examples or TEST_EXAMPLES),
        )  # fmt: skip
        adapter = recipe.adapter_config()
        adapter.r_init, adapter.grow_every, adapter.settle_steps = adapter.r_target, "auto", "auto"
        adapter.warmup_steps = _share(adapter.warmup_steps, whole)
        tried = replace(
            recipe, output_dir=str(Path(folder) / "run"), training=training, adapter=adapter,
            evaluation=evaluation,
        )  # fmt: skip
        try:
            after = train(tried).after
        except RunDiverged:
            return None
        except DrLoraError:
            raise
    return None if after is None else after.loss.loss
