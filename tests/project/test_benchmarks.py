"""The benchmarks themselves: they refuse what is wrong, say what failed, and add up their rows.

Run: make test ARGS=tests/project/test_benchmarks.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import experts_layer, gpu, scaling, table, train_step
from benchmarks.checks import (
    Reference,
    WrongResultError,
    check_frozen,
    check_peft,
    results_of,
)
from benchmarks.gpu_layers import Setting
from benchmarks.harness import LEAST_ROUNDS, alternate, read, rows_of
from benchmarks.layers import Shape, make_experts, make_inputs, ours, peft, uneven_ranks
from benchmarks.models import ModelShape

ROOT = Path(__file__).parents[2]
FLOAT, HALF = (Shape(64, 32, 8, 2, 96, dtype) for dtype in (torch.float32, torch.bfloat16))
HAS_TRITON = importlib.util.find_spec("triton") is not None


def layer(shape):
    inputs, experts = make_inputs(shape, experts_layer.SKEW), make_experts(shape)
    ranks = experts_layer.ranks_of("following", experts_layer.load_of(inputs, shape))
    return inputs, experts, ranks, ours(experts, shape, ranks)


@pytest.mark.parametrize("shape", [FLOAT, HALF], ids=["float32", "bfloat16"])
def test_the_check_takes_what_is_right(shape):
    inputs, experts, ranks, block = layer(shape)
    reference = Reference(block, experts, shape, ranks, inputs)
    reference.check(results_of(block, inputs))
    grouped = ours(experts, shape, ranks, engine="grouped")
    grouped.load_state_dict(block.state_dict())
    reference.check(results_of(grouped, inputs))
    check_frozen(experts, shape, inputs)
    check_peft(peft(experts, 16), experts, shape, inputs, 16)


@pytest.mark.parametrize("shape", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["one rank of one expert", "scaling", "nan", "a frozen weight"])
def test_the_check_refuses_what_is_wrong(shape, fault):
    inputs, experts, ranks, block = layer(shape)
    reference = Reference(block, experts, shape, ranks, inputs)
    pool = block.experts.adapter("default").rank_pools["down"]
    load_E = experts_layer.load_of(inputs, shape)
    rarest = int(torch.where(load_E > 0, load_E, load_E.max()).argmin())
    row = pool.packed_index[pool.offsets[rarest]]
    with torch.no_grad():
        if fault == "one rank of one expert":
            pool.lora_B[row] = 0
        elif fault == "scaling":
            pool.lora_B *= 1.1
        elif fault == "nan":
            pool.lora_A[row, 0] = float("nan")
        else:
            experts.gate_up_proj[rarest] *= 1.05
    with pytest.raises(WrongResultError, match="in a row"):
        reference.check(results_of(block, inputs))


def test_cases_run_from_end_to_end():
    rows = experts_layer.run((HALF, "following"), rounds=1, seconds=None, with_masked=True)
    assert [row["implementation"] for row in rows] == ["hf_frozen", "ours", "peft", "masked r_max"]
    assert all(row["median_s"] > 0 and row["mean_rank_met"] > 16 for row in rows)
    assert experts_layer.run((HALF, "following"), 1, None, False, at_most=0.0) == []
    rows = train_step.run(ModelShape(64, 32, 4, 2, 1, 16, vocab=64), rounds=1, seconds=None)
    assert {row["implementation"] for row in rows} >= {"ours", "peft", "masked r_max"}


@pytest.mark.parametrize("experts", [4, 8, 64])
def test_uneven_ranks_keep_their_mean(experts):
    ranks = uneven_ranks(experts, 8, 16, 64, torch.randperm(experts))
    assert sum(ranks) == 16 * experts and min(ranks) >= 8 and max(ranks) <= 64
    with pytest.raises(ValueError, match="mean of 65"):
        uneven_ranks(experts, 8, 65, 64, torch.randperm(experts))


def test_alternation_stops_when_its_seconds_are_up():
    slow = {"a": lambda: time.sleep(0.01), "b": lambda: None}
    timings = alternate(slow, rounds=50, warmup=1, seconds=0.0)
    assert {len(t.seconds) for t in timings.values()} == {LEAST_ROUNDS}
    rows = rows_of("case", timings, "b", "a", rank=3)
    assert rows[0]["to_frozen"] > 1 > rows[1]["peft_over_this"] ** -1
    assert rows[0]["rounds"] == LEAST_ROUNDS and rows[0]["rank"] == 3


def scaled(sweep, size, seconds, to_frozen=1.0):
    return {"case": f"{sweep} {size}", "implementation": "ours", "sweep": sweep, sweep: size,
            "median_s": seconds, "to_frozen": to_frozen}  # fmt: skip


def test_verdicts_of_scaling():
    rows = [scaled("experts", 8, 1, 1.1), scaled("experts", 256, 9, 1.54)]
    rows += [scaled("tokens", n, 3 + 2 * n) for n in (512, 1024, 2048, 4096)]
    rows += [scaled("rank", n, t) for n, t in ((8, 1.0), (16, 2.0), (32, 4.0), (64, 16.0))]
    rows += [scaled("experts", 8, 1, 1.0)]  # newer than the first
    experts, tokens, rank = scaling.verdicts(rows).values()
    assert experts == pytest.approx(1.54)
    assert tokens == pytest.approx(0, abs=1e-9)
    assert rank > 0.1
    said = scaling.report(scaling.verdicts(rows))
    assert said.count("NOT met") == 2 and said.count("(bar") == 3
    assert scaling.verdicts([scaled("experts", 8, 1)]) == {}


def test_off_a_line_is_relative():
    assert scaling.off_a_line([1, 2, 3, 4], [1, 2, 3, 4.4]) == pytest.approx(0.04, abs=0.02)
    sizes, times = [1, 2, 4, 8], [1.1, 1.2, 1.4, 1.8]
    once, scaled_up = (scaling.off_a_line(sizes, [f * t for t in times]) for f in (1, 1000))
    assert once == pytest.approx(scaled_up, abs=1e-9)


def timed_row(case, kind, to_frozen, peft=2.0):
    return {"case": case, "implementation": kind, "to_frozen": to_frozen,
            "to_frozen_p20": to_frozen - 0.01, "to_frozen_p80": to_frozen + 0.01,
            "peft_over_this": peft, "device": "a chip", "torch": "1", "transformers": "2",
            "peft": "3", "date": "2026-01-01"}  # fmt: skip


def by_key(rows):
    return {(row["case"], row["implementation"]): row for row in rows}


def test_the_table_and_the_chart(tmp_path):
    timed = by_key(
        [
            timed_row("layer x", "ours", 1.034),
            timed_row("layer x", "masked r_max", 1.5),
            timed_row("step y", "ours", 0.991, peft=1.84),
        ]
    )
    memory = by_key([{"case": "memory y", "implementation": "ours", "of_peft": 0.312}])
    dynamics = by_key([timed_row("dynamics y", "with dynamics", 1.017)])
    text = table.table(timed, memory, dynamics, [])
    lines = text.splitlines()
    assert lines[2] == "| layer x | 1.03 | 1.02 - 1.04 | 1.50 | 2.0 |  |"
    assert lines[3] == "| step y | 0.99 | 0.98 - 1.00 |  | 1.8 | 31% |"
    assert "Dynamics on over fixed ranks, y: 1.017 (1.007 - 1.027)." in text
    assert lines[-1] == "a chip; torch 1, transformers 2, PEFT 3; 2026-01-01."
    table.chart(timed, tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text("utf-8")


def test_the_results_kept_make_a_table():
    cases = {row["case"] for name in ("experts_layer", "train_step") for row in read(name)}
    kept = [table.newest(name) for name in ("memory", "dynamics")]
    text = table.table(table.timed_rows(), *kept, read("scaling"))
    assert cases and all(f"| {case} |" in text for case in cases)


def test_the_page_shows_the_details_that_were_made():
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    shown = page.split(table.DETAILS)[1].split(table.END_DETAILS)[0]
    assert shown.strip() == table.details().strip()


@pytest.mark.parametrize("page", table.PAGES, ids=lambda path: path.name)
def test_the_page_shows_the_table_that_was_made(page):
    made = (ROOT / "benchmarks/results/table.md").read_text("utf-8")
    page = page.read_text("utf-8")
    assert page.split(table.BEGIN)[1].split(table.END)[0].strip() == made.strip()


def test_filling_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"a\n{table.BEGIN}\nold\n{table.END}\nb\n", "utf-8")
    table.fill(page, "| new |\n")
    assert page.read_text("utf-8") == f"a\n{table.BEGIN}\n| new |\n{table.END}\nb\n"
    page.write_text("no marks\n", "utf-8")
    table.fill(page, "| new |\n")
    assert page.read_text("utf-8") == "no marks\n"


def test_a_case_that_fails_says_why(tmp_path):
    setting, out = Setting("cpu", 1, 0, 1), tmp_path / "rows.jsonl"

    def too_large(setting):
        yield {"case": "large", "implementation": "first", "waits": None}
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    def too_long(setting):
        time.sleep(5)
        yield {}

    assert gpu.run_case("large", 9, too_large, setting, out) == 1
    started = time.monotonic()
    assert gpu.run_case("long", 0.05, too_long, setting, out) == 0
    assert time.monotonic() - started < 2
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows[0]["implementation"] == "first"
    assert rows[1]["error"].startswith("out of memory: tried to allocate 99 GiB")
    assert rows[2]["case"] == "long" and "stopped after" in rows[2]["error"]


def test_the_gpu_command_runs_at_toy_sizes(tmp_path, monkeypatch):
    """All cases without Triton; with it, one of each kind, since its interpreter is slow."""
    names = ["layer-olmoe", "growth-qwen3"] if HAS_TRITON else list(gpu.cases(toy=True))
    out = tmp_path / "rows.jsonl"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert gpu.main([*names, "--toy", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    failed = {row["implementation"]: row["error"] for row in rows if "error" in row}
    if HAS_TRITON:
        assert not failed
    else:
        assert all("triton" in error for error in failed.values()), failed
        seen = {row["case"].removeprefix("gpu ").split()[0] for row in rows}
        assert seen >= {"layer", "synchronisation", "step", "growth", "scattermoe", "tiles"}
    timed = {row["implementation"] for row in rows if "median_s" in row}
    assert timed >= {"hf_frozen", "grouped r64", "grouped independent", "grouped following"}
    assert {f"triton {kind}" for kind in ("r64", "following")} <= timed | set(failed)
    (grown,) = (row for row in rows if row["case"].startswith("gpu growth"))
    assert grown["grants"] > 0 and grown["ranks_spent"] == grown["ranks_stored"]
