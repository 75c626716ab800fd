"""Answers that are kept for people to read, where none are compared."""

from __future__ import annotations

import json

import pytest
from tiny_run import save_all, save_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from drlora.cli.main import main
from drlora.errors import DataError
from drlora.evaluation.samples import asked_of, sample_answers
from drlora.runs.prompts import as_prompt
from drlora.runs.speaker import load_speaker

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


def test_a_prompt_is_rendered_as_in_training(tmp_path, monkeypatch):
    """Tools and arguments as texts, settings of the template; what it refuses is told early."""
    folder = save_model_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.name }}{% endfor %}{{ style }}{% for m in messages %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{% for k in c.function.arguments.keys() %}"
        "{{ k }}{% endfor %}{% endfor %}:{% endfor %}"
    )
    call = {"function": {"name": "f", "arguments": '{"xy": 1}'}}
    talk = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    more = {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"style": "z"}}
    (asked,) = asked_of([{"messages": talk, **more}], tokenizer)
    assert tokenizer.decode(asked.ids) == "fzab:xy:c:"
    assert (asked.shown, asked.wanted) == ("c", "d")
    prompt = as_prompt({"messages": talk, **more}, "it")
    speaker = load_speaker(folder, {})
    speaker.tokenizer.chat_template = tokenizer.chat_template
    assert speaker.ids(prompt) == asked.ids and prompt.expected == "d"
    tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    with pytest.raises(DataError, match="line 3: .*no tools here.*evaluation.samples: 0"):
        asked_of([{"messages": talk, "line": 3}], tokenizer)


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
