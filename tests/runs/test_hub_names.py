"""`drlora generate` and `drlora chat` on models and adapters of the hub, by name and offline.

A hub cache is made by hand, as a download leaves it, and read in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import save_all

from drlora.cli.main import main
from drlora.errors import CheckpointError
from drlora.runs.generate import generate
from drlora.runs.speaker import load_speaker

SHORT = ["training.max_steps=4", "training.warmup_steps=0", "adapter.r_init=3"]
ASK = """
import json, sys
import drlora
found = {}
for name in sys.argv[1:]:
    try:
        answers = drlora.generate(name, ["abc:"], max_new_tokens=4)
        found[name] = [answers.model, answers.adapter, answers.answers[0].text]
        talk = drlora.chat(name, max_new_tokens=4)
        assert talk.say("abc:").text == answers.answers[0].text
    except drlora.DrLoraError as error:
        found[name] = str(error)
print("FOUND", json.dumps(found))
"""


def put_into_cache(cache: Path, name: str, folder: Path) -> None:
    """What a download of `folder` as the repository `name` leaves."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_names_of_the_hub_answer_as_their_folders_do(tmp_path):
    recipe = save_all(tmp_path)
    assert main(["train", str(recipe), *SHORT, "training.learning_rate=0.1"]) == 0
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert main(["export", str(run), "--format", "peft", "-o", str(tmp_path / "peft")]) == 0
    assert main(["export", str(run), "--format", "merged", "-o", str(tmp_path / "merged")]) == 0
    put_into_cache(cache, "some/base", tmp_path / "model")
    put_into_cache(cache, "some/whole", tmp_path / "merged")
    for name, folder in (("some/run", run), ("some/lora", tmp_path / "peft")):
        config = json.loads((folder / "adapter_config.json").read_text())
        copied = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("checkpoints", "*.yaml"))
        (copied / "drlora_export.json").unlink(missing_ok=True)
        config["base_model_name_or_path"] = "some/base"
        (copied / "adapter_config.json").write_text(json.dumps(config))
        put_into_cache(cache, name, copied)
    names = ["some/base", "some/whole", "some/run", "some/lora", "some/nothing", "nothing"]
    # The cache is read from the environment when the first library is imported.
    said = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env={**os.environ, "HF_HUB_CACHE": str(cache)},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = json.loads(said.rpartition("FOUND")[2])

    base, *adapted = (
        generate(tmp_path / name, ["abc:"], max_new_tokens=4).answers[0].text
        for name in ("model", "merged", "run", "peft")
    )
    assert found["some/base"] == ["some/base", None, base]
    assert found["some/whole"] == ["some/whole", None, adapted[0]]
    assert found["some/run"] == ["some/base", "DRLORA", adapted[1]]
    assert found["some/lora"] == ["some/base", "LORA", adapted[2]]
    for name in ("some/nothing", "nothing"):
        assert found[name].startswith(f"{name} is no folder, and no model or adapter of the hub")
        assert found[name].count("\n") == 0 and found[name].endswith("or a model of the hub.")


def test_a_folder_comes_first_and_a_path_is_no_name(tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("some", "./gone", str(tmp_path / "gone"), "a/b/c"):
        with pytest.raises(CheckpointError, match="neither a run directory nor a saved adapter"):
            load_speaker(name, {})


def test_the_embedded_model_answers_by_its_name():
    (answer,) = generate("embedded", ["bank, noun:"], max_new_tokens=4).answers
    assert answer.tokens == 4 or answer.is_ended
