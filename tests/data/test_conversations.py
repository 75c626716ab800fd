"""Chat templates: what the assistant says is learned, or a sentence says why not."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokens import byte_tokenizer, split_text
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from drlora.data import encode_examples, load_examples, prepare
from drlora.data.files import load_placed
from drlora.data.tokens import PlainSettings
from drlora.errors import DataError

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def turns(*messages):
    return [
        {"role": role, "content": text, **({"reasoning_content": more[0]} if more else {})}
        for role, text, *more in messages
    ]


def encode(template, *conversations, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.chat_template = template
    rows = Dataset.from_list([{"messages": messages} for messages in conversations])
    encoded = encode_examples(rows, tokenizer, 1000).tokens
    return [split_text(tokenizer, row) for row in encoded]


def test_many_at_once_are_what_each_is_alone():
    tools = [{"type": "function", "function": {"name": "look"}}]
    template = "{% if tools %}[tools]{% endif %}" + PLAIN
    lengths = [2, 4, 3, 1, 6, 2]
    said = turns(("user", "a"), ("assistant", "bb"), ("user", "ccc"), ("assistant", "d")) * 2
    rows = [{"messages": said[:n], "tools": tools if n % 3 else None} for n in lengths]
    for marked in (template, template.replace(PLAIN, MARKED)):
        tokenizer = byte_tokenizer(marked)
        together = encode_examples(Dataset.from_list(rows), tokenizer, 1000).tokens.to_list()
        alone = [
            encode_examples(Dataset.from_list([rows[n]]), tokenizer, 1000).tokens[0]
            for n in range(len(rows))
            if lengths[n] > 1  # one has no answer, so nothing to learn
        ]
        assert together == alone and len(alone) == 5


def test_the_shortest_that_is_refused_is_shown_and_the_template_named(tmp_path):
    """Not the first, and not one that is fine."""
    path = tmp_path / "data.jsonl"
    rows = [
        turns(("user", "long " * 99), ("system", "x"), ("assistant", "b")),
        turns(("user", "a"), ("assistant", "b")),
        turns(("user", "short"), ("system", "x"), ("assistant", "b")),
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    tokenizer = byte_tokenizer(
        "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system turn') }}"
        "{% endfor %}" + PLAIN
    )
    tokenizer.name_or_path = "some/model"
    loaded = load_placed(str(path))
    with pytest.raises(DataError) as refused:
        prepare(loaded, tokenizer, PlainSettings())
    said = str(refused.value)
    assert "data.jsonl, line 3: the chat template of 'some/model' cannot be used on it: no" in said
    assert "It is: [{'role': 'user', 'content': 'short'}" in said and "long" not in said
    with pytest.raises(DataError, match="line 3: chat_template: own.jinja cannot be used on it"):
        prepare(loaded, tokenizer, PlainSettings(), template_file="own.jinja")
    path.write_text(json.dumps({"messages": rows[0]}) + "\n")
    with pytest.raises(DataError) as refused:
        prepare(load_placed(str(path)), tokenizer, PlainSettings())
    assert len(str(refused.value)) < 600


def test_the_stop_token_after_a_marked_turn_is_learned_in_every_turn():
    messages = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ((context, learned),) = encode(MARKED, messages)
    assert (
        learned == "b</s>d</s>"
        and context == "<user>a</s>\n<assistant>\n<user>c</s>\n<assistant>\n"
    )


def test_no_second_stop_token_after_a_special_token_that_ends_the_turn():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    template = PLAIN.replace("{{ eos_token }}", "<|im_end|>")
    ((_, learned),) = encode(
        template, turns(("user", "a"), ("assistant", "b")), tokenizer=tokenizer
    )
    assert learned == "b<|im_end|>\n"


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "plain"])
def test_a_turn_of_weight_0_is_read_and_not_learned(template):
    messages = turns(("user", "a"), ("assistant", "WRONG"), ("user", "no"), ("assistant", "right"))
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    ((context, learned),) = encode(template, messages)
    assert "WRONG" in context and learned.strip() == "right</s>"
    messages[1]["weight"] = 0.5
    with pytest.raises(DataError, match="message 2 has weight 0.5; 0 .no loss. and 1"):
        encode(template, messages)


def test_a_role_that_nobody_knows_is_refused():
    with pytest.raises(DataError, match="example 2: message 1 has the role 'human'.*human to user"):
        encode(PLAIN, turns(("user", "a"), ("assistant", "b")), turns(("human", "a"), ("gpt", "b")))


def test_text_that_a_template_leaves_out_is_refused():
    forgetful = PLAIN.replace("{{ m.content }}", "{% if loop.last %}{{ m.content }}{% endif %}")
    with pytest.raises(DataError, match="leaves out text of message 1 .of the user"):
        encode(forgetful, turns(("user", "question"), ("assistant", "b")))
    thoughtless = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(DataError, match="leaves out text of message 2 .of the assistant"):
        encode(thoughtless, turns(("user", "a"), ("assistant", "<think>hm</think>b")))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "tool_calls"])
def test_a_key_that_the_template_does_not_read_is_refused(key):
    messages = turns(("user", "a"), ("assistant", "b"))
    messages[1][key] = "hm" if key != "tool_calls" else [{"function": {"name": "f"}}]
    with pytest.raises(DataError, match=f"does not read '{key}'"):
        encode(PLAIN, messages)
    reads = PLAIN.replace("{{ m.content }}", "{{ m." + key + " or '' }}{{ m.content }}")
    ((_, learned),) = encode(reads, messages)
    assert learned.endswith("b</s>\n") and len(learned) > len("b</s>\n")


def test_notes_beside_a_message_are_told_once(caplog):
    messages = turns(("user", "a"), ("assistant", "b"))
    messages[0]["score"] = 3
    encode(PLAIN, messages, messages)
    assert [r.getMessage() for r in caplog.records] == ["not used: score of the messages"]


def test_tool_calls_that_a_table_filled_up_are_refused(tmp_path):
    """In parquet all calls have all arguments, and null does not say that one was not given."""
    rows = []
    for arguments in ({"x": 0}, {"text": "hi"}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        row = turns(("user", "a"), ("assistant", ""))
        row[1]["tool_calls"] = [call]
        rows.append({"messages": row})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "calls.parquet")
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
    tokenizer = byte_tokenizer(template)
    with pytest.raises(DataError, match="message 2 has a tool call with arguments.*as .jsonl"):
        encode_examples(load_examples(str(tmp_path / "calls.parquet")), tokenizer, 1000)


def test_tools_that_a_table_filled_up_are_as_they_were_written(tmp_path):
    def tool(name, parameter):
        properties = {parameter: {"type": "string"}}
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [tool("f", "a"), tool("g", "b")]
    row = {"messages": turns(("user", "q"), ("assistant", "a")), "tools": tools}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "tools.parquet")
    assert load_examples(str(tmp_path / "tools.parquet"))["tools"][:] == [tools]


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused():
    """As those written in Python, which come with code of a model's own."""

    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    known = byte_tokenizer()
    slow = Slow(tokenizer_object=known._tokenizer, eos_token=known.eos_token)
    with pytest.raises(DataError, match="written in Python.*use a fast one"):
        encode(PLAIN, turns(("user", "a"), ("assistant", "b")), tokenizer=slow)


def test_a_call_that_is_no_mapping_is_refused():
    talk = turns(("user", "a"), ("assistant", ""))
    talk[1]["tool_calls"] = [{"function": [{"name": "f"}]}]
    with pytest.raises(DataError, match="tool call whose function is .* must be a mapping"):
        encode(PLAIN, talk)


@pytest.mark.parametrize("column", ["tools", "system", "input", "images", "chosen"])
def test_a_column_with_something_to_see_is_refused_where_it_has_no_place(tmp_path, column):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b", column: ["c"]}) + "\n")
    with pytest.raises(DataError, match=f"has '{column}' beside 'prompt', 'completion'"):
        load_examples(str(path))


def test_other_columns_are_told_once(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    row = json.dumps({"prompt": "x", "messages": turns(("user", "a"), ("assistant", "b")), "id": 1})
    path.write_text(row + "\n" + row + "\n")
    assert load_examples(str(path)).column_names == ["messages"]
    assert [r.getMessage() for r in caplog.records] == [f"{path}: columns not used: prompt, id"]


def test_two_forms_in_one_file_are_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    row = {"prompt": "x", "completion": "y", "messages": turns(("user", "a"), ("assistant", "b"))}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="say which is meant"):
        load_examples(str(path))
    found = load_examples(str(path), columns={"messages": "messages"})
    assert found.column_names == ["messages"]


def test_a_tokenizer_that_puts_a_space_before_every_text_keeps_the_text():
    """As Llama 2's and Mixtral's; tokenized apart, `is` and `42` would read `is 42`."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    lines = ["the answer is 42 and 17 def f(x):\n    return x", "1 2 3 42 def return\n"] * 50
    backend.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"])
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    pairs = [("the answer is", "42"), ("the answer is ", "42"), ("the answer is", " 42"),
             ("def f(x):\n", "    return x"), ("the ans", "wer is 42")]  # fmt: skip
    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs])
    for (prompt, completion), row in zip(
        pairs, encode_examples(rows, tokenizer, 64).tokens, strict=True
    ):
        whole = tokenizer(prompt + completion)["input_ids"]
        assert row["input_ids"] == [*whole, tokenizer.eos_token_id]
        learned = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert learned.removesuffix("</s>").strip().endswith(completion.strip())
