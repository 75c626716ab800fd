"""A tiny model folder, data and recipe on disk: what a user would bring, in milliseconds a step."""

import json
from pathlib import Path

import yaml
from tiny import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz :"
SPECIAL = ["<pad>", "<s>", "</s>"]


def save_model_folder(folder: Path, **changes) -> Path:
    """An OLMoE of 2 layers and 6 experts with random weights, and a tokenizer of letters."""
    make_model("olmoe", **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; token ids as in tiny.make_config."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_examples(path: Path, count: int = 24, start: int = 0) -> Path:
    """Words and the same words backwards, as prompt and completion."""
    words = [f"{LETTERS[i % 26]}{LETTERS[i * 7 % 26]}{LETTERS[i * 3 % 26]}" for i in range(count)]
    records = [{"prompt": f"{word}:", "completion": f" {word[::-1]}"} for word in words[start:]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def save_recipe(folder: Path, **changes) -> Path:
    """A recipe of 12 steps with growth after steps 4, 6, 8 and 10; `changes` by section."""
    recipe = {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "adapter": dict(r_init=1, r_target=3, r_max=8, p_grow=0.5, grow_every=2, settle_steps=2),
        "training": dict(
            max_steps=12,
            warmup_steps=2,
            learning_rate=0.01,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_steps=6,
        ),
        "evaluation": dict(exact_match_examples=4, max_new_tokens=4),
    }
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(recipe.get(key), dict)
        recipe[key] = {**recipe[key], **value} if is_section else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def save_all(folder: Path, **changes) -> Path:
    """Model, data and recipe in `folder`; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model_folder(folder / "model")
    save_examples(folder / "train.jsonl")
    save_examples(folder / "eval.jsonl", count=30, start=24)
    return save_recipe(folder, **changes)
