"""Training and evaluation data: from a hub name, a file or an embedded task to padded batches.

>>> examples = load_examples("embedded:pronunciation", split="train")
>>> encoded = encode_examples(examples, tokenizer, max_length=64)
>>> batch = Collator(tokenizer)([encoded.tokens[0], encoded.tokens[1]])
"""

from drlora.data.collate import Collator, pad_token_id
from drlora.data.files import load_examples
from drlora.data.tokens import (
    Prepared,
    encode_completions,
    encode_examples,
    encode_prompts,
    prepare,
)

__all__ = [
    "Collator",
    "Prepared",
    "encode_completions",
    "encode_examples",
    "encode_prompts",
    "load_examples",
    "pad_token_id",
    "prepare",
]
