"""Broken files and settings at random end in drlora's own errors: a short form of benchmarks.fuzz.

The full run is `python -m benchmarks.fuzz`; its result is benchmarks/results/fuzz.json.
Run: make test ARGS=tests/runs/test_fuzz.py
"""

import json
import os
import signal
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_targets import TARGETS, Target, make_world
from drlora.cli.main import main
from drlora.errors import DrLoraError

FILES_EACH, SETTINGS = 3, 20
LAUGHS = b"a0: &a0 x\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 9)
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    make_world(folder)
    return folder


@pytest.mark.parametrize("name", [*TARGETS, fuzz.SETTINGS])
def test_broken_input_loads_or_is_refused(world, name):
    before = signal.signal(signal.SIGALRM, fuzz._stop)
    try:
        count = SETTINGS if name == fuzz.SETTINGS else FILES_EACH
        found = [fuzz.run_case(world, name, 1, number) for number in range(count)]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not [case for case in found if case.get("is_fault")]
    assert any(case["outcome"] != "loaded" for case in found) or name == "comparison result"


def test_the_cases_do_find_faults(world, monkeypatch):
    """What is none of drlora's errors, or has no message, is told."""
    target = TARGETS["rank map"]
    for error, outcome in ((KeyError("x"), "KeyError"), (DrLoraError(" "), "no message")):

        def fail(world, folder, error=error):
            raise error

        broken = Target(target.folder, target.files, fail)
        monkeypatch.setitem(TARGETS, "rank map", broken)
        case = fuzz.run_case(world, "rank map", 1, 0)
        assert case["is_fault"] and case["outcome"] == outcome


def test_the_full_run_found_none():
    result = json.loads(fuzz.RESULT.read_text("utf-8"))
    assert result["mutated_files"] >= 2000 and result["generated_settings"] >= 2000
    assert result["faults"] == 0 and not result["fault_list"]
    assert set(result["outcomes"]) == {*TARGETS, fuzz.SETTINGS}
    refused = {"loaded", "CheckpointError", "ConfigError", "DataError"}
    assert all(set(counts) <= refused for counts in result["outcomes"].values())


@pytest.mark.parametrize(
    ("folder", "file", "contents", "command"),
    [
        ("run", "adapter_model.safetensors", b"\xff" * 90, ["eval", "{}"]),
        ("run", "adapter_config.json", b"[" * 9000, ["eval", "{}"]),
        ("run", "config.yaml", LAUGHS, ["eval", "{}"]),
        ("adapter", "adapter_config.json", b'{"peft_type": "LORA", "r": 1e300}', ["eval", "{}"]),
        ("recipe", "recipe.yaml", b"model: 2020-13-45", ["train", "{}/recipe.yaml"]),
        ("plan", "plan.yaml", b"\xed\xa0\x80", ["compare", "{}/plan.yaml", "--dry-run"]),
        ("run", "adapter_config.json", b'{"megatron_config": {}}',
         ["export", "{}", "--format", "peft", "-o", "{}/out"]),
    ],
    ids=["header", "nesting", "aliases", "rank", "date", "surrogate", "import"],
)  # fmt: skip
def test_the_command_line_says_so(world, tmp_path, capsys, folder, file, contents, command):
    (tmp_path / "in").mkdir()
    for path in (world / folder).iterdir():
        if path.is_file():
            (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / file).write_bytes(contents)
    assert main([part.format(tmp_path / "in") for part in command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said and len(said) < 2000


def test_a_run_of_somebody_else_is_not_written_through_links(world, tmp_path, capsys):
    """metrics.jsonl may be a link to a file of ours; a resumed run would append to it."""
    (tmp_path / "ours").write_text("dear diary\n")
    run = tmp_path / "run"
    run.mkdir()
    text = (world / "run" / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("output_dir: run", f"output_dir: {run}"))
    os.symlink(tmp_path / "ours", run / "metrics.jsonl")
    assert main(["train", str(run / "config.yaml"), "--resume"]) == 2
    assert "leads out of the run" in capsys.readouterr().err
    assert (tmp_path / "ours").read_text() == "dear diary\n"


def test_code_of_a_model_runs_only_where_the_user_says_so(world, tmp_path, capsys):
    for path in (world / "run").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "config.yaml").read_text()
    assert "trust_remote_code: false" in text
    (tmp_path / "config.yaml").write_text(text.replace("code: false", "code: true"))
    assert main(["eval", str(tmp_path)]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
