"""What of TRL is overridden, or used by private names, is what was read.

TRL promises nothing of it. A version that is not in trl_used.json fails here with the names that
changed, before a run is silently another.
"""

from __future__ import annotations

import json
import os
import socket

import trl
from tiny_run import save_all
from trl_used import RECORD, used

from drlora.cli.main import main


def test_what_is_used_is_as_it_was_read():
    known = json.loads(RECORD.read_text("utf-8"))
    now = used()
    newest = known.get(trl.__version__) or known[max(known, key=_number)]
    changed = [name for name in {**now, **newest} if now.get(name) != newest.get(name)]
    assert not changed, (
        f"TRL {trl.__version__} has other versions of {changed} than the one that was read, or we "
        f"use more: read what is new, follow it, then run tests/trl_used.py"
    )


def _number(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def test_a_run_tells_nobody_and_leaves_no_card_of_trls(tmp_path, monkeypatch):
    """Not even where telemetry is not turned off by the environment."""
    for name in ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    told = []
    monkeypatch.setattr(
        "trl.trainer.base_trainer.send_telemetry", lambda *a, **k: told.append((a, k))
    )
    trl.trainer.base_trainer.send_telemetry("it is counted")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: told.append("a connection"))
    assert main(["train", str(save_all(tmp_path))]) == 0
    assert told == [(("it is counted",), {})]
    assert not (tmp_path / "run" / "checkpoints" / "README.md").exists()
    assert "CI" not in os.environ
