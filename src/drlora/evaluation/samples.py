"""A few answers of the model as it is, for people to read beside those that were wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from drlora.data import pad_token_id
from drlora.data.formats import where_of
from drlora.data.turns import ChatTemplate, conversation_of
from drlora.errors import DataError
from drlora.evaluation.evaluate import Sample, end_tokens, evaluating
from drlora.evaluation.prompts import encode_prompts, pad_left

SAMPLES = 10


def sample_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
) -> tuple[Sample, ...]:
    """The greedy answers to prompts, or to conversations without their last turn.

    Args:
        model: a transformers causal LM or a PEFT model of one.
        tokenizer: the model's, with a chat template if the rows are conversations.
        rows: with `prompt` and `completion`, texts or messages, or with `messages`; others have no
            answer and are left out.
        max_new_tokens: longest answer, in tokens.
    """
    asked = asked_of(rows, tokenizer)
    if not asked:
        return ()
    prompts = [one.ids for one in asked]
    ids_BL, mask_BL = pad_left(prompts, pad_token_id(tokenizer))
    device = next(model.parameters()).device
    with evaluating(model):
        output = model.generate(
            input_ids=ids_BL.to(device),
            attention_mask=mask_BL.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=end_tokens(model, tokenizer),
            pad_token_id=pad_token_id(tokenizer),
        )
    answers = [_text(row, tokenizer) for row in output[:, ids_BL.shape[1] :]]
    return tuple(
        Sample(one.shown, answer, (one.wanted,), answer == one.wanted)
        for one, answer in zip(asked, answers, strict=True)
    )


@dataclass(frozen=True)
class Asked:
    """What the model is asked: token ids, what is shown of it, and the answer that is wanted."""

    ids: list[int]
    shown: str
    wanted: str


def asked_of(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
    """The prompts of rows that ask for an answer, rendered as they are in training.

    Raises:
        DataError: a conversation cannot be put to the model.
    """
    found = (_asked(row, tokenizer) for row in rows)
    return [one for one in found if one is not None]


def _asked(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Asked | None:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        ids = encode_prompts([prompt], tokenizer)[0]
        return Asked(ids, prompt, completion.strip()) if prompt else None
    if not row.get("messages") and (not prompt or not completion):
        return None
    whole = conversation_of(row, where_of(row))
    asked = whole.asked or len(whole.turns) - 1
    if not asked or whole.turns[-1]["role"] != "assistant":
        return None
    try:
        (ids,) = ChatTemplate(tokenizer, is_marked=False).asked([whole.until(asked)])
    except DataError as error:
        raise DataError(
            f"{where_of(row)}: the chat template cannot ask it: {error}. To have no sample "
            f"answers: evaluation.samples: 0"
        ) from error
    return Asked(ids, _content(whole.turns[asked - 1]), _content(whole.turns[-1]))


def _content(turn: Mapping[str, Any]) -> str:
    return str(turn["content"]).strip()


def _text(row: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(row.tolist(), skip_special_tokens=True)).strip()
