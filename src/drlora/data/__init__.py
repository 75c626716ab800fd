"""Training and evaluation data: from a hub name, a file or an embedded task to padded batches.

>>> examples = load_examples("embedded:pronunciation", split="train")
>>> encoded = encode_examples(examples, tokenizer, max_length=64)
>>> batch = Collator(tokenizer)([encoded.dataset[0], encoded.dataset[1]])
"""

from drlora.data.encode import (
    Collator,
    EncodedData,
    encode_completions,
    encode_examples,
    encode_prompts,
    pad_token_id,
)
from drlora.data.layout import Layout, check_record, choose_layout
from drlora.data.load import load_examples

__all__ = [
    "Collator",
    "EncodedData",
    "Layout",
    "check_record",
    "choose_layout",
    "encode_completions",
    "encode_examples",
    "encode_prompts",
    "load_examples",
    "pad_token_id",
]
