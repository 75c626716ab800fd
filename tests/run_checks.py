"""What tests of runs read, interrupt and compare."""

import json
import signal
from pathlib import Path

from drlora.cli.main import main
from drlora.runs.metrics_log import MetricsLog


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in lines(run / "metrics.jsonl") if e["kind"] == "log"
            and "loss" in e}  # fmt: skip


def interrupt_at(step: int, monkeypatch) -> None:
    """Press Ctrl-C while `step` is under way."""
    on_log = MetricsLog.on_log

    def pressing(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs, **kwargs)
        if state.global_step == step - 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "on_log", pressing)


def assert_resumed_is_straight(straight: Path, cut: Path, step: int, monkeypatch) -> None:
    """Train two recipes of one run, press Ctrl-C in one of them, resume it and compare."""
    assert main(["train", str(straight)]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        assert main(["train", str(cut)]) == 130
    assert main(["train", str(cut), "--resume"]) == 0
    assert_same_run(cut.parent / "run", straight.parent / "run")


def assert_same_run(run: Path, straight: Path) -> None:
    for name in ("adapter_model.safetensors", "growth.jsonl"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    assert losses(run) == losses(straight)
    one, other = (json.loads((r / "result.json").read_text()) for r in (run, straight))
    for key in ("after", "ranks", "budget", "steps"):
        assert one[key] == other[key], key
    assert one["before"]["loss"] == other["before"]["loss"]
