"""A file of conversations as people have them, on five families, each with its own chat template.

From the recipe to an answer: what is learned, that it is learned and that ranks go where it is, and
that the run is talked to in the form that it was trained in.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import trl
from run_checks import losses
from tiny import make_class
from tiny_run import save_recipe
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import drlora
from drlora.cli.main import main
from drlora.embedded import model_folder
from drlora.runs.prompts import Prompt
from drlora.runs.recipe import load_recipe
from drlora.runs.speaker import load_speaker

SHIPPED = Path(trl.__file__).parent / "chat_templates"
# The published forms of the two that TRL does not ship, written anew.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
BARS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A model class, its template, the token that ends its sequences and its other special ones."""

    model: str
    template: str
    eos: str
    special: tuple[str, ...] = ()


def shipped(name: str) -> str:
    return (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


FAMILIES = {
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", shipped("qwen3"), "<|im_end|>", ("<|im_start|>",)),
    "GPT-OSS": Family(
        "GptOssForCausalLM",
        shipped("gptoss"),
        "<|return|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        shipped("deepseekv3"),
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
    ),
    "Mixtral": Family("MixtralForCausalLM", INST, "</s>"),
    "OLMoE": Family("OlmoeForCausalLM", BARS, "<|endoftext|>"),
}
ASKED = ("where", "when", "which", "why", "how", "who")
SAID = ("north", "noon", "seven", "rain", "slowly", "nobody")


def make_tokenizer(family: Family) -> PreTrainedTokenizerBase:
    """The tokenizer that comes along, with the family's special tokens and template."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.special]})
    tokenizer.add_special_tokens({"eos_token": family.eos})
    tokenizer.chat_template = family.template
    return tokenizer


def make_conversation(number: int) -> dict:
    """Three to five pairs of turns, in the columns of ultrachat_200k."""
    draw = random.Random(number)
    messages = []
    for turn in range(3 + number % 3):
        at = draw.randrange(len(ASKED))
        messages += [
            {"role": "user", "content": f"And {ASKED[at]} is it, in turn {turn} of {number}?"},
            {"role": "assistant", "content": f"It is {SAID[at]}, I think, so {SAID[at]}."},
        ]
    first = messages[0]["content"]
    return {"prompt": first, "prompt_id": f"{number:08x}", "messages": messages}


def save_run(folder: Path, family: Family) -> Path:
    """Model, conversations and recipe."""
    tokenizer = make_tokenizer(family)
    model = make_class(family.model, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, numbers in (("train", range(24)), ("eval", range(24, 30))):
        rows = [json.dumps(make_conversation(number)) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    training = dict(max_steps=16, learning_rate=0.03, save_strategy="no")
    return save_recipe(folder, training=training, evaluation=dict(max_new_tokens=8))


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_train_and_the_run_answers(tmp_path, name, capsys):
    family = FAMILIES[name]
    path = save_run(tmp_path, family)
    recipe = load_recipe(path)

    roles = drlora.look_at_data(recipe, 3).roles
    assert [role.examples for role in roles] == [24, 6]
    assert "conversations" in roles[0].said and not roles[0].dropped and not roles[0].truncated
    for example in roles[0].shown:
        check_parts(example.parts, family)

    told: list[str] = []
    result = drlora.train(recipe, progress=told.append)
    assert result.after.loss.loss < 0.8 * result.before.loss.loss
    logged = list(losses(tmp_path / "run").values())
    assert len(logged) == 16 and logged[-1] < 0.8 * logged[0]
    assert result.budget.spent == result.budget.stored
    ranks = [rank for of in result.ranks.values() for one in of.values() for rank in one]
    assert min(ranks) < 3 < max(ranks) <= 8  # each expert began with 1, and 3 is the mean

    # What the run is asked is how the same conversation began in training.
    run, seen = tmp_path / "run", roles[0].shown[0].parts
    speaker = load_speaker(run, {})
    assert speaker.tokenizer.chat_template == family.template
    asked = make_conversation(number_of(seen))
    prompt = Prompt(tuple(asked["messages"][:1]))
    text = speaker.tokenizer.decode(speaker.ids(prompt))
    opening = "<think>\n" if name == "DeepSeek-V3" else ""
    assert asked["prompt"] in text and text.endswith(opening)
    assert text_of(seen).startswith(text.removesuffix(opening))
    assert any(f"puts {opening!r} before its answer" in line for line in told) == bool(opening)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({**asked, "prompt": asked["messages"][:3]}))
    capsys.readouterr()
    words = ["generate", str(run), "--prompts", str(prompts), "--json", "max_new_tokens=12"]
    assert main(words) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert len(answer["prompt"]) == 3 and answer["text"].strip()


def text_of(parts) -> str:
    return "".join(part.text for part in parts)


def number_of(parts) -> int:
    """The conversation that an example was made of."""
    return int(re.search("turn 0 of ([0-9]+)", text_of(parts))[1])


def check_parts(parts, family: Family) -> None:
    """Learned is each of the assistant's turns with its end, and nothing else."""
    turns = [turn["content"] for turn in make_conversation(number_of(parts))["messages"][1::2]]
    trained = [part.text for part in parts if part.is_trained]
    assert len(trained) == len(turns)
    for text, turn in zip(trained, turns, strict=True):
        assert text.count(turn) == 1 and not any(word in text for word in ASKED)
        assert text.rstrip().endswith((family.eos, "<|end|>"))
