"""Training and evaluation data: from a hub name, a file or an embedded task to tokens and labels.

>>> examples = load_examples("embedded:pronunciation", split="train")
>>> encoded = encode_examples(examples, tokenizer, max_length=64)
>>> collator = DataCollatorForLanguageModeling(pad_token_id(tokenizer))  # of TRL
>>> batch = collator([encoded.tokens[0], encoded.tokens[1]])
"""

from drlora.data.files import Loaded, load_examples
from drlora.data.texts import encode_completions, pad_token_id
from drlora.data.tokens import Prepared, encode_examples, prepare

__all__ = [
    "Loaded",
    "Prepared",
    "encode_completions",
    "encode_examples",
    "load_examples",
    "pad_token_id",
    "prepare",
]
