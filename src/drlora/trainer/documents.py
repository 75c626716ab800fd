"""Documents of one row attend apart, as the examples of a batch do: on a CPU, for less.

A packed row, or a batch without padding, is one long sequence whose positions begin again with each
document. PyTorch's attention with a mask computes every pair of tokens of it, of two documents too,
and throws those away; so a CPU loses by long rows what it wins by the padding that is saved. Here
the documents are laid beside each other as rows of a batch, filled up to the longest of them. The
filler lies behind a document and attention looks back only, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

NAME = "sdpa_of_documents"
PLAIN = "sdpa"


def attend_apart(
    module: Any,
    query_1HLD: Tensor,
    key_1GLD: Tensor,
    value_1GLD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, of a row of documents.

    Args:
        module: the attention layer.
        query_1HLD, key_1GLD, value_1GLD: of one row of L tokens.
        attention_mask: none.
        position_ids: (1, L), which are 0 where a document begins.
        sliding_window: how many tokens a token looks back at, itself among them.
        is_causal: passed over; it always is.
        settings: others of transformers' sdpa (dropout, scaling).

    Returns:
        (1, L, H, D), and None in place of weights.
    """
    assert attention_mask is None and position_ids is not None and position_ids.shape[0] == 1
    length = query_1HLD.shape[2]
    starts_N = (position_ids[0] == 0).nonzero().flatten()
    lengths_N = torch.cat([starts_N[1:], starts_N.new_tensor([length])]) - starts_N
    at_T = torch.arange(int(lengths_N.max()), device=starts_N.device)
    is_token_NT = at_T < lengths_N[:, None]
    index_NT = (starts_N[:, None] + at_T).clamp_(max=length - 1)

    def beside(x_1HLD: Tensor) -> Tensor:
        """(N, H, T, D), a document a row."""
        return (
            x_1HLD[0].index_select(1, index_NT.flatten()).unflatten(1, index_NT.shape).movedim(1, 0)
        )

    band_TT = None
    if sliding_window is not None and sliding_window < len(at_T):
        back_TT = at_T[:, None] - at_T
        band_TT = ((back_TT >= 0) & (back_TT < sliding_window))[None, None]
    output_NTHD, _ = sdpa_attention_forward(
        module,
        beside(query_1HLD),
        beside(key_1GLD),
        beside(value_1GLD),
        band_TT,
        is_causal=band_TT is None,
        **settings,
    )
    return output_NTHD[is_token_NT][None], None


AttentionInterface.register(NAME, attend_apart)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def apart(model: PeftModel) -> Iterator[None]:
    """While it lasts, each call of the model is one of a row of documents."""
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def can_attend_apart(model: PeftModel, collator: Any) -> bool:
    """Whether the model, on a CPU, says the same of documents that attend apart.

    It is tried on three short ones, without the adapter: some models hand no positions to their
    attention, or do something else there.

    Args:
        model: with an adapter.
        collator: of the trainer; makes a row of examples.
    """
    base: Any = model.get_base_model()
    if base.device.type != "cpu" or base.config.get_text_config()._attn_implementation != PLAIN:
        return False
    size = model.get_input_embeddings().weight.shape[0]
    if size == 0:
        return False
    tokens = torch.arange(19) * 7 % max(1, size)
    examples = [
        {"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in tokens.split([4, 9, 6])
    ]
    batch = {name: value for name, value in collator(examples).items() if name != "labels"}
    if "position_ids" not in batch:
        return False

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            wanted = model(**batch, use_cache=False).logits.float()
            with apart(model):
                found = model(**batch, use_cache=False).logits.float()
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(was_training)
    allowed = 1e-4 if base.dtype == torch.float32 else 0.05
    return bool((found - wanted).norm() <= allowed * wanted.norm())
