"""The model card beside a saved adapter: front matter that the hub reads, no own card lost."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from tiny import make_model
from transformers import OlmoeForCausalLM, Trainer, TrainingArguments

import drlora
from drlora.report.card import MARK, write_card

SETTINGS = dict(r_init=2, r_target=3, r_max=6, p_grow=0.5)
HOSTILE = 'a: "b"\n---\n# <script>alert(1)</script> | `x`'


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An adapter saved by PEFT alone."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS))
    model.save_pretrained(folder)
    return folder


def make_run(saved: Path, folder: Path, model: str, data: str) -> Path:
    """A finished run with that adapter."""
    folder.mkdir()
    shutil.copy(saved / "adapter_model.safetensors", folder)
    adapter = json.loads((saved / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = model
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    recipe = {"model": model, "data": {"train": data}, "adapter": adapter}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    measured = {
        "loss": {"loss": 1.25, "perplexity": 3.49, "target_tokens": 7},
        "match": {"accuracy": 0.5, "correct": 1, "total": 2},
    }
    result = {"before": measured, "after": measured, "steps": 12, "seconds": 3.5}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_saved_adapter_has_a_card_that_the_hub_reads(saved):
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {"drlora", "mixture-of-experts"} <= set(card.data.tags)
    assert "[More Information Needed]" not in card.text
    for part in (MARK, "Every expert has rank 2", "2 / 3 / 6", "import drlora", "drlora export"):
        assert part in card.text, part


def test_the_card_of_a_run_has_its_results(saved, tmp_path):
    folder = make_run(saved, tmp_path / "run", "allenai/OLMoE", "openai/gsm8k")
    assert write_card(folder) == folder / "README.md"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "allenai/OLMoE"
    assert card.data.datasets == ["openai/gsm8k"]
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found == {"loss": 1.25, "exact_match": 0.5}
    assert 'from_pretrained("allenai/OLMoE")' in card.text


def test_hostile_names_stay_values(saved, tmp_path):
    folder = make_run(saved, tmp_path / "run", HOSTILE, HOSTILE)
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert set(card.data.to_dict()) == {
        "library_name", "pipeline_tag", "tags", "model-index"
    }  # fmt: skip
    (result, _) = card.data.eval_results
    assert result.dataset_type == HOSTILE
    assert "<script>" not in card.text.replace("\\<script\\>", "")


def test_somebodys_own_card_stays(saved):
    path = saved / "README.md"
    path.write_text("# My adapter\n\nMy words.\n")
    assert write_card(saved) is None
    assert path.read_text() == "# My adapter\n\nMy words.\n"
    path.write_text(f"{MARK}\n# Ours\n")
    assert write_card(saved) == path
    assert "Ours" not in path.read_text()


def test_saving_again_keeps_the_text_of_an_own_card(saved):
    """PEFT itself adds tags to it, as to any card."""
    path = saved / "README.md"
    path.write_text("---\nlicense: mit\n---\n# My adapter\n\nMy words.\n")
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS))
    model.save_pretrained(saved)
    card = ModelCard.load(path)
    assert card.data.license == "mit"
    assert "# My adapter\n\nMy words." in card.text


TOLD = "Every expert has rank 2"


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Of a model that was loaded from a folder, named as one on the hub would be."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("models/olmoe")
    base = OlmoeForCausalLM.from_pretrained("models/olmoe")
    model = get_peft_model(base, drlora.DrLoraConfig(**SETTINGS))
    settings = dict(report_to="none", use_cpu=True, hub_model_id="me/adapter")
    return Trainer(model, TrainingArguments("out", **settings))


def test_the_trainer_keeps_the_card_and_what_it_is_told(trainer, tmp_path):
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card(language="de", license="mit", tags=["mine"])
        path = tmp_path / "out" / "README.md"
        card = ModelCard.load(path)
        assert MARK in card.text and TOLD in card.text
        assert (card.data.license, card.data.language) == ("mit", ["de"])
        assert {"mine", "drlora", "lora"} <= set(card.data.tags)
        assert card.data.base_model is None
        assert "models/olmoe" not in path.read_text() and str(tmp_path) not in path.read_text()
        trainer.save_model()


def test_what_is_pushed_to_the_hub_has_the_card(trainer, monkeypatch):
    pushed = []

    def commit(self, **settings):
        for operation in settings["operations"]:
            if operation.path_in_repo == "README.md":
                pushed.append(Path(operation.path_or_fileobj).read_text("utf-8"))

    def upload(self, **settings):
        pushed.append((Path(settings["folder_path"]) / "README.md").read_text("utf-8"))

    made = Namespace(repo_id="me/adapter", endpoint="https://huggingface.co")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **settings: made)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    trainer.model.push_to_hub("me/adapter")
    trainer.push_to_hub()
    assert len(pushed) == 2
    for text in pushed:
        assert MARK in text and TOLD in text and "models/olmoe" not in text
    assert "# adapter\n" in pushed[0]


def test_an_own_card_keeps_its_base_and_gets_no_path(trainer, tmp_path):
    trainer.save_model()
    path = tmp_path / "out" / "README.md"
    for named, kept in (("base_model: allenai/OLMoE\n", "allenai/OLMoE"), ("", None)):
        path.write_text(f"---\nlicense: mit\n{named}---\n# Mine\n")
        trainer.save_model()
        card = ModelCard.load(path)
        assert "# Mine" in card.text and card.data.license == "mit"
        assert card.data.base_model == kept
        assert "models/olmoe" not in path.read_text()


@pytest.mark.parametrize(
    "path", ["/home/me/data/train.jsonl", "~/data/train.jsonl", "data/train.jsonl",
             "../data/train.jsonl", r"C:\me\data\train.jsonl", "me/secret/data/train"],
)  # fmt: skip
def test_no_path_enters_a_card(saved, tmp_path, path):
    folder = make_run(saved, tmp_path / "run", path.replace("train.jsonl", "base/model"), path)
    text = write_card(folder).read_text()
    name = path.replace("\\", "/").rpartition("/")[2]
    assert name.replace("_", "") in text
    for part in ("/home", "~/", "data/train", "data/base", "..", "C:", "secret", "me/"):
        assert part not in text.replace("huggingface/", ""), part
    assert ModelCard.load(folder / "README.md").data.base_model is None


def test_cards_of_other_adapters_are_as_peft_writes_them(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
