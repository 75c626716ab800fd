"""What the examples share: arguments, a model, the embedded task.

Without `--tiny` the model is the pretrained one inside the package; with it, a random OLMoE that
learns nothing useful but takes milliseconds a step. Both work without a network.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import drlora
from drlora.data import encode_examples, load_examples
from drlora.embedded import model_folder

TASK, MAX_LENGTH, BATCH = "embedded:pronunciation", 64, 8


def parse_arguments(name: str) -> argparse.Namespace:
    """`--tiny`, `--steps` and `--out`."""
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--tiny", action="store_true", help="a random model instead of the real")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps (at least 12)")
    parser.add_argument("--out", default=f"runs/example-{name}", help="folder for the adapter")
    arguments = parser.parse_args()
    if arguments.steps < 12:
        parser.error(f"--steps {arguments.steps} leaves no room for growth; give at least 12")
    return arguments


def load_base(tiny: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without an adapter, and its tokenizer."""
    torch.manual_seed(0)
    if not tiny:
        folder = model_folder()
        # Stored in bfloat16; processors are faster in float32.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder)
    tokenizer = character_tokenizer()
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return OlmoeForCausalLM(config), tokenizer


def character_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each printable ASCII character."""
    tokens = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def adapter_settings(steps: int) -> drlora.DrLoraConfig:
    """Ranks from 2 to 4 on average, grown in about five events within `steps` optimizer steps."""
    return drlora.DrLoraConfig(
        r_init=2,
        r_target=4,
        r_max=8,
        p_grow=0.5,
        warmup_steps=steps // 10,
        grow_every=steps // 6,
        settle_steps=steps // 10,
    )


def add_adapter(base: PreTrainedModel, steps: int) -> PeftModel:
    """The model with an adapter; TRL's trainers do this themselves, given the settings."""
    return get_peft_model(base, adapter_settings(steps))


def load_data(tokenizer: PreTrainedTokenizerBase, steps: int) -> Dataset:
    """As much of the embedded task as `steps` batches take; the loss is on the completions."""
    examples = load_examples(TASK, split=f"train[:{BATCH * steps}]")
    return encode_examples(examples, tokenizer, MAX_LENGTH).tokens


def load_pairs(steps: int) -> Dataset:
    """The same as text, in the columns `prompt` and `completion`."""
    examples = load_examples(TASK, split=f"train[:{BATCH * steps}]")
    return examples.select_columns(["prompt", "completion"])


def print_ranks(dynamics: drlora.RankDynamics | None) -> None:
    """Rank of each expert, layer by layer, and the budget."""
    assert dynamics is not None, "nothing was trained"
    for block, ranks in dynamics.ranks().items():
        print(block, *next(iter(ranks.values())))
    print("budget: {} of {} ranks".format(*dynamics.budget()))
