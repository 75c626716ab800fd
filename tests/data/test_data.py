"""Loading examples, the messages for what is wrong with them, tokenizing, padding."""

import json
import logging
from pathlib import Path

import datasets
import pytest
import torch
from byte_tokens import byte_tokenizer, split_text
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from drlora.data import encode_examples, load_examples, pad_token_id
from drlora.errors import ConfigError, DataError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
FORGETFUL_CHAT = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}</s>{% endfor %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


PAIRS = [{"prompt": "ab", "completion": " c"}, {"prompt": "x", "completion": " yz"}]


def test_formats_of_file_agree(tmp_path):
    rows = datasets.Dataset.from_list(PAIRS)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.json").write_text(json.dumps(PAIRS, indent=1))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, PAIRS)))
    write(tmp_path / "a.jsonl", *PAIRS)
    for name in ("a.parquet", "a.json", "b.json", "a.jsonl"):
        assert load_examples(str(tmp_path / name)).to_list() == PAIRS, name


def test_columns_are_renamed_and_others_dropped(tmp_path):
    records = [{"question": "q", "answer": "a", "text": "t", "id": 1}]
    path = write(tmp_path / "a.jsonl", *records)
    examples = load_examples(path, columns={"prompt": "question", "completion": "answer"})
    assert examples.to_list() == [{"prompt": "q", "completion": "a"}]
    assert load_examples(path).to_list() == [{"text": "t"}]


def test_columns_may_swap(tmp_path):
    path = write(tmp_path / "a.jsonl", *PAIRS)
    examples = load_examples(path, columns={"prompt": "completion", "completion": "prompt"})
    assert examples[0] == {"prompt": " c", "completion": "ab"}


def test_named_columns_decide_the_form(tmp_path):
    path = write(tmp_path / "a.jsonl", {**PAIRS[0], "body": "b"})
    assert load_examples(path, columns={"text": "body"}).to_list() == [{"text": "b"}]
    assert "'body'" in refused(path, columns={"prompt": "body", "completion": "body"})


def test_embedded_task_and_slice():
    whole = load_examples("embedded:definitions", split="dev")
    assert whole.column_names == ["prompt", "completion", "answers"]
    part = load_examples("embedded:definitions", split="dev[:3]")
    assert part.to_list() == whole.select(range(3)).to_list()


def test_hub_name_goes_to_datasets(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "t"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("someone/some", split="test[:1%]", config="main").to_list() == [
        {"text": "t"}
    ]
    assert calls == [(("someone/some", "main"), {"split": "test[:1%]"})]


def test_hub_that_cannot_be_reached():
    with pytest.raises(DataError, match="'nobody/nothing'.*check the name"):
        load_examples("nobody/nothing")


def refused(source: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_examples(source, **options)
    return str(caught.value)


def test_missing_and_unknown_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "nowhere.jsonl: no such file" in refused(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "a.xlsx").write_text("a,b\n")
    assert "cannot read '.xlsx' files; use .jsonl, .json, .csv" in refused(str(tmp_path / "a.xlsx"))
    assert "is a folder without data files" in refused(str(tmp_path / "empty"))
    assert "there are definitions, kinds, pronunciation" in refused("embedded:nonsense")
    assert "there are dev, test, train" in refused("embedded:definitions", split="validation")
    path = write(tmp_path / "a.jsonl", *PAIRS)
    assert "a file has no splits" in refused(path, split="test")


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_empty_file(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(content)
    assert "is empty" in refused(str(path))


def test_empty_list_and_empty_parquet(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    assert "is empty" in refused(str(tmp_path / "a.json"))
    rows = datasets.Dataset.from_list(PAIRS).select([])
    rows.to_parquet(str(tmp_path / "a.parquet"))
    assert "is it empty" in refused(str(tmp_path / "a.parquet"))


def test_malformed_line_has_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n')
    assert "a.jsonl, line 3: not valid JSON" in refused(str(path))
    path.write_text('{"text": "a"}\n["b"]\n')
    assert "a.jsonl, line 2: must be a JSON object, not list" in refused(str(path))
    path.write_bytes(b'{"text": "\xff"}\n')
    assert "is not UTF-8" in refused(str(path))
    listed = tmp_path / "b.json"
    listed.write_text('[{"text": "a"},\n {"text" 3}]')
    assert "b.json, line 2: not valid JSON" in refused(str(listed))
    broken = tmp_path / "c.parquet"
    broken.write_text("no parquet")
    assert "not really a .parquet file?" in refused(str(broken))


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path / "a.jsonl", {"asked": "q", "answer": "a"})
    message = refused(path)
    assert "'asked', 'answer'" in message
    assert "prompt and completion, or messages, or text" in message
    message = refused(path, columns={"prompt": "query", "completion": "answer"})
    assert "no column 'query'" in message and "found are 'asked', 'answer'" in message
    assert "columns names 'story'" in refused(path, columns={"story": "asked"})


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": 3, "completion": "c"}, "'prompt' must be a string, not 3"),
        ({"prompt": "a", "completion": " "}, "'completion' must be a string that is not empty"),
        ({"prompt": "a"}, "'completion' must be a string that is not empty, not None"),
        ({"prompt": "a", "completion": "c", "answers": [1]}, "'answers' must be a list of strings"),
        ({"prompt": "a", "completion": "c", "choices": "c"}, "'choices' must be a list of strings"),
    ],
)
def test_wrong_types_have_the_line(tmp_path, bad, said):
    first = {"prompt": "a", "completion": "c", "answers": ["c"], "choices": ["c", "d"]}
    message = refused(write(tmp_path / "a.jsonl", first, bad))
    assert "a.jsonl, line 2: " in message and said in message


@pytest.mark.parametrize("messages", [[], "hi", [{"role": "user"}], [{"role": 1, "content": ""}]])
def test_wrong_messages(tmp_path, messages):
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    assert "'messages' must be a list of {role, content}" in refused(path)


def encode(records, tokenizer, max_length=100):
    return encode_examples(datasets.Dataset.from_list(records), tokenizer, max_length)


@pytest.mark.parametrize(("pattern", "head"), [("$A", ""), ("<s> $A", "<s>"), ("$A </s>", "")])
def test_completion_has_loss_on_completion_and_eos_only(pattern, head):
    tokenizer = byte_tokenizer(pattern=pattern)
    encoded = encode(PAIRS, tokenizer)
    assert [split_text(tokenizer, row) for row in encoded.tokens] == [
        (f"{head}ab", " c</s>"),
        (f"{head}x", " yz</s>"),
    ]
    assert (encoded.dropped, encoded.truncated) == (0, 0)


def test_text_has_loss_everywhere():
    tokenizer = byte_tokenizer()
    encoded = encode([{"text": "abc"}], tokenizer)
    assert split_text(tokenizer, encoded.tokens[0]) == ("", "abc</s>")


CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_messages_have_loss_on_assistant_turns(template):
    tokenizer = byte_tokenizer(template)
    encoded = encode([{"messages": CONVERSATION}], tokenizer)
    assert split_text(tokenizer, encoded.tokens[0]) == (
        "<user>hi</s><assistant><user>so</s><assistant>",
        "ho</s>no</s>",
    )


def test_token_merged_across_the_start_of_a_turn_has_loss():
    tokenizer = byte_tokenizer(CHAT.replace("}}>", "}}>\n").replace("<assistant>", "<assistant>\n"))
    tokenizer.add_tokens(["\n\n"])
    turns = [CONVERSATION[0], {"role": "assistant", "content": "\nho"}]
    encoded = encode([{"messages": turns}], tokenizer)
    assert split_text(tokenizer, encoded.tokens[0]) == (
        "<user>\nhi</s><assistant>",
        "\n\nho</s>",
    )


def test_template_without_eos_gets_one():
    tokenizer = byte_tokenizer(CHAT.replace("</s>", "\n"))
    encoded = encode([{"messages": CONVERSATION[:2]}], tokenizer)
    assert split_text(tokenizer, encoded.tokens[0])[1] == "ho\n</s>"


def test_messages_need_a_usable_template():
    with pytest.raises(DataError, match="no chat template"):
        encode([{"messages": CONVERSATION}], byte_tokenizer())
    with pytest.raises(DataError, match="example 1.*changes earlier turns"):
        encode([{"messages": CONVERSATION}], byte_tokenizer(FORGETFUL_CHAT))
    refusing = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="example 1.*roles must alternate"):
        encode([{"messages": CONVERSATION}], refusing)


def test_tokenizer_without_eos_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"set tokenizer\.eos_token"):
        encode(PAIRS, tokenizer)


def test_completions_cut_away_are_counted_and_reported(caplog):
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "abcd", "completion": "e"},
        {"prompt": "ab", "completion": "cdef"},
    ]
    tokenizer = byte_tokenizer()
    with caplog.at_level(logging.WARNING, logger="drlora"):
        encoded = encode(records, tokenizer, max_length=4)
    assert (encoded.dropped, encoded.truncated) == (1, 1)
    assert [split_text(tokenizer, row) for row in encoded.tokens] == [("a", "b</s>"), ("ab", "cd")]
    assert "1 of 3 examples left out" in caplog.text
    assert "1 of 3 examples cut" in caplog.text


def test_nothing_left_to_learn_is_an_error():
    with pytest.raises(DataError, match="all 2 examples have no token to learn.*max_length=2"):
        encode([{"prompt": "abc", "completion": "d"}] * 2, byte_tokenizer(), max_length=2)
    with pytest.raises(DataError, match="assistant turns"):
        encode([{"messages": CONVERSATION[:1]}], byte_tokenizer(CHAT))
    with pytest.raises(ConfigError, match="max_length is 1"):
        encode(PAIRS, byte_tokenizer(), max_length=1)


def test_wrong_type_in_a_later_row_is_found():
    with pytest.raises(DataError, match="example 2: 'prompt' must be a string, not None"):
        encode([*PAIRS[:1], {"prompt": None, "completion": "x"}], byte_tokenizer())


def test_collator_pads_on_the_right():
    tokenizer = byte_tokenizer()
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = DataCollatorForLanguageModeling(pad_token_id(tokenizer))(rows)
    eos = tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, eos, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collator_prefers_the_padding_token():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<s>"
    batch = DataCollatorForLanguageModeling(pad_token_id(tokenizer))(
        [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [0], "labels": [0]}]
    )
    assert (
        batch["input_ids"][1, 1] == tokenizer.convert_tokens_to_ids("<s>") != tokenizer.eos_token_id
    )
