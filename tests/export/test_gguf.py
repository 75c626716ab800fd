"""The format gguf: which converter is run, with what, and how its errors are told.

The converter here is a script that notes what it was given; llama.cpp's own is run by
`make engines`.
"""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_model
from tiny_adapter import make_settings, train
from transformers import AutoModelForCausalLM

from drlora.errors import CheckpointError, ConfigError
from drlora.export.llama_cpp import OF_ADAPTERS, OF_MODELS, convert_model, find_script
from drlora.export.plan import apply_plan, make_plan

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
# Writes what it was given into the file that it was told to make.
CONVERTER = """\
import json, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[-1])
found = {"words": words, "files": sorted(p.name for p in folder.iterdir())}
pathlib.Path(words[words.index("--outfile") + 1]).write_text(json.dumps(found))
"""
BROKEN = "import sys; print('first'); print('Can not map tensor x'); sys.exit(3)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """llama.cpp's source folder, and nothing of it on PATH."""
    made = tmp_path / "llama.cpp"
    made.mkdir()
    for name in (OF_ADAPTERS, OF_MODELS):
        (made / name).write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(made))
    monkeypatch.setenv("PATH", "")
    return made


def adapted(tmp_path, **changes):
    make_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return train(get_peft_model(base, make_settings(**changes)))


def test_the_adapter_is_converted(tmp_path, folder):
    model = adapted(tmp_path, router="train")
    plan = make_plan(model, "gguf")
    apply_plan(plan, model, BATCHES, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(plan.files)
    given = json.loads((tmp_path / "out" / "adapter.gguf").read_text())
    assert given["words"][:2] == ["--base", str(tmp_path / "base")]
    assert {"adapter_config.json", "adapter_model.safetensors"} == set(given["files"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "llama-server -m base.gguf --lora THIS_FOLDER/adapter.gguf" in text
    reads = {reading.engine: reading.reads for reading in plan.readings}
    assert reads["llama.cpp"] and not any(v for k, v in reads.items() if k != "llama.cpp")


def test_without_the_converter_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="LLAMA_CPP=path/to/llama.cpp"):
        make_plan(adapted(tmp_path), "gguf")


def test_its_error_is_told_and_nothing_is_written(tmp_path, folder):
    model = adapted(tmp_path)
    (folder / OF_ADAPTERS).write_text(BROKEN)
    with pytest.raises(CheckpointError, match="code 3: first | Can not map tensor x"):
        apply_plan(make_plan(model, "gguf"), model, BATCHES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_lora_is_refused(tmp_path, folder):
    with pytest.raises(ConfigError, match="use the format merged"):
        make_plan(adapted(tmp_path, router="train"), "gguf", routers="full")


def test_where_the_converter_is_looked_for(tmp_path, folder, monkeypatch):
    assert find_script(OF_MODELS) == [sys.executable, str(folder / OF_MODELS)]
    monkeypatch.delenv("LLAMA_CPP")
    assert find_script(OF_MODELS) is None
    built = folder / "build" / "bin"
    built.mkdir(parents=True)
    server = built / "llama-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-server").symlink_to(server)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_script(OF_MODELS) == [sys.executable, str(folder / OF_MODELS)]
    own = tmp_path / "bin" / OF_MODELS
    shutil.copy(folder / OF_MODELS, own)
    own.chmod(0o755)
    assert find_script(OF_MODELS) == [str(own)]


def test_a_model_is_converted(tmp_path, folder):
    (tmp_path / "model").mkdir()
    convert_model(tmp_path / "model", tmp_path / "a.gguf", "f32")
    given = json.loads((tmp_path / "a.gguf").read_text())
    assert given["words"][:2] == ["--outtype", "f32"]
