"""A tokenizer with one token a byte, and what of an encoded example has loss."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    chat_template: str | None = None, pattern: str = "$A"
) -> PreTrainedTokenizerFast:
    """One token a byte, `</s>` to end, no padding token; `pattern` is put around a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<s>"])
    special = [("</s>", 256), ("<s>", 257)]
    backend.post_processor = processors.TemplateProcessing(pattern, None, special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def split_text(tokenizer, row) -> tuple[str, str]:
    """What is read without loss, and what has loss, as text."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    without = tokenizer.decode([token for token, label in pairs if label == -100])
    return without, tokenizer.decode([token for token, label in pairs if label != -100])
