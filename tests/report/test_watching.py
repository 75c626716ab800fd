"""What a run shows while it trains: rank metrics, the bar, lines, heat map, logs."""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from tiny import make_batch, make_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import drlora
from drlora.cli.heat_map import print_heat_map
from drlora.cli.progress import ConsoleProgress, say
from drlora.cli.summary import print_ranks
from drlora.ranks.concentration import gini, top_share
from drlora.ranks.event import Grant
from drlora.report.heat_map import LEVELS, block_lines
from drlora.runs.progress import TellProgress, growth_line
from drlora.trainer import event_log

STEPS, EVENTS = 8, [3, 5, 7]
SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=2, warmup_steps=3,
                settle_steps=1, lora_alpha=8.0)  # fmt: skip
ROWS = [{k: v[0] for k, v in make_batch(seed, rows=1).items()} for seed in range(16)]


class Early(TrainerCallback):
    """Keeps log entries, from the place that TensorBoard's callback has."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append({"step": state.global_step, **logs})


def train(folder, callbacks=(), **arguments):
    torch.manual_seed(0)
    growth = drlora.DrLoraCallback()
    trainer = Trainer(
        get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS)),
        TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2,
            warmup_steps=1, logging_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no",
            **{"report_to": [], **arguments},
        ),
        train_dataset=Dataset.from_list(ROWS),
        callbacks=[*callbacks, growth],
    )  # fmt: skip
    growth.log_first(trainer)
    trainer.train()
    return growth.dynamics


def test_rank_metrics_reach_the_loggers_before_us_and_events_are_kept(tmp_path):
    early = Early()
    dynamics = train(tmp_path, [early])
    entries = [e for e in early.entries if "loss" in e]
    assert len(entries) == STEPS
    assert entries[0]["rank_mean"] == 2.0 and entries[-1]["rank_mean"] == 4.0
    assert entries[0]["budget_spent"] == 0.5 and entries[-1]["budget_spent"] == 1.0
    ranks = [rows["gate_up"] for rows in dynamics.ranks().values()]
    assert entries[-1]["rank_gini"] == pytest.approx(sum(map(gini, ranks)) / len(ranks))
    assert entries[-1]["rank_top_share"] == pytest.approx(sum(map(top_share, ranks)) / len(ranks))
    # Of single layers only where something changed.
    changed = [e["step"] for e in entries if "rank_gini/layer_00" in e]
    assert changed == [1, *EVENTS]
    tokens = sum(len(row["input_ids"]) for row in ROWS[:2])
    assert all(e["tokens_per_second"] > 0 and 0 < e["dynamics_share"] < 1 for e in entries), tokens

    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == [*EVENTS, STEPS]
    grants = [json.loads(line) for line in (tmp_path / "growth.jsonl").read_text().splitlines()]
    by_place = {(line["step"], line["block"]): line for line in lines}
    for grant in grants:
        known = by_place[grant["step"], grant["block"]]
        assert known["ranks"][grant["expert"]] == grant["rank"] - grant["granted"]
        for name in ("routing", "importance", "saliency"):
            assert known[name][grant["expert"]] == pytest.approx(grant[name], rel=6e-3)
    for block, rows in dynamics.ranks().items():
        assert by_place[STEPS, block]["ranks"] == rows["gate_up"]


def test_of_many_events_some_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "MOST_EVENTS", 2)
    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == [EVENTS[0], EVENTS[2], STEPS]


def test_tensorboard_gets_them(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(tmp_path, report_to=["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [e.step for e in board.Scalars("train/rank_mean")] == list(range(1, STEPS + 1))
    assert board.Scalars("train/rank_mean")[-1].value == 4.0
    assert {"train/rank_gini", "train/budget_spent", "train/dynamics_share"} <= set(
        board.Tags()["scalars"]
    )


def test_gini_and_top_share():
    assert gini([3, 3, 3, 3]) == 0.0
    assert gini([0, 0, 0, 8]) == pytest.approx(0.75)
    assert gini([1, 3]) == pytest.approx(0.25)
    assert gini([0, 0]) == 0.0
    assert top_share([5, 1, 1, 1, 1, 1]) == 0.5
    assert top_share([2] * 20) == pytest.approx(0.1)


def grant(expert, granted, rank, block="b"):
    return Grant(120, block, "down", expert, granted, rank, 0.1, 1e-5, 1e-7)


def test_growth_line_says_who():
    growth = SimpleNamespace(done_share=0.4, noun="growth")
    dynamics = SimpleNamespace(adapters={"a": None, "b": None}, growth=growth)
    line = growth_line([grant(0, 1, 3), grant(7, 5, 12), grant(2, 3, 4, "a")], dynamics)
    assert line == (
        "step 120: 9 ranks to 3 experts, most to 1.7 +5, 0.2 +3, 1.0 +1; the largest has 12; "
        "40% of the growth is done"
    )
    growth.noun = "pruning"
    line = growth_line([grant(0, -2, 3)], dynamics)
    assert line == (
        "step 120: 2 ranks taken from 1 expert; the largest has 3; 40% of the pruning is done"
    )


BAR = ("40/100", "loss 1.235", "lr 2.0e-04", "rank 12.5", "left")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_bar_fits_a_terminal(width, monkeypatch):
    """Also without colours; what has no room is left out, not cut."""
    out = io.StringIO()
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=out, force_terminal=True, width=width)
    show_a_step(console)
    said = [re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", line) for line in out.getvalue().split("\r")]
    (line,) = {line.strip() for line in said if "1.235" in line}
    assert len(line) <= width and "…" not in line
    for part in (*BAR, "3,210 tokens/s") if width > 60 else BAR:
        assert part in line
    assert "\x1b[3" not in out.getvalue() and "\x1b[9" not in out.getvalue(), "no colours"


def test_elsewhere_there_are_a_few_whole_lines():
    out = io.StringIO()
    show_a_step(Console(file=out, force_terminal=False, width=80))
    assert re.fullmatch(r"step 40/100, epoch 0.50, loss 1.235, \d+ s left\n", out.getvalue())


def show_a_step(console):
    bar = TellProgress(shown := ConsoleProgress(console))
    state = SimpleNamespace(max_steps=100, global_step=0)
    bar.on_train_begin(None, state, None)
    logs = dict(loss=1.23456, learning_rate=2e-4, tokens_per_second=3210.4, rank_mean=12.52)
    state.global_step = 40
    bar.on_log(None, state, None, logs={**logs, "epoch": 0.5})
    bar.on_step_end(None, state, None)
    shown.bar.refresh()
    bar.on_train_end(None, state, None)


CONSOLE = dict(highlight=False, soft_wrap=True)  # that of the command line


@pytest.mark.parametrize("width", [60, 100])
def test_sentences_are_broken_between_words(width):
    """On a terminal; in a log a line stays one, for whatever reads it."""
    sentence = (
        "evaluation.loss_examples=200, but only 93 held-out examples are there: all are taken"
    )
    out, log = io.StringIO(), io.StringIO()
    say(Console(file=out, force_terminal=True, width=width, **CONSOLE), sentence)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines) and len(lines) == -(-len(sentence) // width)
    assert " ".join(line.strip() for line in lines) == sentence
    say(Console(file=log, width=width), sentence)
    assert log.getvalue() == sentence + "\n"


def test_a_table_in_a_log_keeps_its_rows_whole():
    out = io.StringIO()
    print_ranks({"model.layers.0.mlp": {"down": [*range(10, 42)]}}, Console(file=out, width=60))
    assert out.getvalue().splitlines()[-1].endswith(" ".join(map(str, range(10, 42))))


def test_heat_map():
    assert block_lines([[1, 8], [4.5, 4]], 1, 8) == ["▁█", "▅▄"]
    assert block_lines([[3, 3]], 3, 3) == [LEVELS[0] * 2]
    out = io.StringIO()
    rows = [[8] * 39 + [16], [8] * 40]
    print_heat_map(rows, Console(file=out, width=22))
    assert out.getvalue().splitlines() == [
        "0 " + "▁" * 20, "  " + "▁" * 19 + "█", "1 " + "▁" * 20, "  " + "▁" * 20,
        *out.getvalue().splitlines()[4:],
    ]  # fmt: skip
    assert "rank 8" in out.getvalue() and "16" in out.getvalue()


def test_ranks_at_the_end_are_a_map_on_a_terminal_and_a_table_elsewhere():
    ranks = {"layer": {"gate_up": [1, 2], "down": [1, 2]}}
    said = {}
    for is_terminal in (True, False):
        out = io.StringIO()
        print_ranks(ranks, Console(file=out, force_terminal=is_terminal, color_system=None))
        said[is_terminal] = out.getvalue()
    assert "0 ▁█" in said[True] and "gate_up+down" in said[True]
    assert "by expert" in said[False] and "▁" not in said[False]
    out = io.StringIO()
    print_ranks({"layer": {"down": [*range(64)]}}, Console(file=out))
    assert "▁" in out.getvalue() and "by expert" not in out.getvalue()
