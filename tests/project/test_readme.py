"""What README.md and docs/using-it.md tell people to do works: commands, code, links, messages."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import make_model
from tiny_run import make_tokenizer

import drlora
from drlora.data import load_examples
from drlora.ranks.schedule import Competitors, make_schedule, plan_growth

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
USING_IT = (ROOT / "docs" / "using-it.md").read_text("utf-8")
FEW = "train[:64]"
PICTURE = "docs/images/ranks-growing.svg"


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def test_make_verbs_exist():
    verbs = set(re.findall(r"\bmake ([a-z]+)\b", without_code(README)))
    assert {"train", "test"} <= verbs
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert verbs <= targets, verbs - targets


def test_drlora_verbs_and_files_exist():
    from drlora.cli.arguments import make_parser

    commands = re.findall(r"`drlora ([a-z]+) ([^`]+)`", README)
    assert commands
    for verb, rest in commands:
        make_parser().parse_args([verb, *rest.replace(" N", " 10").split()])
    for name in re.findall(r"\b(?:docs|recipes|examples)/[\w/-]+\.\w+", README):
        assert (ROOT / name).exists(), name


class StopEarly(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 3


@contextlib.contextmanager
def stubbed_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict]]]:
    """The hub's model is a tiny OLMoE with as many experts, its tokenizer one of letters."""
    asked: list[tuple[str, dict]] = []

    def model(name: str, **settings: Any) -> transformers.PreTrainedModel:
        asked.append((name, settings))
        return make_model("olmoe", num_experts=64, num_experts_per_tok=8).bfloat16()

    def new_trainer(trainer: transformers.Trainer, *args: Any, **kwargs: Any) -> None:
        make_trainer(trainer, *args, **kwargs)
        trainer.add_callback(StopEarly())

    tokenizer, make_trainer = make_tokenizer(), transformers.Trainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
        patch.setattr(transformers.Trainer, "__init__", new_trainer)
        patch.setattr(drlora.data, "load_examples", lambda name: load_examples(name, split=FEW))
        yield asked


def test_the_example_runs(monkeypatch, tmp_path):
    """On a stub of the hub's model, and for three of its steps; the plan is that of all steps."""
    (example,) = code_blocks(README, "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    for name in re.findall(r"\bdrlora\.(\w+)", example.replace("drlora.data", "")):
        assert name in drlora.__all__, name
    monkeypatch.chdir(tmp_path)
    with stubbed_hub(monkeypatch) as asked:
        names: dict[str, Any] = {"__name__": "readme"}
        exec(compile(example, "README.md", "exec"), names)
    assert [name for name, _ in asked] == ["allenai/OLMoE-1B-7B-0924"]
    assert set(asked[0][1]) <= {"dtype"}
    (callback,) = (
        c
        for c in names["trainer"].callback_handler.callbacks
        if isinstance(c, drlora.DrLoraCallback)
    )
    assert callback.dynamics is not None
    assert callback.dynamics.step == 3 and len(callback.dynamics.event_steps) == 16
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["peft_type"] == "DRLORA" and len(written["experts"]) == 2


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_relative_links_exist(page):
    text = without_code((ROOT / page).read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            path = (ROOT / page).parent / target.partition("#")[0]
            assert path.exists(), target


def test_the_picture_is_there():
    assert "<svg" in (ROOT / PICTURE).read_text("utf-8")


def test_the_file_tree_names_what_exists():
    (tree,) = code_blocks((ROOT / "CONTRIBUTING.md").read_text("utf-8"), "text")
    folder, seen = ROOT, 0
    for line in tree.splitlines():
        inside = line.startswith("  ")
        names = re.split(r"\s{2,}", line.strip())[0].split()
        for name in names:
            path = (folder if inside else ROOT) / name
            assert path.exists(), path
            assert path.is_dir() == name.endswith("/"), name
            seen += 1
        if not inside:
            folder = ROOT / names[0]
    assert seen > 30


REFUSALS: list[tuple[int, dict[str, Any]]] = [
    (150, dict(settle_steps=200)),
    (600, dict(grow_every=200, p_grow=0.1)),
]


@pytest.mark.parametrize(("steps", "settings"), REFUSALS, ids=str)
def test_quoted_refusals_are_what_you_get(steps, settings):
    quotes = " ".join(re.sub(r"^> ?", "", USING_IT, flags=re.M).split())
    with pytest.raises(drlora.ConfigError) as caught:
        plan_growth(drlora.DrLoraConfig(**settings), num_experts=16, total_steps=steps)
    assert str(caught.value) in quotes


def test_the_table_of_run_lengths_is_what_is_chosen():
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", USING_IT, flags=re.M)
    assert len(rows) == 5
    for row in rows:
        steps, warmup, events, every, settle = (int(cell.replace(",", "")) for cell in row)
        found = make_schedule(drlora.DrLoraConfig(), [Competitors(16)], steps)
        assert (found.warmup_steps, found.grow_every, found.settle_steps) == (warmup, every, settle)
        assert len(found.event_steps) == events


def test_the_output_shown_is_that_of_the_run_kept():
    """The figures in the README come from docs/runs/embedded/result.json."""
    result = json.loads((ROOT / "docs/runs/embedded/result.json").read_text("utf-8"))
    shown = README.split("<!-- run output -->")[1].split("<!-- end of run output -->")[0]
    before, after, budget = result["before"], result["after"], result["budget"]
    assert f"{before['loss']['loss']:.4f} -> {after['loss']['loss']:.4f}" in shown
    assert f"spent {budget['spent']} of {budget['stored']} ranks" in shown
    assert budget["spent"] == budget["stored"] == 16 * 16 * 4 * 2
    for projections in result["ranks"].values():
        assert len(set(projections["down"])) > 1, "the ranks differ between experts"
