"""Answer by choice: of the completions an example offers, the one the model finds likeliest.

Used by `drlora.evaluation.evaluate.exact_match` where examples have `choices`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from drlora.data import encode_completions, pad_token_id
from drlora.errors import DataError
from drlora.evaluation.head import IGNORED, has_plain_head, losses_at_targets


def choose(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> list[str]:
    """For each example the choice of least loss, stripped.

    A choice's loss is the sum over its tokens and the end-of-sequence token after it, which is what
    training makes small; it is not divided by the length. The first of equal ones wins.

    Args:
        model: a causal LM in evaluation mode, called with input_ids (B, L) and attention_mask.
        tokenizer: the model's tokenizer.
        examples: records with `prompt` and `choices`; a choice is written as a completion is.
        batch_size: choices a forward pass.

    Raises:
        DataError: an example has fewer than two choices.
    """
    rows = []
    for example in examples:
        refuse_single_choice(example)
        prompts = [example["prompt"]] * len(example["choices"])
        encoded = encode_completions(prompts, example["choices"], tokenizer)
        rows += [{"input_ids": ids, "labels": labels} for ids, labels in encoded]
    collator = DataCollatorForLanguageModeling(pad_token_id(tokenizer))
    nats = torch.cat(
        [
            summed_losses(model, collator(rows[start : start + batch_size]))
            for start in range(0, len(rows), batch_size)
        ]
    )
    by_example = nats.split([len(example["choices"]) for example in examples])
    return [
        example["choices"][int(losses.argmin())].strip()
        for example, losses in zip(examples, by_example, strict=True)
    ]


def refuse_single_choice(example: Mapping[str, Any]) -> None:
    """Raises:
    DataError: if the example has fewer than two choices.
    """
    if len(example.get("choices") or ()) < 2:
        raise DataError(
            f"{example['prompt']!r} has the choices {example.get('choices')!r}; give every "
            f"example two or more, or none to any"
        )


def summed_losses(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Loss (nats) of each of B rows, summed over its target tokens, float64 (B,) on the CPU."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    targets_BL = batch["labels"][:, 1:]
    is_target_BL = targets_BL != IGNORED
    losses_N = _target_losses(model, batch["labels"], inputs)
    losses_BL = torch.zeros(targets_BL.shape, dtype=torch.float64)
    losses_BL[is_target_BL] = losses_N.cpu().double()
    return losses_BL.sum(dim=1)


def _target_losses(
    model: Any, labels_BL: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Of each target token, float32, in the order of the positions."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if has_plain_head(base):
        return losses_at_targets(base, labels_BL, **inputs)
    logits_BLV = model(**inputs, use_cache=False).logits
    targets_BL = labels_BL[:, 1:].to(logits_BLV.device)
    is_target_BL = targets_BL != IGNORED
    return F.cross_entropy(
        logits_BLV[:, :-1][is_target_BL].float(), targets_BL[is_target_BL], reduction="none"
    )
