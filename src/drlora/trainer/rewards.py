"""Rewards by name: what the answers of a model are given in a run that learns by trying.

    @REWARDS.register("short")
    def short(completions, **given):
        return [-len(text_of(completion)) for completion in completions]

    drlora train RECIPE.yaml --plugin my_rewards.py objective=grpo reward=short

A reward is a function as TRL's GRPOTrainer takes it: of `prompts`, `completions`, `completion_ids`,
the columns of the data (`answer`, the completion that is right, and `answers`, all that are) and
more, by name; one number an answer, or None where it has nothing to say. Nothing that a recipe
holds can name code of its own: a file of rewards is named on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from drlora.config.registry import Registry

Reward = Callable[..., list[float | None]]

OF_TRL = "trl.rewards."
REWARDS: Registry[Reward] = Registry("reward")


def rewards_of(names: Sequence[str]) -> list[Reward]:
    """The functions of these names; `trl.rewards.NAME` is TRL's.

    Raises:
        ConfigError: if one is not known, with those that are.
    """
    return [_of_trl(name) or REWARDS[name] for name in names]


def _of_trl(name: str) -> Reward | None:
    from trl import rewards

    found = getattr(rewards, name.removeprefix(OF_TRL), None) if name.startswith(OF_TRL) else None
    return found if callable(found) else None


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of an answer, which is one, or a list of turns."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


@REWARDS.register("exact")
def exact(
    completions: Sequence[Any], answers: Sequence[Sequence[str]], **given: Any
) -> list[float | None]:
    """1 for one of the right answers, white space around it apart; else 0."""
    pairs = zip(completions, answers, strict=True)
    return [float(text_of(c).strip() in {a.strip() for a in right}) for c, right in pairs]


@REWARDS.register("likeness")
def likeness(
    completions: Sequence[Any], answers: Sequence[Sequence[str]], **given: Any
) -> list[float | None]:
    """1 for one of the right answers, 0 for what has no letter of any: the ratio of difflib."""
    pairs = zip(completions, answers, strict=True)
    return [max(_ratio(text_of(c).strip(), a.strip()) for a in right) for c, right in pairs]


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()
