"""Learning from preferences: TRL's DPOTrainer and KTOTrainer.

The reference that they hold the policy to is the base model with the adapter switched off, which
costs no memory; where a run continues a trained adapter, it is that adapter as it was.
Data are tokenized by TRL's own methods before there is a model, so that a dry run knows how many
examples are left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer, KTOTrainer
from trl.data_utils import maybe_extract_prompt

from drlora.errors import DataError
from drlora.ranks.probe import Loss
from drlora.trainer.trainer import RunTrainer

REFERENCE = "ref"  # TRL's name of the frozen copy of an adapter
PROMPT, ANSWERS = "prompt_ids", ("chosen_ids", "rejected_ids", "completion_ids")
IGNORED = -100


class PreferenceTrainer(RunTrainer):
    """What DPO and KTO share in a run; its data are token ids already.

    Args:
        continues: whether the adapter was trained before, so that it is the reference.
    """

    def __init__(self, *args: Any, continues: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not continues and REFERENCE in self._adapted.peft_config:
            self._adapted.delete_adapter(REFERENCE)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """The data as they are: `tokenize` has been at them."""
        return dataset

    def measure(self) -> dict[str, float]:
        """The objective's loss on the held-out data, and TRL's other figures, by their names."""
        kept = cast(Any, self)._metrics["eval"]
        kept.clear()
        loader = self.get_eval_dataloader()
        found = self.evaluation_loop(loader, "measuring", prediction_loss_only=True).metrics or {}
        figures = {name: sum(of) / len(of) for name, of in kept.items() if of}
        kept.clear()
        figures.pop("num_tokens", None)
        return {"loss": found["eval_loss"], **figures}

    @property
    def places_by(self) -> Loss | None:
        """The objective's own loss."""
        return self._loss_of

    def _loss_of(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The objective's loss of a batch, of which nothing is left in what TRL logs."""
        trainer = cast(Any, self)
        kept = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
        try:
            return trainer.compute_loss(model, batch)
        finally:
            trainer._metrics, trainer._total_train_tokens = kept


class DpoTrainer(PreferenceTrainer, DPOTrainer):
    """TRL's DPOTrainer as `drlora train` uses it."""


class KtoTrainer(PreferenceTrainer, KTOTrainer):
    """TRL's KTOTrainer as `drlora train` uses it."""


def tokenize(
    kind: Any,
    raw: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Any,
    role: str,
) -> tuple[Dataset, int]:
    """Token ids of preference pairs, or of answers with a verdict, as TRL makes them.

    Args:
        kind: DPOTrainer or KTOTrainer.
        raw: columns chosen and rejected (and prompt), or prompt, completion and label; texts or
            messages.
        tokenizer: of the model.
        arguments: the trainer's config.
        role: `train` or `eval`.

    Returns:
        Columns prompt_ids, and chosen_ids and rejected_ids, or completion_ids and label; and how
        many of the examples lose their end at `max_length`.

    Raises:
        DataError: if no example is left, because all prompts are longer than `max_length`.
    """
    maker = object.__new__(kind)  # no model is needed for this, and a dry run has none
    maker._tokenizer = tokenizer
    maker.calculate_KL = getattr(arguments, "loss_type", "") == "kto"
    maker.desirable_weight = getattr(arguments, "desirable_weight", 1.0)
    maker.undesirable_weight = getattr(arguments, "undesirable_weight", 1.0)
    tokens = kind._prepare_dataset(maker, raw, tokenizer, arguments, role)
    if len(tokens) == 0:
        raise DataError(
            f"all {len(raw)} examples have prompts of max_length={arguments.max_length} tokens or "
            f"more, so no answer is left; raise data.max_length."
        )
    most = arguments.max_length or math.inf
    return tokens, sum(length > most for length in lengths(tokens))


def lengths(tokens: Dataset) -> list[int]:
    """Tokens of each example: its prompt and the longer of its answers."""
    answers = [tokens[name] for name in ANSWERS if name in tokens.column_names]
    rows = zip(tokens[PROMPT], *answers, strict=True)
    return [len(prompt) + max(map(len, of)) for prompt, *of in rows]


def wanted(raw: Dataset) -> Dataset:
    """Of preferences the answers that are to be preferred, as prompt and completion; else `raw`.

    Raises:
        DataError: if no answer is good.
    """
    if "chosen" in raw.column_names:
        if "prompt" not in raw.column_names:
            raw = raw.map(maybe_extract_prompt)
        return raw.rename_column("chosen", "completion").remove_columns("rejected")
    if "label" not in raw.column_names:
        return raw
    good = raw.filter(lambda row: row["label"])
    if len(good) == 0:
        raise DataError(
            f"none of {len(raw)} held-out examples has a good answer (label: true), so there is "
            f"nothing to measure; add some, or name other data as data.eval."
        )
    return good


def wanted_answers(raw: Dataset, tokens: Dataset, max_length: int) -> tuple[Dataset, Dataset]:
    """The answers that are to be preferred, as examples of a completion.

    What a preference run is measured on beside its own loss: whether the model still writes what
    is wanted.

    Returns:
        (columns prompt and completion, and the others of `raw`; columns input_ids and labels). The
        first has all examples, the second those with a token of the answer within `max_length`.

    Raises:
        DataError: if there is none.
    """
    rows = wanted(raw)
    answers = "chosen_ids" if "chosen" in raw.column_names else "completion_ids"
    if answers == "completion_ids":
        tokens = tokens.filter(lambda row: row["label"])
        if len(tokens) == 0:
            raise DataError(
                f"no good answer (label: true) of the held-out data has a token within "
                f"max_length={max_length}; raise data.max_length, or name other data as data.eval."
            )

    def labelled(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = row[PROMPT], row[answers]
        return {
            "input_ids": [*prompt, *answer][:max_length],
            "labels": [*[IGNORED] * len(prompt), *answer][:max_length],
        }

    return rows, tokens.map(labelled, remove_columns=tokens.column_names)
