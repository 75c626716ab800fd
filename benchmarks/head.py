"""What a large vocabulary costs a step: `python -m benchmarks.head`.

    PYTHONPATH=src python -m benchmarks.head [memory] [time] [--dry]

memory  peak resident memory of steps of 2,048 tokens, 256 of them targets, with a vocabulary of
        151,936 and of 4,096 (few logits), each in a process of its own, above what was there before
        the model. The bar: at most 1.10 times the small one's, once the large one's own head is
        taken off.
time    CPU seconds of a step with the plain loss and with that of the targets alone, in one process
        on one thread, in turn; with all tokens as targets too.

The model is random: experts as in experiments/realistic (hidden size 576, 8 of width 1,536, top 2),
4 layers, embeddings tied. Steps are those of `drlora train`'s own trainer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM
from trl import SFTConfig

import drlora
from benchmarks.harness import Row, add_names, append, peak_resident_bytes, where
from drlora.embedded import model_folder
from drlora.trainer.objectives import OBJECTIVES, OwnSettings, as_off, make_trainer

LARGE, SMALL = 151_936, 4_096
HIDDEN, LAYERS, ROWS, LENGTH, TARGETS = 576, 4, 8, 256, 256
BAR = 1.10
KINDS = ("bfloat16", "float32")


def make_base(vocabulary: int, dtype: torch.dtype) -> MixtralForCausalLM:
    """The model, made in its own dtype."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=LAYERS,
        num_attention_heads=9, num_key_value_heads=3, num_local_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return MixtralForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def batches_of(targets: int, count: int) -> Dataset:
    """Rows of tokens of which the last few are targets."""
    each = targets // ROWS
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, SMALL, (ROWS * count, LENGTH), generator=draw).tolist()
    return Dataset.from_list(
        [{"input_ids": r, "labels": [-100] * (LENGTH - each) + r[LENGTH - each :]} for r in rows]
    )


def make(vocabulary: int, kind: str, targets: int, steps: int, folder: str, way: str = "") -> Any:
    """The trainer, whose `way` is what it chose unless it is to be the plain one."""
    model = get_peft_model(
        make_base(vocabulary, getattr(torch, kind)),
        drlora.DrLoraConfig(r_init=4, r_target=8, r_max=16, grow_every=1, settle_steps=1,
                            warmup_steps=1),
    )  # fmt: skip
    trainer: Any = make_trainer(
        OBJECTIVES["sft"],
        OwnSettings(),
        continues=False,
        model=model,
        args=SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, use_cpu=True, seed=0,
            report_to="none", disable_tqdm=True, save_strategy="no", router_aux_loss_coef=0.0,
            **as_off({}),
        ),
        train_dataset=batches_of(targets, steps),
        eval_dataset=None,
        processing_class=AutoTokenizer.from_pretrained(model_folder()),
        callbacks=[drlora.DrLoraCallback()],
    )  # fmt: skip
    if way == "model":
        trainer.way = way
    return trainer


def reset_peak() -> None:
    """From here on the peak is a new one."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(vocabulary: int, kind: str, way: str) -> dict[str, Any]:
    """Peak bytes of three steps above what was there before the model, in this process."""
    torch.set_num_threads(1)
    before = peak_resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(vocabulary, kind, TARGETS, 3, folder, way)
        reset_peak()
        trainer.train()
    return {"peak": peak_resident_bytes() - before, "way": trainer.way}


def memory(dry: bool) -> list[Row]:
    """Rows of both vocabularies, with the plain loss and without."""
    rows = []
    for kind in KINDS:
        head_bytes = (LARGE - SMALL) * HIDDEN * getattr(torch, kind).itemsize
        cases = {"small": (SMALL, ""), "targets": (LARGE, ""), "model": (LARGE, "model")}
        found = {name: in_a_process(size, kind, way) for name, (size, way) in cases.items()}
        assert found["targets"]["way"] == "targets", found
        small = found["small"]["peak"]
        for name, (size, _) in cases.items():
            own = found[name]["peak"] - (head_bytes if size == LARGE else 0)
            row: Row = {
                "case": f"head memory {kind} V{size} T{ROWS * LENGTH} targets{TARGETS}",
                "implementation": found[name]["way"], "peak_bytes": found[name]["peak"],
                "head_bytes": head_bytes if size == LARGE else 0, "to_small": own / small,
                **where(),
            }  # fmt: skip
            verdict = "" if name != "targets" else f" (bar {BAR}: {own <= BAR * small})"
            print(f"{row['case']:56} {row['implementation']:8} peak "
                  f"{row['peak_bytes'] / 1e6:7.0f} MB, without its head {own / small:.3f} x the "
                  f"small one's{verdict}", flush=True)  # fmt: skip
            rows.append(row)
    if not dry:
        append("head", rows)
    return rows


def in_a_process(vocabulary: int, kind: str, way: str) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.head", "--measure", str(vocabulary), kind, way]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def timed(dry: bool, rounds: int = 3) -> list[Row]:
    """CPU seconds of a step, both ways in turn."""
    torch.set_num_threads(1)
    rows = []
    for kind in KINDS:
        for targets in (TARGETS, ROWS * LENGTH):
            seconds = time_both(kind, targets, rounds)
            plain = statistics.median(seconds["model"])
            for way, taken in seconds.items():
                ratios = [a / b for a, b in zip(taken, seconds["model"], strict=True)]
                row: Row = {
                    "case": f"head time {kind} V{LARGE} T{ROWS * LENGTH} targets{targets}",
                    "implementation": way, "cpu_s_a_step": statistics.median(taken),
                    "all_cpu_s": taken, "to_plain": statistics.median(ratios), **where(),
                }  # fmt: skip
                rows.append(row)
                print(f"{row['case']:56} {way:8} {row['cpu_s_a_step']:6.2f} CPU s a step, "
                      f"{row['to_plain']:.3f} x (plain {plain:.2f})", flush=True)  # fmt: skip
    if not dry:
        append("head", rows)
    return rows


def time_both(kind: str, targets: int, rounds: int) -> dict[str, list[float]]:
    """One trainer, one batch: forwards and backwards, the loss computed in both ways."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(LARGE, kind, targets, 1, folder)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])
        trainer.current_gradient_accumulation_steps = 1  # which train() sets
        model, count = trainer.model.train(), (batch["labels"] >= 0).sum()
        seconds: dict[str, list[float]] = {"model": [], "targets": []}
        assert trainer.way == "targets"
        for number in range(rounds + 1):
            for way, taken in seconds.items():
                trainer.way = way
                started = time.process_time()
                trainer.compute_loss(model, dict(batch), num_items_in_batch=count).backward()
                if number:
                    taken.append(time.process_time() - started)
                model.zero_grad()
    return seconds


PARTS: dict[str, Callable[[bool], list[Row]]] = {"memory": memory, "time": timed}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and append to benchmarks/results/head.jsonl."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_names(parser, PARTS)
    parser.add_argument("--measure", nargs=3, metavar=("VOCABULARY", "DTYPE", "WAY"))
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args(argv)
    if options.measure:
        vocabulary, kind, way = options.measure
        print(json.dumps(measure(int(vocabulary), kind, way)))
        return 0
    for name in options.names:
        PARTS[name](options.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
