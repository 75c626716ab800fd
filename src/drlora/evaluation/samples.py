"""A few answers of the model as it is, for people to read beside those that were wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from drlora.data import pad_token_id
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
    asked = [found for row in rows if (found := _asked(row)) is not None]
    if not asked:
        return ()
    prompts = [_tokens(prompt, row, tokenizer) for prompt, _, row in asked]
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
    parts = zip(asked, answers, strict=True)
    return tuple(
        Sample(_shown(prompt), answer, (wanted,), answer == wanted)
        for (prompt, wanted, _), answer in parts
    )


def _asked(row: Mapping[str, Any]) -> tuple[Any, str, Mapping[str, Any]] | None:
    """(prompt: a text or messages, the wanted answer, the row), if it asks for an answer."""
    if row.get("messages"):
        *before, last = row["messages"]
        has_answer = last.get("role") == "assistant" and before
        return (before, _content(last), row) if has_answer else None
    prompt, completion = row.get("prompt"), row.get("completion")
    if not prompt or completion is None:
        return None
    is_text = isinstance(completion, str)
    return prompt, completion.strip() if is_text else _content(completion[-1]), row


def _content(turn: Mapping[str, Any]) -> str:
    return str(turn.get("content") or "").strip()


def _tokens(prompt: Any, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt, str):
        return encode_prompts([prompt], tokenizer)[0]
    turns = [{k: v for k, v in turn.items() if v is not None} for turn in prompt]
    tools = row.get("tools") or None
    given: Any = tokenizer.apply_chat_template(
        turns, tools=tools, add_generation_prompt=True, return_dict=True
    )
    return list(given["input_ids"])


def _text(row: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(row.tolist(), skip_special_tokens=True)).strip()


def _shown(prompt: Any) -> str:
    """What was asked last, of a conversation."""
    return prompt if isinstance(prompt, str) else _content(prompt[-1])
