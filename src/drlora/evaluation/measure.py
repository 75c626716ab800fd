"""What a run measures on held-out data, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from drlora.data import pad_token_id
from drlora.data.tokens import Prepared
from drlora.errors import CheckpointError, ConfigError, DataError, shown
from drlora.evaluation.draw import draw
from drlora.evaluation.evaluate import (
    LossResult,
    MatchResult,
    Sample,
    evaluate_loss,
    exact_match,
)
from drlora.evaluation.samples import SAMPLES, sample_answers
from drlora.io.files import home

DRAWS = ("random", "front")


@dataclass(frozen=True)
class EvaluationSection:
    """What is measured before and after training, on the held-out data.

    Args:
        loss_examples: examples for the loss; by default all.
        exact_match: whether answers are generated and compared; by default where there are
            prompts with one-line completions.
        exact_match_examples: examples for exact match.
        max_new_tokens: longest answer, in tokens.
        batch_size: examples at once.
        before: whether the untrained model is measured too, at step 0.
        samples: answers that are kept for people to read; 0 for none.
        draw: which examples are taken where there are more: a `random` draw, always the same of as
            many, or those from the `front`.
        forgetting: further data, as `data.train` takes it, such as texts that the model knows: its
            loss, of at most `loss_examples`, says what is forgotten while the task is learned.
    """

    loss_examples: int | None = None
    exact_match: bool | None = None
    exact_match_examples: int = 100
    max_new_tokens: int = 32
    batch_size: int = 16
    before: bool = True
    samples: int = SAMPLES
    draw: str = "random"
    forgetting: str | None = None

    def __post_init__(self) -> None:
        if self.draw not in DRAWS:
            raise ConfigError(
                f"evaluation.draw={self.draw!r} is not known; choose one of {list(DRAWS)}."
            )
        for name in ("loss_examples", "exact_match_examples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation.{name}={value} must be at least 1.")
        if self.samples < 0:
            raise ConfigError(f"evaluation.samples={self.samples} must be at least 0.")

    def moved(self, find: Callable[[str], str]) -> EvaluationSection:
        """The same with what `find` makes of the name of the other data."""
        if self.forgetting is None:
            return self
        return replace(self, forgetting=find(home(self.forgetting)))


@dataclass(frozen=True)
class Measurement:
    """Loss over target tokens and, where answers can be compared, exact match.

    `notes` say what was asked for and could not be had, and why there is no exact match. Of a run
    that learns from preferences, the loss is that of the answers that are wanted, and `objective`
    has its own loss (or the reward) and what its trainer measures beside, by TRL's names. `samples`
    are answers of the model, where exact match has none of its own. `forgetting` is the loss on
    other data, where the section names some.
    """

    loss: LossResult
    match: MatchResult | None
    notes: tuple[str, ...] = ()
    objective: dict[str, float] | None = None
    samples: tuple[Sample, ...] = ()
    forgetting: LossResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those of each example; `measurement_from` reads them back."""
        values = asdict(self) | {"notes": list(self.notes)}
        del values["loss"]["example_nats"]
        if values["match"]:
            del values["match"]["is_correct"]
        if values["forgetting"]:
            del values["forgetting"]["example_nats"]
        for name in ("objective", "samples", "forgetting"):
            if not values[name]:
                del values[name]
        return values

    def __str__(self) -> str:
        text = f"loss {self.loss.loss:.4f}, perplexity {self.loss.perplexity:.2f}"
        if self.loss.examples:
            text += f" on {self.loss.examples} examples"
        other = [] if self.forgetting is None else [f"on other data {self.forgetting.loss:.4f}"]
        return "; ".join([*self._objective_text(), text + self._match_text(), *other, *self.notes])

    def _objective_text(self) -> list[str]:
        if self.objective is None:
            return []
        if "reward" in self.objective:
            return [f"reward {self.objective['reward']:.4f}"]
        text = f"objective {self.objective['loss']:.4f}"
        share = self.objective.get("rewards/accuracies")
        return [text if share is None else f"{text}, {share:.1%} of the pairs in order"]

    def _match_text(self) -> str:
        if self.match is None:
            return ""
        share = f"{self.match.accuracy:.1%} ({self.match.correct} of {self.match.total})"
        rate = self.match.error_rate
        errors = "" if rate is None else f", word error rate {rate:.1%}"
        return f", exact match {share}{errors}"


def measurement_from(values: dict[str, Any]) -> Measurement:
    """The measurement that `to_dict` gave, without its samples.

    Raises:
        CheckpointError: if `values` are no measurement.
    """
    try:
        match = values["match"]
        return Measurement(
            LossResult(**values["loss"]),
            MatchResult(**{**match, "samples": ()}) if match else None,
            tuple(values.get("notes", ())),
            values.get("objective"),
            forgetting=LossResult(**values["forgetting"]) if values.get("forgetting") else None,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{shown(values)} is no measurement: {error}.") from error


def measure(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Prepared,
    section: EvaluationSection,
    others: Prepared | None = None,
) -> Measurement:
    """Measure the model as it is, as the recipe's section `evaluation` says.

    Args:
        model: it, with its adapter.
        tokenizer: its.
        examples: the held-out ones.
        section: what is measured of them.
        others: the data that `forgetting` names.
    """
    collator = DataCollatorForLanguageModeling(pad_token_id(tokenizer))

    def loss_on(rows: Dataset) -> LossResult:
        drawn = draw(rows, section.loss_examples, section.draw)
        return evaluate_loss(model, drawn, collator, section.batch_size)

    loss = loss_on(examples.tokens)
    forgetting = None if others is None else loss_on(others.tokens)
    raw = draw(examples.raw, section.exact_match_examples, section.draw)
    notes = tuple(notes_on(len(examples.tokens), raw, section))
    if not wants_match(raw, section):
        samples = _samples(model, tokenizer, examples, section)
        return Measurement(loss, None, notes, samples=samples, forgetting=forgetting)
    match = exact_match(model, tokenizer, raw, section.batch_size, section.max_new_tokens)
    return Measurement(loss, match, notes, forgetting=forgetting)


def _samples(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Prepared,
    section: EvaluationSection,
) -> tuple[Sample, ...]:
    if section.samples == 0:
        return ()
    rows = draw(examples.raw, section.samples, section.draw)
    return sample_answers(model, tokenizer, list(rows), section.max_new_tokens)


def notes_on(there: int, raw: Dataset, section: EvaluationSection) -> Iterator[str]:
    """What the section asks for and does not get, and why there is no exact match, in clauses.

    Args:
        there: examples that there are for the loss.
        raw: those for exact match.
        section: what is asked for.
    """
    if section.loss_examples is not None and section.loss_examples > there:
        yield f"evaluation.loss_examples={section.loss_examples}, but there are {there}"
    if section.exact_match is None and not wants_match(raw, section):
        reason = "there are no prompts"
        if "prompt" in raw.column_names:
            is_text = isinstance(raw[0]["prompt"], str)
            reason = "completions have several lines" if is_text else "prompts are messages"
        yield f"no exact match: {reason}"


def wants_match(raw: Dataset, section: EvaluationSection) -> bool:
    """Whether answers are compared: as the recipe says, or where there are one-line ones.

    Raises:
        DataError: if the recipe asks for it but the data has no prompts.
    """
    has_prompts = "prompt" in raw.column_names and isinstance(raw[0]["prompt"], str)
    if section.exact_match and not has_prompts:
        raise DataError(
            f"evaluation.exact_match=true needs prompt and completion columns; the held-out data "
            f"has {raw.column_names}. Leave evaluation.exact_match out."
        )
    if section.exact_match is None:
        return has_prompts and not any("\n" in text.strip() for text in raw["completion"])
    return section.exact_match
