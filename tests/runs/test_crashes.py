"""Killed at any moment, damaged, full disks, two at once: what is on the disk stays usable."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from kills import Killer, kill_runs
from new_process import use_own_server
from safetensors.torch import load_file
from tiny_run import save_all
from transformers import Trainer

import drlora
import drlora.io.writing
from drlora.cli.main import main
from drlora.io.checkpoint import refuse_damaged
from drlora.io.jsonl import append_lines, forget_after, read_lines
from drlora.io.run_files import LOCK, MANIFEST
from drlora.runs.rundir import RunDir


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    """The short form of tests/kills.py, whose 300 kills are in benchmarks/results/kills.json."""
    use_own_server()
    killer = Killer(tmp_path, seed=3, kinds=("plain", "trainer"))
    kill_runs(killer, kills=6, writes=2, after_each=lambda: None, grown=2)
    assert not killer.failures
    assert killer.count() >= 6 and min(killer.count("write"), killer.count("grown")) >= 2


def test_the_result_of_all_kills_is_what_the_script_writes():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    found = json.loads((results / "kills.json").read_text())
    assert found["kills"] == len(found["moments"])
    assert found["ended_otherwise_than_never_killed"] == []
    into_writes = sum(kill["during"] == "write" for kill in found["moments"])
    assert found["into_writes"] == into_writes
    grown = sum(kill["grown"] for kill in found["moments"])
    assert found["after_growth_before_its_checkpoint"] == grown >= 60


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """Checkpoints 3 and 6, each with a file and one in a folder."""
    for step in (3, 6):
        with drlora.write_checkpoint(tmp_path / f"checkpoint-{step}") as new:
            (new / "weights").write_bytes(bytes(range(step)))
            (new / "shards").mkdir()
            (new / "shards" / "one").write_text("x" * step)
    return tmp_path


def skipped(folder: Path) -> tuple[str | None, list[str]]:
    reasons: list[str] = []
    newest = drlora.newest_checkpoint(folder, reasons.append)
    return newest and newest.name, reasons


def test_the_newest_whole_checkpoint_is_found(checkpoints):
    (checkpoints / "checkpoint-best").mkdir()
    assert skipped(checkpoints) == ("checkpoint-6", [])
    assert skipped(checkpoints / "none") == (None, [])
    shutil.rmtree(checkpoints / "checkpoint-6")
    assert skipped(checkpoints) == ("checkpoint-3", [])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "manifest.json: it was cut off": lambda c: (c / MANIFEST).unlink(),
    "weights has 5 bytes, 6 were": lambda c: (c / "weights").write_bytes(b"12345"),
    "weights has another checksum": lambda c: flip(c / "weights"),
    "shards/one is missing": lambda c: (c / "shards" / "one").unlink(),
    "manifest.json is damaged": lambda c: (c / MANIFEST).write_text('{"files": [1]}'),
    "no entry of a manifest": lambda c: (c / MANIFEST).write_text(
        json.dumps({"files": {"../../x": {"bytes": 1, "sha256": ""}}})
    ),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_told(checkpoints, said):
    DAMAGE[said](checkpoints / "checkpoint-6")
    newest, reasons = skipped(checkpoints)
    assert newest == "checkpoint-3" and len(reasons) == 1
    assert reasons[0].startswith("checkpoint checkpoint-6 is passed over") and said in reasons[0]
    with pytest.warns(UserWarning, match="checkpoint-6 is passed over"):
        drlora.newest_checkpoint(checkpoints)


def test_what_fails_while_it_is_written_is_not_there(checkpoints):
    with pytest.raises(OSError), drlora.write_checkpoint(checkpoints / "checkpoint-9") as new:
        (new / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-3", "checkpoint-6"}
    with drlora.write_checkpoint(checkpoints / "checkpoint-6") as new:  # again, after a resume
        (new / "other").write_text("content")
    refuse_damaged(checkpoints / "checkpoint-6")
    assert not (checkpoints / "checkpoint-6" / "weights").exists()


def test_a_file_is_written_in_full_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    drlora.io.writing.write_at_once(path, "old")

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(drlora.io.writing.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        drlora.io.writing.write_at_once(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_log_goes_on_after_a_line_that_was_cut_off(tmp_path):
    log = tmp_path / "metrics.jsonl"
    append_lines(log, [{"step": 1}, {"step": 2}])
    with log.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [entry["step"] for entry in read_lines(log)] == [1, 2]
    forget_after(log, 1)
    append_lines(log, [{"step": 2, "loss": 0.5}])
    assert [entry["step"] for entry in read_lines(log)] == [1, 2]


def test_two_at_once_are_refused(tmp_path, capsys):
    recipe, run = save_all(tmp_path), RunDir(tmp_path / "run")
    with run.held():
        assert main(["train", str(recipe)]) == 2
        assert "another process is training in" in capsys.readouterr().err
        with pytest.raises(drlora.ConfigError, match="another process"), run.held():
            pass
    assert not run.path.exists(), "nothing began"
    run.path.mkdir()
    (run.path / LOCK).touch()  # of a process that is dead
    with run.held():
        pass


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
            "full",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
    ids=["torch", "full", "read-only"],
)
def test_a_checkpoint_that_cannot_be_written_ends_in_a_message(
    tmp_path, monkeypatch, capsys, fault, said
):
    """Exit code 2, and the run goes on from the checkpoint before."""
    recipe, run = save_all(tmp_path), RunDir(tmp_path / "run")
    real, saved = torch.save, []

    def save(value, path, *args, **kwargs):
        saved.append(path)
        if "checkpoint-12" in str(path):
            Path(path).write_bytes(b"half")
            raise fault
        return real(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert main(["train", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "the checkpoint of step 12 could not be written" in told and said in told
    assert run.resume_command in told and "Traceback" not in told
    assert main(["train", str(recipe), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "checkpoint-12 is passed over" in out and "continuing from" in out
    assert load_file(run.adapter) and run.result.is_file()


def test_an_output_dir_that_cannot_be_written_ends_in_a_message(tmp_path, monkeypatch, capsys):
    recipe = save_all(tmp_path)

    def read_only(*args, **kwargs):
        raise PermissionError(errno.EROFS, "Read-only file system", str(tmp_path / "run"))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert main(["train", str(recipe)]) == 2
    assert "Read-only file system" in capsys.readouterr().err


def test_the_trainers_own_checkpoints_have_a_manifest(tmp_path):
    from tiny_trainer import make_trainer

    trainer = make_trainer(tmp_path)
    trainer.train()
    assert isinstance(trainer, Trainer)
    assert skipped(tmp_path) == ("checkpoint-8", [])
    files = json.loads((tmp_path / "checkpoint-8" / MANIFEST).read_text())["files"]
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(files)
