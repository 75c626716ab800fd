"""`drlora chat` and `drlora generate` on a terminal: lines, pieces, Ctrl-C, JSON.

Run: make test ARGS=tests/cli/test_talk.py
"""

import io
import json

import pytest
import torch
from tiny_run import make_tokenizer, save_all

from drlora.cli.main import main
from drlora.runs.speaker import Speaker, _Pieces

SHORT = ["training.max_steps=4", "training.warmup_steps=0", "adapter.r_init=3"]


@pytest.fixture(scope="module")
def folder(once):
    def make(folder):
        recipe = save_all(folder)
        assert main(["train", str(recipe), *SHORT, "training.learning_rate=0.1"]) == 0

    return once("talk", make)


@pytest.fixture
def typed(monkeypatch):
    """Puts lines on standard input."""
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("".join(lines)))


def test_a_chat(folder, typed, capsys):
    typed("abc:\n", "\n", "/what\n", "/reset\n", "abc:\n", "/exit\n", "abc:\n")
    assert main(["chat", str(folder / "run"), "max_new_tokens=6"]) == 0
    said = capsys.readouterr()
    one, other = said.out.strip("\n").split("\n")
    assert one == other and one  # the last line comes after the end
    assert "texts are continued" in said.err and "/what is not known" in said.err
    assert "cut after 6 tokens" in said.err and "adapter:" not in said.out


def test_both_sides(folder, typed, capsys):
    typed("abc:\n")
    words = ["chat", str(folder / "run"), "--compare", "max_new_tokens=6"]
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["adapter", "base"]
    typed("abc:\n", "b:\n")
    assert main([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["user"] for line in lines] == ["abc:", "b:"]
    assert shown == [f"adapter: {lines[0]['adapter']}", f"base: {lines[0]['base']}"]


def test_ctrl_c_stops_an_answer_and_then_the_chat(folder, typed, capsys, monkeypatch):
    answer, pressed = Speaker.answer, []

    def once(speaker, *arguments):
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        return answer(speaker, *arguments)

    monkeypatch.setattr(Speaker, "answer", once)
    typed("abc:\n", "b:\n")
    assert main(["chat", str(folder / "run"), "max_new_tokens=6"]) == 0
    said = capsys.readouterr()
    assert "stopped; the turn is forgotten" in said.err and len(said.out.splitlines()) == 1

    def press(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", press)
    assert main(["chat", str(folder / "run")]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_a_fault_in_a_chat_is_said_and_it_goes_on(folder, typed, capsys):
    typed("a" * 70 + "\n", "b:\n")
    assert main(["chat", str(folder / "run"), "max_new_tokens=6"]) == 0
    said = capsys.readouterr()
    assert "error: the prompt" in said.err and len(said.out.splitlines()) == 1


def test_prompts_of_a_file(folder, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "abc:", "completion": " cba"}\n{"prompt": "b:"}\n')
    words = ["generate", str(folder / "run"), "--prompts", str(prompts), "max_new_tokens=6"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] == "DRLORA" and len(found["answers"]) == 2
    assert found["answers"][0]["expected"] == "cba" and "base" not in found["answers"][0]
    assert main([*words, "--compare"]) == 0
    said = capsys.readouterr()
    names = [line.split(" ")[0] for line in said.out.splitlines() if line]
    assert names == ["prompt", "adapter", "base", "expected", "prompt", "adapter", "base"]
    assert found["answers"][0]["text"].strip() in said.out
    assert "max_new_tokens=6" in said.err and "texts are continued" in said.err
    assert main([*words[:4], "top_k=0.5"]) == 2
    assert "top_k=0.5 must be a whole number" in capsys.readouterr().err


def test_words_are_not_streamed_in_halves():
    """Pieces join to the answer, whatever the tokenizer does at their borders."""
    pieces = []
    stream, tokenizer = _Pieces(make_tokenizer(), pieces.append), make_tokenizer()
    ids = torch.tensor(tokenizer("ab cd e")["input_ids"])
    stream.put(ids[None, :2])  # the prompt
    for token in ids:
        stream.put(token[None])
    stream.end()
    assert pieces == ["ab ", "cd ", "e"]
