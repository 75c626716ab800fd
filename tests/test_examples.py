"""The examples run as a newcomer runs them, offline, and grow ranks; the picture can be drawn.

Run: make test ARGS=tests/test_examples.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
EXAMPLES = ["trainer", "plain_loop", "accelerate_loop"]
STEPS = 12
R_INIT, R_TARGET, R_MAX, EXPERTS = 2, 4, 8, 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Name -> (folder, what was printed). They run side by side: most of it is importing."""
    folder = tmp_path_factory.mktemp("examples")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "ACCELERATE_USE_CPU": "true"}
    jobs = {
        name: subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--tiny"]
            + ["--steps", str(STEPS), "--out", str(folder / name)],
            env=env,
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for name in EXAMPLES
    }
    printed = {name: job.communicate(timeout=600)[0] for name, job in jobs.items()}
    assert all(job.returncode == 0 for job in jobs.values()), "\n".join(printed.values())
    return {name: (folder / name, printed[name]) for name in EXAMPLES}


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


def test_the_picture_is_drawn_from_a_run(runs, tmp_path):
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "make_figures.py")
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
