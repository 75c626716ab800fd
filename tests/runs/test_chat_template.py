"""A recipe's own chat template and end token: used for the tokens, and saved with the adapter."""

from __future__ import annotations

import json

import pytest
from tiny_run import make_tokenizer, save_all
from transformers import AutoTokenizer

from drlora.cli.main import main

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)


@pytest.fixture
def recipe(tmp_path):
    """Of conversations; the model's tokenizer has no template for them."""
    path = save_all(tmp_path, training=dict(max_steps=8, save_steps=8))
    for name, letters in (("train", "abcdefgh"), ("eval", "uvwx")):
        rows = [
            {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c * 3}]}
            for c in letters
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_file_and_a_tokenizer_give_the_same_run(recipe, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    other = make_tokenizer()
    other.chat_template = TEMPLATE
    other.save_pretrained(tmp_path / "other")
    for name, source in (("file", "own.jinja"), ("folder", "other")):
        words = [f"chat_template={tmp_path / source}", f"output_dir={tmp_path / name}"]
        assert main(["train", str(recipe), *words]) == 0
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == TEMPLATE
    adapters = [
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("file", "folder")
    ]
    assert adapters[0] == adapters[1]
    assert main(["eval", str(tmp_path / "file")]) == 0, "with the template that was saved"
    result = json.loads((tmp_path / "file" / "result.json").read_text())
    assert result["after"]["loss"]["target_tokens"] == 4 * 4


def test_the_end_token_is_the_recipes(recipe, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    words = [f"chat_template={tmp_path / 'own.jinja'}", "training.eos_token=z"]
    assert main(["train", str(recipe), *words]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "z"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat_template=missing.jinja"], "missing.jinja"),
        (["chat_template=MODEL"], "has no chat template"),
        (["training.eos_token=<none>"], "is no token of"),
        ([], "chat template"),
    ],
)
def test_what_is_not_there_is_refused(recipe, tmp_path, capsys, words, said):
    words = [word.replace("MODEL", str(tmp_path / "model")) for word in words]
    assert main(["train", str(recipe), *words, "--dry-run"]) == 2
    assert said in capsys.readouterr().err
