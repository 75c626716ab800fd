"""The benchmarks themselves: they refuse what is wrong, say what failed, and add up their rows.

Run: make test ARGS=tests/project/test_benchmarks.py
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    end_to_end,
    experts_layer,
    gpu,
    gpu_verdicts,
    growth_of_cost,
    scaling,
    table,
    to_the_loss,
    train_step,
)
from benchmarks.checks import (
    Reference,
    WrongResultError,
    check_frozen,
    check_peft,
    results_of,
)
from benchmarks.gpu_setting import Setting
from benchmarks.harness import LEAST_ROUNDS, alternate, read, rows_of
from benchmarks.layers import Shape, make_experts, make_inputs, ours, peft, uneven_ranks
from benchmarks.models import ModelShape
from drlora.runs.recipe import load_recipe

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


def test_what_is_said_of_16_bits_is_what_was_found():
    made = table.quality_in_16_bits()
    page = table.PAGES[-1].read_text("utf-8")
    assert page.split(table.IN_16_BITS)[1].split(table.END_IN_16_BITS)[0].strip() == made.strip()
    last = [line for line in made.splitlines() if line.startswith("| ")][-1].split(" | ")
    above = last[-2].removeprefix("+")
    assert f"PEFT's held-out loss is {above} above drlora's" in (ROOT / "README.md").read_text(
        "utf-8"
    )


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

    gpu.run_case("large", 9, too_large, setting, out)
    started = time.monotonic()
    gpu.run_case("long", 0.05, too_long, setting, out)
    assert time.monotonic() - started < 2
    rows = gpu.rows_in(out)
    assert rows[0]["implementation"] == "first"
    assert rows[1]["error"].startswith("out of memory: tried to allocate 99 GiB")
    assert rows[2]["case"] == "long" and "stopped after" in rows[2]["error"]


def test_what_is_missing_costs_its_case_alone(tmp_path, monkeypatch):
    setting, out, known = Setting("cpu", 1, 0, 1), tmp_path / "rows.jsonl", gpu.cases(toy=True)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_packed", None)
    monkeypatch.delattr("benchmarks.gpu_packed", raising=False)
    for name in ("packed-layer", "head"):
        gpu.run_case(name, 60, known[name][1], setting, out)
    failed, *rows = gpu.rows_in(out)
    assert failed["case"] == "packed-layer" and "ModuleNotFoundError" in failed["error"]
    assert len(rows) == 4 and not any("error" in row for row in rows)


@pytest.mark.parametrize(
    ("ending", "said", "name"),
    [
        ("import time; time.sleep(60)", "no end after 0 s: killed", "second"),
        ("import os; os.abort()", "the process ended with -6", "second"),
        ("raise SystemExit(3)", "the process ended with 3", "second"),
        ("print('-- end second')", None, None),
    ],
)
def test_a_case_that_hangs_or_breaks_its_process_ends_alone(
    tmp_path, monkeypatch, ending, said, name
):
    monkeypatch.setattr(gpu, "GRACE_S", 0.3 if "sleep" in ending else 60.0)
    out = tmp_path / "rows.jsonl"
    script = f"print('-- begin second 0, 9 s left', flush=True)\n{ending}"
    started = time.monotonic()
    assert gpu.watch([sys.executable, "-c", script], dict(os.environ), out) == name
    assert time.monotonic() - started < 30
    errors = [row["error"] for row in gpu.rows_in(out) if "error" in row]
    assert errors == ([said] if said else [])
    assert gpu.ended(out) == ({name} if name else set())


def test_cases_that_ended_are_not_run_again(tmp_path, monkeypatch, capsys):
    out, started = tmp_path / "rows.jsonl", []
    monkeypatch.setattr(gpu, "run", lambda names, *_: started.append(names) or 0)
    for name in ("tests", "layer-olmoe"):
        gpu.mark_ended(name, 1.0, out)
    with out.open("a", encoding="utf-8") as file:
        file.write('{"ended_case": "step-ol')  # cut off in the middle
    assert gpu.main(["--toy", "--out", str(out)]) == 0
    wanted = [name for name in gpu.cases(toy=True) if name not in ("tests", "layer-olmoe")]
    assert gpu.main(["tests", "--toy", "--out", str(out)]) == 0  # asked for by name
    assert started == [wanted, ["tests"]]
    assert "ended before: layer-olmoe, tests" in capsys.readouterr().out


def test_time_for_all_cases_that_matter():
    """Before the minutes are up there is time for each case up to the tiles, if none is cut."""
    limits = {name: limit for name, (limit, _) in gpu.cases(toy=False).items()}
    assert list(limits)[:3] == ["tests", "layer-published", "layer-olmoe"]
    assert sum(list(limits.values())[:5]) < 480


def test_verdicts_of_a_gpu():
    case = "gpu layer bfloat16 d2048 m768 E128 k8 T4096 r16"
    rows = [
        timed_row(case, "grouped r16", 1.4) | {"median_s": 2.0},
        timed_row(case, "triton r16", 1.1) | {"median_s": 1.0},
        timed_row(case, "triton following", 1.3) | {"median_s": 1.2},
        {"case": case, "implementation": "grouped following", "error": "wrong"},
        {"case": "gpu tests", "implementation": "pytest", "passed": 9, "failed": ["one"]},
    ]
    said = gpu_verdicts.report(rows)
    assert (
        "met           layer bfloat16 d2048 m768 E128 k8 T4096 r16: time over frozen: 1.1" in said
    )
    assert "unequal ranks over equal: 1.2 (at most 1.02)" in said
    assert "MISSED        tests that failed: 1" in said
    assert said.count("not measured") == len(gpu_verdicts.bars(rows)) - 4
    assert gpu_verdicts.report([]).count("not measured") == len(gpu_verdicts.bars([]))


@pytest.mark.parametrize(
    ("passed", "failed", "ended", "said"),
    [
        (9, [], "exit 0", "met           tests that failed: 0"),
        (0, [], "exit 1", "not measured"),  # no pytest there
        (0, [], "exit 4", "not measured"),
        (9, [], "cut off", "not measured"),
        (9, ["one"], "cut off", "MISSED        tests that failed: 1"),
    ],
)
def test_tests_that_did_not_run_have_not_passed(passed, failed, ended, said):
    row = {"case": "gpu tests", "implementation": "pytest", "passed": passed, "failed": failed}
    last = gpu_verdicts.report([row | {"ended": ended}]).splitlines()[-1]
    assert "tests that failed" in last and said in last


def test_the_gpu_command_runs_at_toy_sizes(tmp_path, monkeypatch):
    """Cases of each kind; `make gpu ARGS=--toy` runs all."""
    names = ["layer-published", "trial", "packed-layer", "packed-qwen3", "growth-qwen3", "head"]
    out = tmp_path / "rows.jsonl"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert gpu.main([*names, "--toy", "--out", str(out)]) == 0
    rows = gpu.rows_in(out)
    assert gpu.ended(out) == set(names)
    failed = {row["implementation"]: row["error"] for row in rows if "error" in row}
    if HAS_TRITON:
        assert not failed
    else:
        assert all("triton" in error for error in failed.values()), failed
    timed = {row["implementation"] for row in rows if "median_s" in row}
    assert timed >= {"hf_frozen", "grouped r16", "grouped independent", "grouped following"}
    assert timed >= {"16-bit grouped r16", "nf4 grouped r16", "int8 grouped following"}
    assert {f"triton {kind}" for kind in ("r16", "following")} <= timed | set(failed)
    exact = {r["implementation"]: r["to_the_bit"] for r in rows if "to_the_bit" in r}
    assert all(exact[f"nf4 grouped {kind}"] for kind in ("r16", "independent", "following"))
    grown = [row for row in rows if row.get("grants")]
    assert [row["case"].split()[1] for row in grown] == ["packed", "growth"]
    (grew,) = (row for row in grown if "ranks_spent" in row)
    assert grew["ranks_spent"] == grew["ranks_stored"]
    chosen = [name for row in rows for name in row.get("chosen", {}).values()]
    assert chosen and set(chosen) <= {"triton", "grouped"}
    heads = [row for row in rows if row.get("case", "").startswith("gpu head")]
    assert len(heads) == 4 and all(row["gradient_off"] < 1e-2 for row in heads)


def test_the_formula_of_cost_is_found_again():
    sizes = [pair for sweep in growth_of_cost.SWEEPS.values() for pair in sweep]
    terms = [growth_of_cost.counts(shape, rank) for shape, rank in sizes]
    made = [0.01, 2e-11, 0.0, 1e-11, 3e-6, 2e-9]
    seconds = [sum(c * t for c, t in zip(made, one, strict=True)) for one in terms]
    found, error = growth_of_cost.fit(terms, seconds)
    assert found == pytest.approx(made, rel=1e-4, abs=1e-12) and error < 1e-6
    uneven = [s * (1.2 if n % 2 else 0.8) for n, s in enumerate(seconds)]
    others, error = growth_of_cost.fit(terms, uneven)
    assert min(others) >= 0 and 0.05 < error < 0.5


def test_cost_on_paper_grows_with_what_it_says():
    small, large = growth_of_cost.paper(16), growth_of_cost.paper(64)
    assert large["gradients_s"] == pytest.approx(4 * small["gradients_s"])
    assert large["weights_s"] == small["weights_s"] and large["products_s"] > small["products_s"]
    assert set(small["assumed"]) == set(growth_of_cost.ASSUMED)
    # Two orders of magnitude apart from 6 FLOP a weight that is active would be a slip.
    flops = sum(growth_of_cost.counts(growth_of_cost.QWEN3_235B, 16)[1:4])
    assert flops == pytest.approx(4 * 22e9 * 64 * 8192, rel=0.4)


def test_a_sweep_of_cost_runs(monkeypatch):
    tiny = ModelShape(32, 16, 4, 2, 1, 32, vocab=64, sequences=2)
    monkeypatch.setattr(growth_of_cost, "SWEEPS", {"rank": [(tiny, 2), (tiny, 4)]})
    rows = growth_of_cost.sweep("rank", rounds=1)
    assert [row["cpu_s"] > 0 for row in rows] == [True, True]
    assert growth_of_cost.report(rows) == "too few sizes for a fit"


def test_figures_of_a_run_seen_from_outside():
    marks = [[10.0, 1.0, 14.0, 4.0], [14.0, 4.0, 16.0, 5.0], [20.0, 5.0, 22.0, 6.5]]
    notes = {"began": 3.0, "marks": marks, "losses": {"2": 3.0, "3": 2.5}, "peak": 9}
    row = end_to_end.figures(notes, tokens=100)
    assert row["wall_s_a_step"] == 2.0 and row["cpu_s_a_step"] == 1.25
    assert row["tokens_per_s"] == 50 and row["startup_s"] == 7.0
    assert to_the_loss.until(row, 2.7) == 8.0 and to_the_loss.until(row, 3.0) == 6.0
    assert to_the_loss.until(row, 1.0) is None


def test_each_is_tuned_until_its_best_lies_between_two(monkeypatch, tmp_path):
    """And each seed's goal is what PEFT ends with at its own rate."""
    best = dict(zip(to_the_loss.ARMS, (4e-3, 1e-3, 16e-3), strict=True))

    def run_arm(name, folder, rate, seed, threads, tokens):
        end = 1 + abs(math.log2(rate / best[name])) - 0.1 * list(best).index(name)
        return {"held_out": {1: end + 1, 2: end}, "steps_s": [3.0, 5.0], "startup_s": 1.0,
                "peak_bytes": 1, "tokens_per_s": 1.0}  # fmt: skip

    monkeypatch.setattr(to_the_loss, "run_arm", run_arm)
    monkeypatch.setattr(to_the_loss, "prepare", lambda case, folder: 3)
    theirs, mine, recommended = to_the_loss.compare("embedded", [0, 1], 1)
    assert [row["rate"] for row in (theirs, mine, recommended)] == list(best.values())
    assert set(mine["tuning"]) == {"0.004", "0.002", "0.001", "0.0005"}
    assert theirs["goal_s"] == recommended["goal_s"] == [5.0, 5.0]
    assert recommended["theirs_over_this"] == [1.0, 1.0]


def test_the_time_to_a_loss_is_said_with_and_without_the_start():
    theirs = {"startup_s": 5.0, "goal_s": [25.0, 35.0], "whole_s": [25.0, 35.0], "seeds": [0, 1]}
    mine = theirs | {"startup_s": 15.0, "goal_s": [5.0, None]}
    assert table._sooner(theirs, theirs, with_start=True) == "35"
    assert table._sooner(mine, theirs, with_start=False) == (
        "5 (5.0 x); not reached by 1 of 2 seeds"
    )
    assert table._sooner(mine, theirs, with_start=True) == (
        "20 (1.5 x); not reached by 1 of 2 seeds"
    )
    never = mine | {"goal_s": [None, None]}
    assert table._sooner(never, theirs, with_start=True) == "not reached in 45"


def test_a_run_is_told_its_method_rate_and_seed(tmp_path):
    end_to_end.prepare(end_to_end.Case(None, "float32", 2, 3, 1e-3, decay=True), tmp_path)
    to_the_loss.set_run(tmp_path, "lora-all-gradient", 0.25, 7)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.method, recipe.training["learning_rate"]) == ("lora-all-gradient", 0.25)
    to_the_loss.set_run(tmp_path, None, 0.5, 8)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.method, recipe.training["seed"]) == (None, 8)


def test_both_programs_are_given_the_same(tmp_path):
    """Files, steps and settings come from one recipe; the programs can be read by Python."""
    case = end_to_end.Case(None, "float32", 2, 3, 1e-3)
    tokens = end_to_end.prepare(case, tmp_path)
    assert tokens > 5 and len((tmp_path / "train.jsonl").read_text().splitlines()) == 6
    given = dict(folder=str(tmp_path), here=".", threads=1, rank=16, length=64, began="0")
    for program in end_to_end.PROGRAMS.values():
        compile((end_to_end.NOTES + program).format(**given), "program", "exec")
