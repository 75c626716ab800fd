"""Evaluate a causal language model: loss on target tokens, and answers against the right ones.

    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)  # of TRL
    result = evaluate_loss(model, prepared.tokens, collator, batch_size=8)
    match = exact_match(model, tokenizer, load_examples("embedded:definitions", split="test"), 32,
                        max_new_tokens=12)

Neither changes the model's mode, its gradients or the tokenizer's settings.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from drlora.data import pad_token_id
from drlora.errors import ConfigError, DataError
from drlora.evaluation.choices import choose, summed_losses
from drlora.evaluation.prompts import encode_prompts, pad_left

IGNORED = -100
SAMPLES_KEPT = 10


class Rows(Protocol):
    """A list of records or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class LossResult:
    """Mean negative log-likelihood of the target tokens (nats), its exponential, their number.

    `example_nats` is the sum over the target tokens of each example, `examples` their number.
    """

    loss: float
    perplexity: float
    target_tokens: int
    example_nats: tuple[float, ...] = field(default=(), compare=False, repr=False)
    examples: int = 0


@dataclass(frozen=True)
class Sample:
    """What was asked, what the model wrote (stripped), and what would have been right."""

    prompt: str
    prediction: str
    answers: tuple[str, ...]
    is_correct: bool


@dataclass(frozen=True)
class MatchResult:
    """Share of examples answered exactly (0 to 1), the counts behind it, the first few samples.

    `error_rate` is the word error rate: the edits (word inserted, left out or exchanged) that make
    each generated answer the nearest accepted one, over the words of those. It is None where every
    answer is one word, which is right or wrong, and where answers are chosen. `is_correct` says it
    of each example.
    """

    accuracy: float
    correct: int
    total: int
    samples: tuple[Sample, ...]
    error_rate: float | None = None
    is_correct: tuple[bool, ...] = field(default=(), compare=False, repr=False)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each submodule is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def evaluate_loss(
    model: torch.nn.Module,
    dataset: Rows,
    collator: Callable[[Sequence[Any]], Mapping[str, torch.Tensor]],
    batch_size: int,
) -> LossResult:
    """Loss over all target tokens of `dataset`, each weighing the same.

    It does not depend on `batch_size` or padding, and holds no router loss.

    Args:
        model: a causal LM, called with input_ids (B, L) and attention_mask (B, L).
        dataset: encoded examples.
        collator: makes a batch of int64 tensors (B, L) of a list of them; labels are -100 where
            there is no loss.
        batch_size: examples a forward pass.

    Raises:
        ConfigError: `batch_size` is below 1.
        DataError: there is no target token.
    """
    nats: list[float] = []
    target_tokens = 0
    with evaluating(model):
        for features in _batches(dataset, len(dataset), batch_size):
            batch = collator(features)
            nats += summed_losses(model, batch).tolist()
            target_tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    if target_tokens == 0:
        raise DataError("the evaluation data has no target token; see that it has completions")
    loss = math.fsum(nats) / target_tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return LossResult(loss, perplexity, target_tokens, tuple(nats), len(nats))


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batches(rows: Rows, count: int, batch_size: int) -> Iterator[list[Any]]:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    for start in range(0, count, batch_size):
        yield [rows[index] for index in range(start, min(start + batch_size, count))]


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Rows,
    batch_size: int,
    max_new_tokens: int,
    limit: int | None = None,
) -> MatchResult:
    """Share of `examples` whose answer is exactly one of the accepted answers.

    The answer is the greedy continuation up to the end-of-sequence token or the first newline,
    stripped, as are the accepted ones; prompts are padded on the left. Where an example has
    `choices`, it is the choice of least loss (`drlora.evaluation.choices.choose`) instead.

    Args:
        model: a transformers causal LM or a PEFT model of one.
        tokenizer: the model's tokenizer.
        examples: records with `prompt` and `answers`, or with `completion` where there are none;
            all or none of them with `choices`.
        batch_size: examples generated at once.
        max_new_tokens: longest continuation, in tokens.
        limit: evaluate only so many examples, from the front.

    Raises:
        ConfigError: `batch_size`, `max_new_tokens` or `limit` is below 1.
        DataError: there is no example, or one without a prompt or an answer on a single line.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    total = len(examples) if limit is None else min(limit, len(examples))
    if total == 0:
        raise DataError("no examples to evaluate")
    samples: list[Sample] = []
    with evaluating(model):
        for batch in _batches(examples, total, batch_size):
            samples += _answer(model, tokenizer, batch, max_new_tokens)
    is_correct = tuple(sample.is_correct for sample in samples)
    correct = sum(is_correct)
    error_rate = None if examples[0].get("choices") else word_error_rate(samples)
    kept = tuple(samples[:SAMPLES_KEPT])
    return MatchResult(correct / total, correct, total, kept, error_rate, is_correct)


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Any], max_new_tokens: int
) -> Iterator[Sample]:
    answers = [accepted_answers(example) for example in batch]
    prompts = [example["prompt"] for example in batch]
    if batch[0].get("choices"):
        predictions = choose(model, tokenizer, batch, len(batch))
    else:
        predictions = _generate(model, tokenizer, prompts, max_new_tokens)
    for prompt, prediction, accepted in zip(prompts, predictions, answers, strict=True):
        yield Sample(prompt, prediction, accepted, prediction in accepted)


def accepted_answers(example: Mapping[str, Any]) -> tuple[str, ...]:
    """What counts as right, stripped.

    Raises:
        DataError: if the example has no prompt, or no answer on a single line.
    """
    answers = example.get("answers") or [example.get("completion")]
    if not isinstance(example.get("prompt"), str) or not all(isinstance(a, str) for a in answers):
        raise DataError(
            f"exact match needs a prompt, and answers or a completion; found are {sorted(example)}"
        )
    stripped = tuple(answer.strip() for answer in answers)
    if any("\n" in answer for answer in stripped):
        raise DataError(
            f"exact match compares one line, but an answer to {example['prompt']!r} has several; "
            f"use the loss for such data"
        )
    return stripped


def word_error_rate(samples: Sequence[Sample]) -> float | None:
    """Edits over words, each sample against its nearest answer; None if all answers are one word.

    For phones written apart, as `JH AH JH`, it is the phone error rate.
    """
    if all(len(answer.split()) <= 1 for sample in samples for answer in sample.answers):
        return None
    edits = words = 0
    for sample in samples:
        nearest = min(sample.answers, key=lambda answer: _errors(sample.prediction, answer))
        edits += edit_distance(sample.prediction.split(), nearest.split())
        words += len(nearest.split())
    return edits / max(words, 1)


def _errors(prediction: str, answer: str) -> float:
    return edit_distance(prediction.split(), answer.split()) / max(len(answer.split()), 1)


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Levenshtein distance: fewest items inserted, left out or exchanged to make one the other."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """The first line that the model writes after each prompt, stripped."""
    pad, ends = pad_token_id(tokenizer), end_tokens(model, tokenizer)
    input_ids_BL, mask_BL = pad_left(encode_prompts(prompts, tokenizer), pad)
    length = input_ids_BL.shape[1]
    output = model.generate(
        input_ids=input_ids_BL.to(_device(model)),
        attention_mask=mask_BL.to(_device(model)),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([_NewlineStop(tokenizer)]),
    )
    return [_first_line(row[length:].tolist(), ends, tokenizer) for row in output]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence ids of the tokenizer and of the model, which may have several."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


def _first_line(ids: list[int], ends: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    stop = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(
        ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text.partition("\n")[0].strip()


class _NewlineStop(StoppingCriteria):
    """Ends each sequence at the first token with a newline in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.BoolTensor:
        """True for each of the B sequences (B, L) whose last token has a newline."""
        ended = ["\n" in self._tokenizer.decode([token]) for token in input_ids[:, -1].tolist()]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]
