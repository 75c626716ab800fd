"""Tokens: TRL's own, with what TRL lacks put on top; cached by all that decides them."""

from __future__ import annotations

import gc
from pathlib import Path

import datasets
import pytest
import trl
from byte_tokens import byte_tokenizer, split_text
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template
from trl.trainer.sft_trainer import SFTTrainer

from drlora.data import tokens
from drlora.data.files import load_placed
from drlora.data.tokens import PlainSettings, prepare
from drlora.embedded import model_folder
from drlora.errors import ConfigError, DataError

FOLDER = Path(trl.__file__).parent / "chat_templates"
CHAT = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "and so?"},
    {"role": "assistant", "content": "no end of it"},
]
RAW = {
    "text": [{"text": "one text"}, {"text": "another, which is longer than the first"}],
    "completion": [
        {"prompt": "a prompt:", "completion": " and what follows"},
        {"prompt": "ends in the middle of a wo", "completion": "rd, and is too long for its row"},
        {"prompt": "b" * 60, "completion": "all of it is cut"},
    ],
    "messages": [{"messages": CHAT}, {"messages": CHAT[:2]}],
    "completion of messages": [
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"prompt": CHAT[:3], "completion": CHAT[3:]},
    ],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Preparing(SFTTrainer):
    """What of TRL's trainer makes tokens, without a model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PlainSettings, raw: Dataset):
        self._tokenizer = tokenizer
        self.chat_template = None
        if settings.assistant_only_loss:
            self.chat_template = get_training_chat_template(tokenizer)
        asked = settings.completion_only_loss
        self.completion_only_loss = "prompt" in raw.column_names if asked is None else asked


def of_trl(
    raw: Dataset, tokenizer: PreTrainedTokenizerBase, settings: PlainSettings, packing: bool = False
) -> Dataset:
    class Arguments(PlainSettings):
        dataset_text_field = "text"

    arguments = Arguments(**vars(settings))
    trainer = Preparing(tokenizer, settings, raw)
    found = trainer._prepare_dataset(raw, tokenizer, arguments, packing, None, "train")
    names = ["input_ids", "labels", *(["seq_lengths"] if packing else [])]
    return found.select_columns(names)


def tokenizer_with(name: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    if name is not None:
        special = [
            "<|im_start|>",
            "<|im_end|>",
            "<|end|>",
            "<|start|>",
            "<|return|>",
            "<|message|>",
        ]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cut", ["keep_start", "keep_end"])
@pytest.mark.parametrize("form", ["text", "completion"])
def test_texts_become_the_tokens_that_trl_makes_of_them(form, cut, packing):
    raw = Dataset.from_list(RAW[form])
    tokenizer = tokenizer_with(None)
    # TRL packs what has nothing to learn too; here it is left out.
    rows = raw.select(range(2))
    settings = PlainSettings(max_length=16, truncation_mode=cut, assistant_only_loss=False)
    if packing and cut == "keep_end":
        pytest.skip("packing cuts at the end only, in TRL too")
    found = prepare(rows, tokenizer, settings, packing=packing)
    assert found.tokens.to_list() == of_trl(rows, tokenizer, settings, packing).to_list()
    assert len(found.tokens) and found.dropped == 0
    if form == "completion" and not packing and cut == "keep_start":
        assert (
            prepare(raw, tokenizer, settings).dropped
            == 1
            == 3 - len(of_trl(raw, tokenizer, settings))
        )


@pytest.mark.parametrize("template", ["qwen3", "gptoss", "phi3", "qwen3_instruct_2507"])
@pytest.mark.parametrize("form", ["messages", "completion of messages"])
def test_conversations_become_the_tokens_that_trl_makes_of_them(form, template):
    raw = Dataset.from_list(RAW[form])
    tokenizer = tokenizer_with(template)
    settings = PlainSettings(max_length=200)
    found = prepare(raw, tokenizer, settings)
    assert found.tokens.to_list() == of_trl(raw, tokenizer, settings).to_list()


def test_all_of_a_conversation_and_of_a_prompt_where_it_is_asked_for():
    tokenizer = tokenizer_with("qwen3")
    for form in ("messages", "completion"):
        settings = PlainSettings(assistant_only_loss=False, completion_only_loss=False)
        raw = Dataset.from_list(RAW[form])
        found = prepare(raw, tokenizer, settings).tokens
        assert found["labels"][:] == found["input_ids"][:]
        assert found.to_list() == of_trl(raw, tokenizer, settings).to_list()


# SFTConfig's own default has a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_an_sft_config_says_what_is_wanted(tmp_path):
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=8, assistant_only_loss=True, bf16=False, use_cpu=True
    )
    found = prepare(Dataset.from_list(RAW["completion"][:2]), tokenizer_with(None), config)
    assert max(map(len, found.tokens["input_ids"])) == 8
    assert (found.truncated, found.dropped) == (1, 1)


def test_shuffled_as_trl_shuffles(tmp_path):
    raw = Dataset.from_list([{"text": f"text {i}"} for i in range(20)])
    settings = PlainSettings(shuffle_dataset=True, seed=3, assistant_only_loss=False)
    found = prepare(raw, tokenizer_with(None), settings).tokens.to_list()
    assert found == of_trl(raw, tokenizer_with(None), settings).to_list()
    assert found != prepare(raw, tokenizer_with(None), PlainSettings()).tokens.to_list()


def test_a_prompt_of_messages_is_not_learned():
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    tokenizer = byte_tokenizer(plain + "{% if add_generation_prompt %}<assistant>{% endif %}")
    raw = Dataset.from_list([{"prompt": CHAT[:3], "completion": CHAT[3:]}])
    context, learned = split_text(tokenizer, prepare(raw, tokenizer, PlainSettings()).tokens[0])
    assert learned == "no end of it</s>" and "ho</s>" in context


def test_what_decides_the_tokens_decides_what_is_cached(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, '
                    '{"role": "assistant", "content": "b"}]}\n')  # fmt: skip
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    made = []
    whole = tokens._Encoder.__call__
    monkeypatch.setattr(tokens._Encoder, "__call__", lambda *args: made.append(1) or whole(*args))

    def count(tokenizer=None, settings=PlainSettings(), version=1) -> int:  # noqa: B008
        monkeypatch.setattr(tokens, "VERSION", version)
        made.clear()
        prepare(load_placed(str(path)), tokenizer or byte_tokenizer(template), settings)
        return len(made)

    assert count() == 1
    assert count() == 0
    assert count(byte_tokenizer(template + "\n")) == 1
    assert count(byte_tokenizer(template, pattern="<s> $A")) == 1
    assert count(settings=PlainSettings(max_length=99)) == 1
    assert count(version=2) == 1
    assert count() == 0
    path.write_text(path.read_text().replace('"b"', '"c"'))
    assert count() == 1


def test_packing_needs_a_length():
    raw = Dataset.from_list(RAW["text"])
    with pytest.raises(ConfigError, match="packing needs a max_length"):
        prepare(raw, tokenizer_with(None), PlainSettings(max_length=None), packing=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # The whole conversation is marked, the user's turn with it.
        ("{% generation %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
         "{% endgeneration %}",
         "trains text of message 1 .of the user"),
        # Only the user's turn is marked.
        ("{% for m in messages %}{% if m.role == 'user' %}{% generation %}{{ m.content }}</s>"
         "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
         "trains text of message 1"),
        # The end of a turn is the start of the next.
        ("{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}\n{% else %}"
         "{% generation %}{{ m.content }}{% endgeneration %}\n{% endif %}{% endfor %}",
         "no special token, so the model would not learn to stop"),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}"
         "{% for m in messages %}{{ m.content }}</s>{% endfor %}", "marks no token"),
    ],
    ids=["all", "user", "no end", "nothing"],
)  # fmt: skip
def test_a_template_that_trains_something_else_is_refused(template, said):
    tokenizer = byte_tokenizer(template)
    with pytest.raises(DataError, match=f"example 1: the chat template cannot be used.*{said}"):
        prepare(Dataset.from_list([{"messages": CHAT}]), tokenizer, PlainSettings())
    assert gc.isenabled(), "it rests only while examples are encoded"
