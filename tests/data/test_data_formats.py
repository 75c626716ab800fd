"""The forms of an example: recognised by columns, said, and used whole or refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from byte_tokens import byte_tokenizer, split_text

from drlora.data import encode_examples, load_examples
from drlora.data.files import load_placed
from drlora.errors import ConfigError, DataError
from drlora.runs.data_section import DataSection

CHAT = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}({{ k }}={{ v }}){% endfor %}{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows: object) -> str:
        path = Path(tmp_path / "data.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


def trained(path: str, **options) -> list[tuple[str, str]]:
    tokenizer = byte_tokenizer(CHAT)
    rows = encode_examples(load_placed(path, **options), tokenizer, 1000).tokens
    return [split_text(tokenizer, row) for row in rows]


def test_sharegpt(write):
    def turns(*said):
        return [{"from": who, "value": text} for who, text in said]

    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    path = write(
        {"id": "0", "conversations": turns(("system", "s"), ("human", "q"), ("gpt", "a"))},
        {
            "id": "1",
            "conversations": turns(
                ("human", "q"), ("function_call", call), ("observation", "o"), ("gpt", "b")
            ),
        },
    )
    assert load_placed(path).said == "read as ShareGPT conversations: 2"
    assert trained(path) == [
        ("<system>s</s><user>q</s><assistant>", "a</s>"),
        ("<user>q</s><assistant><tool>o</s><assistant>", "f(x=1)</s>b</s>"),
    ]
    tools = json.dumps([{"type": "function", "function": {"name": "g"}}])
    said = turns(("human", "q"), ("gpt", "a"))
    path = write({"conversations": said, "system": "be brief", "tools": tools})
    assert trained(path) == [("[g]<system>be brief</s><user>q</s><assistant>", "a</s>")]
    path = write({"conversations": turns(("human", "q"), ("narrator", "a"))})
    with pytest.raises(DataError, match="message 2 has the role 'narrator'"):
        trained(path)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_several_calls_in_one_turn_of_sharegpt(write, is_wrapped):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    if is_wrapped:
        calls = [{"type": "function", "function": call} for call in calls]
    asked = {"from": "human", "value": "q"}

    def path(value):
        turn = {"from": "function_call", "value": json.dumps(value)}
        return write({"conversations": [asked, turn]})

    assert trained(path(calls)) == [("<user>q</s><assistant>", "f(x=1)g</s>")]
    for none in ([], ["f"], [{"arguments": {}}], {"name": 1}):
        with pytest.raises(DataError, match="line 1: function_call .* must be a call with name"):
            trained(path(none))


def test_alpaca(write):
    path = write(
        {"instruction": "add", "input": "2 and 3", "output": "5"},
        {"instruction": "say it", "input": "", "output": "it"},
    )
    found = load_placed(path)
    assert found.said == "read as Alpaca instructions: 2"
    with_input, without = found.rows["prompt"]
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "add\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert "Input" not in without and "describes a task. Write" in without
    assert [learned for _, learned in trained(path)] == ["5</s>", "it</s>"]


def test_alpaca_with_its_history(write):
    """As LLaMA-Factory has it: turns of a conversation, each answer of which is learned."""
    row = {"instruction": "and", "input": "3", "output": "5"}
    path = write(
        {**row, "system": "add", "history": [["1", "1"], ["2", "3"]]},
        {**row, "system": "", "history": []},
        {**row, "system": None, "history": None},
    )
    said = "read as Alpaca instructions with their history, as conversations: 3"
    assert load_placed(path).said == said
    assert trained(path) == [
        ("<system>add</s><user>1</s><assistant><user>2</s><assistant><user>and\n3</s><assistant>",
         "1</s>3</s>5</s>"),
        *[("<user>and\n3</s><assistant>", "5</s>")] * 2,
    ]  # fmt: skip
    for wrong in ([["x"]], [["x", None]], ["x", "y"]):
        path = write({**row, "history": [["x", "y"]]}, {**row, "history": wrong})
        with pytest.raises(DataError, match="line 2: 'history' must be a list of pairs"):
            load_placed(path)


def test_questions_and_answers(write):
    path = write(
        {"question": "Who?", "answer": "I", "context": "It was I.", "id": 1},
        {"question": "Who?", "answer": "you", "context": None, "id": 2},
    )
    found = load_placed(path)
    assert found.said == "read as questions and answers, which are prompt and completion: 2"
    assert found.rows["prompt"][:] == ["It was I.\n\nWho?\n", "Who?\n"]
    assert [learned for _, learned in trained(path)] == ["I</s>", "you</s>"]
    path = write({"question": "Who?", "answer": "I"}, {"question": "Who?", "answer": " "})
    with pytest.raises(DataError, match="line 2: 'answer' must be a string that is not empty"):
        load_placed(path)


def test_a_malformed_turn_is_named(write):
    good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    path = write(good, {"conversations": [{"value": "q"}]})
    with pytest.raises(DataError, match="line 2: 'conversations' must be a list of {from, value}"):
        load_placed(path)
    call = {"from": "function_call", "value": "f(1)"}
    path = write(good, {"conversations": [good["conversations"][0], call]})
    with pytest.raises(DataError, match="line 2: function_call 'f.1.': no JSON"):
        load_placed(path)
    path = write({**good, "tools": "f, g"})
    with pytest.raises(DataError, match="line 1: tools 'f, g': no JSON"):
        trained(path)
    said = [{"role": "assistant", "content": "a"}]
    path = write({"prompt": "a text", "completion": said})
    with pytest.raises(DataError, match="'prompt', 'completion' must be texts, or all of them me"):
        load_placed(path)


def test_openai(write):
    """Content null, arguments as text, weight 0, and tools; calls with other arguments beside."""

    def call(**arguments):
        function = {"name": "f", "arguments": json.dumps(arguments)}
        return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}

    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = {"role": "user", "content": "q"}
    wrong = {"role": "assistant", "content": "no", "weight": 0}
    path = write(
        {"messages": [asked, call(x=1)], "tools": tools},
        {"messages": [asked, wrong, asked, call(text="t")], "tools": tools},
    )
    assert trained(path) == [
        ("[f]<user>q</s><assistant>", "f(x=1)</s>"),
        ("[f]<user>q</s><assistant>no</s><user>q</s><assistant>", "f(text=t)</s>"),
    ]


def test_calls_with_other_arguments_keep_their_own(write):
    def row(**arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "q"}, answer]}

    assert [said for _, said in trained(write(row(x=1), row(text="t")))] == [
        "f(x=1)</s>",
        "f(text=t)</s>",
    ]


def test_parts_of_text_are_one_text(write):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yo"}]
    assert trained(write({"messages": turns})) == [("<user>hi</s><assistant>", "yo</s>")]
    parts[1] = {"type": "image", "url": "u"}
    with pytest.raises(DataError, match="'messages' must be a list"):
        trained(write({"messages": turns}))


def test_pairs_for_other_objectives(write):
    turns = [{"role": "user", "content": "q"}]
    pairs = write({"prompt": turns, "chosen": turns, "rejected": turns, "score": 1.0})
    assert load_examples(pairs).column_names == ["chosen", "rejected", "prompt"]
    with pytest.raises(DataError, match="has pairs of answers .chosen, rejected."):
        trained(pairs)
    # TRL looks at no row again, so all are looked at here.
    for wrong in ([], [{"role": "asistant", "content": "a"}], [{"role": "user", "content": None}]):
        rows = [{"chosen": turns, "rejected": one} for one in (turns, turns, wrong)]
        with pytest.raises(DataError, match="data.jsonl, line 3: "):
            load_examples(write(*rows))
    rated = write({"prompt": "a", "completion": "b", "label": True})
    assert load_examples(rated).column_names == ["prompt", "completion", "label"]
    with pytest.raises(DataError, match="says of completions whether they are good"):
        trained(rated)
    with pytest.raises(DataError, match="'label' must be true or false"):
        load_examples(write({"prompt": "a", "completion": "b", "label": "x"}))
    asked = write({"prompt": "a", "other": "b"})
    assert load_examples(asked, form="prompt").column_names == ["prompt"]
    with pytest.raises(DataError, match="needed are prompt and completion"):
        load_examples(asked)


def test_the_form_is_the_one_that_is_named(write):
    path = write({"text": "t", "prompt": "p", "completion": "c"})
    assert load_examples(path).column_names == ["prompt", "completion"]
    assert load_examples(path, form="text").column_names == ["text"]
    with pytest.raises(DataError, match="needed are messages"):
        load_examples(path, form="messages")
    with pytest.raises(ConfigError, match="data.format='chatml' is not known; choose one of"):
        DataSection(train="a.jsonl", eval="b.jsonl", format="chatml")


def test_columns_may_be_called_otherwise(write):
    path = write({"dialogue": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    assert trained(path, columns={"conversations": "dialogue"})[0][1] == "a</s>"
