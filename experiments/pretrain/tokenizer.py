"""Train the byte-level BPE of the small model on the corpus.

    python experiments/pretrain/tokenizer.py

At hidden size 128 the output head costs `2 * 128 * vocabulary` operations a token, as much as the
experts of all layers together once the vocabulary reaches 4,608. 4,096 words keep it below that,
for texts about a tenth longer than 8,192 words would make them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CACHE = Path(".cache/pretrain")
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
MODEL_MAX_LENGTH = 512
# The role tokens are never seen in pretraining: fine-tuning on `messages` gives them their meaning.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def training_texts(cache: Path, every: int) -> Iterator[str]:
    """Every n-th training document."""
    with (cache / "documents.jsonl").open() as file:
        for number, line in enumerate(file):
            if number % every == 0 and (document := json.loads(line))["split"] == "train":
                yield document["text"]


def train(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer that puts BOS before a text; single digits are tokens of their own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--every", type=int, default=2, help="train on every n-th document")
    arguments = parser.parse_args()
    tokenizer = train(training_texts(arguments.cache, arguments.every), arguments.vocabulary)
    tokenizer.save_pretrained(arguments.cache / "tokenizer")
    print(f"{len(tokenizer)} tokens in {arguments.cache / 'tokenizer'}")


if __name__ == "__main__":
    main()
