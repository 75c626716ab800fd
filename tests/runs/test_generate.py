"""Answers of runs and exports: what is asked, what is drawn, and that it is the model's own.

Run: make test ARGS=tests/runs/test_generate.py
"""

import json

import pytest
import torch
from tiny_run import make_tokenizer, save_all
from transformers import AutoModelForCausalLM

import drlora
from drlora.cli.main import main
from drlora.errors import ConfigError, DataError
from drlora.runs.chat import chat
from drlora.runs.generate import generate
from drlora.runs.prompts import Prompt, as_prompt, read_prompts
from drlora.runs.sampling import check_settings, end_tokens
from drlora.runs.speaker import BASE, load_speaker

PROMPTS = ["abc:", "a longer one:", "z:"]
# Turns as `u:TEXT a:TEXT</s>`, in the letters that the tokenizer has.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SHORT = ["training.max_steps=4", "training.warmup_steps=0", "adapter.r_init=3"]


@pytest.fixture(scope="module")
def folder(once):
    """A short run on plain texts, and its exports."""

    def make(folder):
        recipe = save_all(folder)
        assert main(["train", str(recipe), *SHORT, "training.learning_rate=0.1"]) == 0
        for name in ("peft", "per-expert", "merged"):
            export = ["export", str(folder / "run"), "--format", name, "-o", str(folder / name)]
            assert main(export) == 0

    return once("generate", make)


@pytest.fixture
def templated(folder, tmp_path):
    """The merged model, with a chat template and of no run."""
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    model.save_pretrained(tmp_path / "talker")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "talker")
    return tmp_path / "talker"


def texts(found):
    return [answer.text for answer in found.answers]


def test_runs_and_exports_answer_alike(folder):
    """And as transformers' own `generate` does, one prompt at a time."""
    answers = {}
    for name in ("run", "peft", "per-expert", "merged"):
        found = generate(folder / name, PROMPTS, max_new_tokens=8)
        answers[name] = texts(found)
        assert found.adapter == {"run": "DRLORA", "merged": None}.get(name, "LORA")
        assert found.settings["max_new_tokens"] == 8 and "temperature" not in found.settings
        assert json.dumps(found.to_dict())
        assert any("texts are continued" in note for note in found.notes)
        assert any("slower" in note for note in found.notes) == (found.adapter == "LORA")
    assert answers["run"] == answers["peft"] == answers["per-expert"] == answers["merged"]
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokenizer = make_tokenizer()
    for prompt, text in zip(PROMPTS, answers["run"], strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
        row = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0]
        assert tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) == text


def test_the_base_beside_the_adapter(folder):
    found = generate(folder / "run", PROMPTS, compare=True, max_new_tokens=8, batch_size=2)
    base = generate(folder / "model", PROMPTS, max_new_tokens=8, chat_template=False)
    assert [answer.base for answer in found.answers] == texts(base)
    assert texts(found) != texts(base)
    assert texts(found) == texts(generate(folder / "run", PROMPTS, max_new_tokens=8))
    with pytest.raises(ConfigError, match="whole model"):
        generate(folder / "merged", PROMPTS, compare=True)


def test_answers_are_drawn_from_the_seed(folder):
    how = dict(temperature=5.0, max_new_tokens=12)
    one, again, other = (
        texts(generate(folder / "run", PROMPTS, seed=seed, **how)) for seed in (1, 1, 2)
    )
    assert one == again != other
    speaker = load_speaker(folder / "run", how)
    before = torch.random.get_rng_state()
    speaker.answer([Prompt("a")])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert generate(folder / "run", ["a"], **how).settings["do_sample"] is True


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temprature": 1.0}, "did you mean temperature?"),
        ({"temperature": 0}, "do_sample=false"),
        ({"temperature": 0.5, "do_sample": False}, "no effect with do_sample=false"),
        ({"max_new_tokens": "many"}, "a whole number"),
        ({"max_new_tokens": 0}, "must be greater than 0"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(settings, said, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load_speaker(tmp_path / "nowhere", settings)
    assert said in str(refused.value)


def test_prompts_of_a_file(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [
        {"prompt": "a:", "completion": " b", "answers": ["b", "c"]},
        {"messages": turns, "tools": [{"name": "f"}]},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    lines = "\n\n".join(map(json.dumps, records))
    (tmp_path / "p.jsonl").write_text(lines)
    (tmp_path / "p.json").write_text(json.dumps(records))
    (tmp_path / "p.txt").write_text("one\r\n\ntwo: \n")
    found = read_prompts(tmp_path / "p.jsonl")
    assert found == read_prompts(tmp_path / "p.json")
    assert found == [
        Prompt("a:", (), "c"),
        Prompt((turns[0],), ({"name": "f"},), "b"),
        Prompt((turns[0],), (), "b"),
    ]
    assert read_prompts(tmp_path / "p.txt") == [Prompt("one"), Prompt("two: ")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "line 2: {'prompt': 3} is no prompt"),
        ("p.jsonl", '{"prompt": "a"}\nb', "line 2: not valid JSON"),
        ("p.jsonl", "\n", "has no prompt"),
        ("p.json", "{}", "a list of prompts"),
        ("p.csv", "", ".jsonl, .json, .txt"),
        ("p.json", '[{"messages": [{"role": "assistant"}]}]', "no turn before"),
    ],
)
def test_faults_in_a_file_are_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as refused:
        read_prompts(tmp_path / name)
    assert name in str(refused.value) and said in str(refused.value)


def test_what_cannot_be_asked(folder):
    with pytest.raises(ConfigError, match="must be a list"):
        generate(folder / "run", "abc")
    with pytest.raises(DataError, match="there is no prompt"):
        generate(folder / "run", [])
    with pytest.raises(DataError, match="prompt 2: .*no chat template"):
        generate(folder / "run", ["a", [{"role": "user", "content": "a"}]])
    with pytest.raises(DataError, match="prompt 1: .*has 70 tokens"):
        generate(folder / "run", ["a" * 70])
    with pytest.raises(ConfigError, match="has no chat template"):
        generate(folder / "run", ["a"], chat_template=True)
    with pytest.raises(ConfigError, match="batch_size=0"):
        generate(folder / "run", ["a"], batch_size=0)


def test_an_answer_ends_where_the_model_has_no_more_room(folder):
    """64 positions, 60 of them asked."""
    found = generate(folder / "run", ["a" * 60], min_new_tokens=4, max_new_tokens=99)
    (answer,) = found.answers
    assert answer.tokens == 4 and not answer.is_ended
    assert any("1 answer of 1" in note for note in found.notes)


def test_texts_are_turns_where_there_is_a_template(templated):
    speaker = load_speaker(templated, {"max_new_tokens": 4})
    ids = speaker.ids(Prompt("ab"))
    assert speaker.tokenizer.decode(ids) == "u:ab a:"
    turns = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"},
             {"role": "user", "content": "z"})  # fmt: skip
    assert speaker.tokenizer.decode(speaker.ids(Prompt(turns))) == "u:x a:y</s>u:z a:"
    plain = load_speaker(templated, {}, chat_template=False)
    assert plain.tokenizer.decode(plain.ids(Prompt("ab"))) == "ab"
    assert speaker.notes == plain.notes == ()


def test_a_run_on_texts_continues_texts_also_with_a_template(folder, tmp_path):
    """As it was trained; asked for, the template is used."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "t")
    run = str(tmp_path / "run")
    words = [f"tokenizer={tmp_path / 't'}", f"output_dir={run}", *SHORT]
    assert main(["train", str(folder / "recipe.yaml"), *words]) == 0
    speaker = load_speaker(run, {})
    assert not speaker.is_templated and "plain texts" in speaker.notes[0]
    assert load_speaker(run, {}, chat_template=True).is_templated


def test_the_token_that_ends_a_turn_ends_an_answer(templated):
    """Also where the model's own settings do not name it."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    model = AutoModelForCausalLM.from_pretrained(templated)
    assert end_tokens(model, tokenizer) == [2]
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<turn>")
    assert end_tokens(model, tokenizer) == [2, tokenizer.convert_tokens_to_ids("<turn>")]


def test_a_chat_remembers_each_sides_own_answers(templated, folder, monkeypatch):
    talk = chat(templated, system="s", max_new_tokens=4)
    first = talk.say("ab")
    assert talk.turns["model"][1:] == [
        {"role": "user", "content": "ab"}, {"role": "assistant", "content": first.text}
    ]  # fmt: skip
    asked = []
    answer = type(talk.speaker).answer

    def listening(speaker, prompts, side=None, on_text=None):
        asked.append(prompts[0].content)
        return answer(speaker, prompts, side, on_text)

    monkeypatch.setattr(type(talk.speaker), "answer", listening)
    talk.say("cd")
    assert [turn["content"] for turn in asked[0]] == ["s", "ab", first.text, "cd"]
    talk.reset()
    assert talk.say("ab") == first
    plain = chat(folder / "run", compare=True, max_new_tokens=4)
    pieces = {side: [] for side in plain.sides}
    said = plain.say_to_all("ab", lambda side, piece: pieces[side].append(piece))
    assert list(said) == ["adapter", BASE]
    assert {side: "".join(found) for side, found in pieces.items()} == {
        side: one.text for side, one in said.items()
    }
    assert all(not turns for turns in plain.turns.values())  # texts are no conversation


def test_what_a_chat_refuses(folder):
    with pytest.raises(ConfigError, match="num_beams=2"):
        chat(folder / "run", num_beams=2)
    with pytest.raises(ConfigError, match="needs a chat template"):
        chat(folder / "run", system="s")
    with pytest.raises(ConfigError, match="whole model"):
        chat(folder / "merged", compare=True)


def test_public_functions():
    assert drlora.generate is generate and drlora.chat is chat
    assert check_settings({"top_k": 3}) == {"top_k": 3, "do_sample": True}
    with pytest.raises(DataError, match="is no prompt"):
        as_prompt({"text": "x"}, "prompt 1")
