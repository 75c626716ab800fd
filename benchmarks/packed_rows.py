"""Tokens a CPU second in training: padded batches, packed rows, and packed rows that attend apart.

    PYTHONPATH=src python -m benchmarks.packed_rows [--rows 9 36] [--rounds 5]

The embedded model learns from made documents of 8 to 96 tokens (44 on average). A batch has as many
documents as the packed rows of 96 tokens hold, so all ways learn from about as many tokens; `full`
has rows without any padding or border, the most that there is to gain. Loss and backward pass of
the same batches, ways in turn; CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, pack_dataset

import drlora
from benchmarks.harness import append, where
from drlora.embedded import model_folder
from drlora.trainer.objectives import OBJECTIVES, OwnSettings, as_off, make_trainer

LENGTH, BATCHES = 96, 4


def documents(lengths: list[int], seed: int) -> Dataset:
    """Random tokens."""
    draw = random.Random(seed)
    ids = [[draw.randrange(10, 4000) for _ in range(length)] for length in lengths]
    return Dataset.from_list([{"input_ids": one, "labels": one} for one in ids])


def make(data: Dataset, batch: int, **settings: Any) -> Any:
    """The trainer of `drlora train`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="sdpa")
    adapter = drlora.DrLoraConfig(r_init=4, r_target=8, r_max=16)
    arguments = SFTConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=batch, use_cpu=True, report_to="none",
        save_strategy="no", router_aux_loss_coef=0.0, **as_off({}), **settings,
    )  # fmt: skip
    trainer: Any = make_trainer(
        OBJECTIVES["sft"], OwnSettings(), continues=False, model=get_peft_model(model, adapter),
        args=arguments, train_dataset=data, eval_dataset=None, callbacks=[],
        processing_class=AutoTokenizer.from_pretrained(model_folder()),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def tokens_a_second(trainer: Any) -> float:
    """Of loss and backward pass over the first batches; filler is no token."""
    batches = [
        batch for _, batch in zip(range(BATCHES), trainer.get_train_dataloader(), strict=False)
    ]
    tokens = sum(
        int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel()
        for b in batches
    )
    started = time.process_time()
    for batch in batches:
        trainer.training_step(trainer.model, batch, (batch["labels"] >= 0).sum())
        trainer.model.zero_grad()
    return tokens / (time.process_time() - started)


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[9, 36])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    draw = random.Random(0)
    lengths = [max(8, min(LENGTH, int(draw.lognormvariate(3.7, 0.6)))) for _ in range(400)]
    data = documents(lengths, 1)
    packed = pack_dataset(data, LENGTH, "bfd")
    fill = sum(lengths) / len(lengths) / LENGTH
    for rows in options.rows:
        flat = dict(packing=True, max_length=LENGTH)
        ways = {
            "padded": make(data, round(rows * len(data) / len(packed))),
            "packed, with a mask": make(packed, rows, **flat),
            "packed, apart": make(packed, rows, **flat),
            "full": make(documents([LENGTH] * 400, 2), rows),
        }
        assert ways["packed, apart"].attends_apart
        ways["packed, with a mask"].attends_apart = False
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, trainer in ways.items():
                taken[way].append(tokens_a_second(trainer))
        done = []
        for way, found in taken.items():
            ratios = [one / padded for one, padded in zip(found, taken["padded"], strict=True)]
            done.append(
                {"case": f"{rows} rows of {LENGTH} tokens", "way": way,
                 "to_padded": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
                 "tokens_a_cpu_s": statistics.median(found),
                 "mean_length_over_longest": round(fill, 3), "rounds": options.rounds, **where()}
            )  # fmt: skip
            print(f"{rows} rows, {way:20} {done[-1]['tokens_a_cpu_s']:6.0f} tokens a CPU s, "
                  f"{done[-1]['to_padded']:.2f} x padded", flush=True)  # fmt: skip
        if not options.dry:
            append("packed_rows", done)


if __name__ == "__main__":
    main()
