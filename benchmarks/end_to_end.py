"""What a user sees: `drlora train` and a plain script of TRL and PEFT, side by side.

    PYTHONPATH=src python -m benchmarks.end_to_end [embedded] [slice] [--rounds 3] [--threads 2]

Speed in a few steps; `benchmarks.to_the_loss` asks how long each takes to the same held-out loss.

Both train the same model on the same files: tokens, order, batch, steps, learning rate, rank and
what is adapted (`target_parameters` gate_up_proj and down_proj of the experts) are equal; one rank
for all in PEFT, ranks that grow to the same mean here. The script is TRL's SFTTrainer as its
documentation has it, with autocast and checkpointing off on both sides.

    embedded  the model that comes along, in float32, on `embedded:kinds`
    slice     two layers of OLMoE-1B-7B at real size (64 experts of 2048 x 1024, top 8, vocabulary
              50,304), random, in bfloat16, on the same texts

Each run is a process of its own; they take turns, and each round gives one ratio. Rows go to
benchmarks/results/end_to_end.jsonl: seconds and tokens of a step (the first does not count), peak
memory, seconds from the start of the process to the first step, and held-out loss by step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, OlmoeConfig

from benchmarks.harness import Row, add_names, append, where
from benchmarks.models import ModelShape, make_base
from drlora.data import encode_examples, load_examples
from drlora.embedded import model_folder

HERE = Path(__file__).resolve().parents[1]
MINE, THEIRS = "drlora train", "TRL + PEFT"
RANK, LENGTH = 16, 64
OLMOE_SLICE = ModelShape(2048, 1024, 64, 8, 2, 4096, torch.bfloat16, vocab=50_304)
# What both programs do around the training: note times, and say them at the end.
NOTES = """
import json, os, sys, time
began, marks, losses = {began}, [], {{}}
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads({threads})
from transformers.trainer_callback import CallbackHandler
begin, end, evaluated = (
    getattr(CallbackHandler, name) for name in ("on_step_begin", "on_step_end", "on_evaluate")
)
def on_step_begin(self, *args, **kwargs):
    marks.append([time.time(), time.process_time()])
    return begin(self, *args, **kwargs)
def on_step_end(self, *args, **kwargs):
    control = end(self, *args, **kwargs)  # growth is in there
    marks[-1] += [time.time(), time.process_time()]
    return control
def on_evaluate(self, args, state, control, metrics):
    losses[state.global_step] = metrics["eval_loss"]
    return evaluated(self, args, state, control, metrics)
CallbackHandler.on_step_begin, CallbackHandler.on_step_end = on_step_begin, on_step_end
CallbackHandler.on_evaluate = on_evaluate
def say():
    from benchmarks.harness import peak_resident_bytes
    print("NOTES", json.dumps(dict(began=began, marks=marks, losses=losses,
                                   peak=peak_resident_bytes())))
"""
PROGRAMS = {
    MINE: """
from drlora.runs.recipe import load_recipe
from drlora.runs.train import train
train(load_recipe({folder!r} + "/recipe.yaml"))
say()
""",
    THEIRS: """
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
recipe = yaml.safe_load(Path({folder!r}, "recipe.yaml").read_text())
torch.manual_seed(recipe["training"]["seed"])
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=recipe["dtype"]),
    args=SFTConfig({folder!r} + "/theirs", max_length={length}, bf16=False,
                   gradient_checkpointing=False, router_aux_loss_coef=0.0, report_to="none",
                   disable_tqdm=True, use_cpu=True, **recipe["training"]),
    train_dataset=Dataset.from_json(recipe["data"]["train"]),
    eval_dataset=Dataset.from_json(recipe["data"]["eval"]),
    processing_class=AutoTokenizer.from_pretrained(recipe["model"]),
    peft_config=LoraConfig(r={rank}, lora_alpha=2 * {rank}, task_type="CAUSAL_LM",
                           target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
)
trainer.train()
say()
""",
}


@dataclass(frozen=True)
class Case:
    """A model, its batch and how long it trains.

    Attributes:
        shape: of a random OLMoE; None for the embedded model.
        dtype: of the weights.
        batch: examples of a step.
        steps: in all; the first is not timed.
        rate: learning rate.
        evaluations: measurements of the held-out loss.
        held_out: examples of each.
        decay: whether the rate rises over a tenth of the steps and falls to zero; else it stays.
    """

    shape: ModelShape | None
    dtype: str
    batch: int
    steps: int
    rate: float
    evaluations: int = 4
    held_out: int = 64
    decay: bool = False


CASES = {
    "embedded": Case(None, "float32", 32, 40, 2e-3),
    "slice": Case(OLMOE_SLICE, "bfloat16", 32, 4, 1e-3),
}


def prepare(case: Case, folder: Path) -> float:
    """Model, data and recipe; the tokens of an example, on average."""
    model = folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    if case.shape is not None:
        made = make_base(case.shape)
        assert isinstance(made.config, OlmoeConfig)
        made.save_pretrained(model)
        tokenizer.save_pretrained(model)
        del made
    lengths = []
    for split, count in (("train", case.batch * case.steps), ("dev", case.held_out)):
        rows = load_examples("embedded:kinds", split=split).select(range(count))
        lines = [json.dumps({k: row[k] for k in ("prompt", "completion")}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        if split == "train":
            encoded = encode_examples(rows, tokenizer, LENGTH).tokens
            lengths = [len(one["input_ids"]) for one in encoded]
    recipe = {
        "model": str(model if case.shape is not None else model_folder()),
        "dtype": case.dtype,
        "output_dir": str(folder / "mine"),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "dev.jsonl"),
                 "max_length": LENGTH},
        "adapter": {"r_init": RANK // 2, "r_target": RANK, "r_max": 4 * RANK, "router": "frozen",
                    "lora_alpha": 2 * RANK, "grow_every": max(1, case.steps // 8),
                    "settle_steps": max(1, case.steps // 4)},
        "training": {
            "max_steps": case.steps, "per_device_train_batch_size": case.batch, "seed": 0,
            "per_device_eval_batch_size": case.batch, "learning_rate": case.rate,
            "lr_scheduler_type": "linear" if case.decay else "constant",
            "warmup_steps": case.steps // 10 if case.decay else 0, "weight_decay": 0.0,
            "logging_steps": 1, "save_strategy": "no", "eval_strategy": "steps",
            "eval_steps": max(1, case.steps // case.evaluations), "dataloader_drop_last": True,
        },
        "evaluation": {"before": False, "loss_examples": 1, "exact_match": False, "samples": 0},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return statistics.mean(lengths)


def measure(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """One run in a fresh process: what it noted."""
    given = {"folder": str(folder), "here": str(HERE), "threads": threads, "rank": RANK,
             "length": LENGTH, "began": "time.time()"}  # fmt: skip
    shutil.rmtree(folder / "mine", ignore_errors=True)  # of the round before
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": str(HERE / "src"), "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    program = (NOTES + PROGRAMS[name]).format(**given)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.rpartition("NOTES")[2])
    return found


def figures(notes: dict[str, Any], tokens: float) -> Row:
    """Of one run; tokens are those of a step."""
    wall = [end - begin for begin, _, end, _ in notes["marks"]]
    cpu = [end - begin for _, begin, _, end in notes["marks"]]
    return {
        "wall_s_a_step": statistics.median(wall[1:]),
        "cpu_s_a_step": statistics.median(cpu[1:]),
        "tokens_per_s": tokens / statistics.median(wall[1:]),
        "peak_bytes": notes["peak"],
        "startup_s": notes["marks"][0][0] - notes["began"],
        "held_out": {int(step): loss for step, loss in notes["losses"].items()},
        "steps_s": list(itertools.accumulate(wall)),
    }


def run(name: str, rounds: int, threads: int, dry: bool) -> list[Row]:
    """Rows of one case: the medians of each program, and ratios of theirs to mine."""
    case, found = CASES[name], {MINE: [], THEIRS: []}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as made:
        tokens = prepare(case, Path(made)) * case.batch
        for _ in range(rounds):
            for program, taken in found.items():
                taken.append(figures(measure(program, Path(made), threads), tokens))
                said = {k: round(v, 3) for k, v in taken[-1].items() if isinstance(v, float)}
                print(f"  {program:13} {said}", flush=True)
    rows = []
    for program, taken in found.items():
        other = found[THEIRS if program == MINE else MINE]
        row: Row = {"case": f"end to end {name}, {case.dtype}, {case.steps} steps of {tokens:.0f} "
                            f"tokens, r{RANK}", "implementation": program, "rounds": rounds,
                    "threads": threads}  # fmt: skip
        for key in ("wall_s_a_step", "cpu_s_a_step", "tokens_per_s", "peak_bytes", "startup_s"):
            row[key] = statistics.median(one[key] for one in taken)
            ratios = [a[key] / b[key] for a, b in zip(taken, other, strict=True)]
            row[f"{key}_over_other"] = statistics.median(ratios)
        row["held_out"] = taken[0]["held_out"]
        rows.append({**row, **where()})
        print(f"{row['case']}: {program:13} {row['tokens_per_s']:8.1f} tokens/s "
              f"({row['tokens_per_s_over_other']:.2f} x), CPU s a step {row['cpu_s_a_step']:.2f}, "
              f"peak {row['peak_bytes'] / 1e6:.0f} MB, start {row['startup_s']:.1f} s, loss "
              f"{list(row['held_out'].values())[-1]:.3f}", flush=True)  # fmt: skip
    if not dry:
        append("end_to_end", rows)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_names(parser, CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args(argv)
    for name in options.names:
        run(name, options.rounds, options.threads, options.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
