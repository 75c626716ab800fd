"""The examples run as a newcomer runs them, offline, and grow ranks; the picture can be drawn.

Run: make test ARGS=tests/project/test_examples.py
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from new_process import run_python
from safetensors.torch import load_file
from tiny import make_batch, make_model

from drlora.io.jsonl import read_lines

ROOT = Path(__file__).parents[2]
EXAMPLES = ["trainer", "plain_loop", "accelerate_loop", "sft", "dpo", "grpo"]
STEPS = 12
R_INIT, R_TARGET, R_MAX, EXPERTS = 2, 4, 8, 8


@pytest.fixture(scope="module")
def runs(once) -> dict[str, tuple[Path, str]]:
    """Name -> (folder, what was printed)."""
    folder = once("examples", run_examples)
    return {n: (folder / n, (folder / f"{n}.txt").read_text("utf-8")) for n in EXAMPLES}


def run_examples(folder: Path) -> None:
    for name in EXAMPLES:
        command = [str(ROOT / "examples" / f"{name}.py"), "--tiny", "--steps", str(STEPS)]
        command += ["--out", str(folder / name)]
        run_python(command, folder / f"{name}.txt", folder, ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_grows_ranks_and_spends_the_budget(runs, name):
    folder, printed = runs[name]
    saved = load_file(folder / "adapter_model.safetensors")
    owners = {key: value for key, value in saved.items() if key.endswith(".owner")}
    assert len(owners) == 2 * 2  # layers x projections
    for key, owner in owners.items():
        ranks = torch.bincount(owner, minlength=EXPERTS)
        assert ranks.sum() == len(owner) == EXPERTS * R_TARGET
        assert R_INIT <= ranks.min() < R_TARGET < ranks.max() <= R_MAX, ranks
        births = saved[key.replace("owner", "birth")]
        assert len(births.unique()) > 2, "growth at more than one event"
        trained = saved[key.replace("owner", "lora_B")].abs().sum(dim=1) > 0
        assert trained[births == 0].any() and trained[(births > 0) & (births < STEPS)].any()
    assert f"budget: {4 * EXPERTS * R_TARGET} of {4 * EXPERTS * R_TARGET} ranks" in printed


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 60


def test_a_script_for_lora_needs_two_changed_lines_and_an_import(tmp_path, monkeypatch):
    """The diff in docs/training.md, run on both of its sides."""
    page = (ROOT / "docs" / "training.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", page, flags=re.DOTALL)
    lines = diff.splitlines()
    assert sorted(line[0] for line in lines if line[0] != " ") == ["+", "+", "+", "-", "-"]
    sides = {kind: "\n".join(line[1:] for line in lines if line[0] in f" {kind}") for kind in "-+"}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained",
                        lambda name, **_: make_model())  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rows = [{key: value[0] for key, value in make_batch(i, rows=1).items()} for i in range(24)]
    for kind, source in sides.items():
        short = source.replace("max_steps=1000", "max_steps=24")
        short = short.replace("grow_every=50", "grow_every=2, settle_steps=2")
        exec(short, {"data": Dataset.from_list(rows), "name": "tiny"})
        saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert any(key.endswith(".owner") for key in saved) == (kind == "+")
        if kind == "+":
            grants = list(read_lines(tmp_path / "out" / "growth.jsonl"))
            assert grants and all(grant["rank"] > 8 for grant in grants)


def test_the_picture_is_drawn_from_a_run(runs, tmp_path):
    spec = importlib.util.spec_from_file_location("figures", ROOT / "tools" / "make_figures.py")
    assert spec is not None and spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    run, _ = runs["trainer"]
    steps, ranks = figures.read_growth(run)
    grants = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    assert steps == sorted({grant["step"] for grant in grants})
    saved = load_file(run / "adapter_model.safetensors")
    for layer, (block, history) in enumerate(ranks.items()):
        assert block == f"model.layers.{layer}.mlp"
        assert (history[0] == R_INIT).all()
        owner = saved[f"base_model.model.{block}.experts.drlora_adapters.pools.down.owner"]
        assert history[-1].tolist() == torch.bincount(owner).tolist()
    pictures = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for picture in pictures:
        figures.main([str(run), "--out", str(picture)])
    first, second = (picture.read_bytes() for picture in pictures)
    assert b"<svg" in first and first == second, "the same run gives the same file"
