"""Answers that are kept for people to read, where none are compared."""

from __future__ import annotations

import json

from tiny_run import save_all, save_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from drlora.cli.main import main
from drlora.evaluation.samples import sample_answers

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)


def test_each_prompt_has_the_answer_that_it_has_alone(tmp_path):
    """Texts, messages of a prompt and conversations; what asks for no answer is left out."""
    folder = save_model_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    asked, said = {"role": "user", "content": "abc"}, {"role": "assistant", "content": "cba"}
    rows = [
        {"prompt": "abc:", "completion": "cba\ncba"},
        {"messages": [asked, said]},
        {"prompt": [asked], "completion": [said]},
        {"prompt": "xyzab:", "completion": "a"},
        {"messages": [asked]},
        {"text": "abc"},
    ]
    found = sample_answers(model, tokenizer, rows, 6)
    assert [s.prompt for s in found] == ["abc:", "abc", "abc", "xyzab:"]
    assert [s.answers for s in found] == [("cba\ncba",), ("cba",), ("cba",), ("a",)]
    # The template writes the same text as the first prompt.
    assert found[0].prediction == found[1].prediction == found[2].prediction
    for row, sample in zip(rows, found, strict=False):
        (alone,) = sample_answers(model, tokenizer, [row], 6)
        assert alone == sample
    assert sample_answers(model, tokenizer, rows[-2:], 6) == ()


def test_a_run_keeps_ten_from_before_and_after(tmp_path):
    recipe = save_all(tmp_path, training=dict(max_steps=30, learning_rate=0.03))
    lines = [{"prompt": f"{c}b:", "completion": f" b\n{c}"} for c in "abcdefghijkl"]
    for name in ("train", "eval"):
        rows = [{**one, "prompt": name[0] + one["prompt"]} for one in lines]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["train", str(recipe)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    before, after = result["before"]["samples"], result["after"]["samples"]
    assert len(before) == len(after) == 10 and before != after
    assert [s["prompt"] for s in before] == [s["prompt"] for s in after]
    assert before[0]["answers"] == ["b\na"]
    assert main(["train", str(recipe), "--overwrite", "evaluation.samples=0"]) == 0
    assert "samples" not in json.loads((tmp_path / "run" / "result.json").read_text())["after"]
