"""CPU time of a training step: transformers' Trainer, and `drlora train`'s three ways to the loss.

    PYTHONPATH=src python -m benchmarks.trainer_step [--layers 6] [--steps 4] [--rounds 3]

The model is random and has the sizes of experiments/realistic (vocabulary 49,152, hidden size 576,
8 experts of width 1,536, top 2) but fewer layers, so that the head and the loss weigh more than
they do there. Each round trains every way once, in turn; printed are medians over rounds, in CPU
seconds a step of 8 x 160 tokens, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import drlora
from drlora.data import pad_token_id
from drlora.embedded import model_folder
from drlora.trainer.objectives import OBJECTIVES, OwnSettings, as_off, make_trainer

VOCABULARY, BATCH, LENGTH = 49_152, 8, 160


class Clock(TrainerCallback):
    """CPU seconds of each step but the first."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.marks.append(time.process_time())

    @property
    def seconds(self) -> float:
        """Of a step."""
        return (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1)


def measure(way: str, layers: int, steps: int, data: Dataset, tokenizer: Any) -> float:
    """CPU seconds a step of one way."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, num_local_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    settings = drlora.DrLoraConfig(r_init=4, r_target=8, r_max=16, grow_every=2, settle_steps=1,
                                   warmup_steps=1)  # fmt: skip
    model = get_peft_model(MixtralForCausalLM(config), settings)
    clock = Clock()
    given: dict[str, Any] = dict(model=model, train_dataset=data, processing_class=tokenizer,
                                 callbacks=[drlora.DrLoraCallback(), clock])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=steps + 1, per_device_train_batch_size=BATCH, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", router_aux_loss_coef=0.0,
            label_names=["labels"], **as_off({}),
        )  # fmt: skip
        if way == "Trainer":
            Trainer(
                args=arguments,
                data_collator=DataCollatorForLanguageModeling(pad_token_id(tokenizer)),
                **given,
            ).train()
        else:
            own = OwnSettings(token_metrics=way == "trl")
            trainer = make_trainer(
                OBJECTIVES["sft"], own, continues=False, args=arguments, eval_dataset=None, **given
            )
            assert getattr(trainer, "way", None) == way
            trainer.train()
    return clock.seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (BATCH * 4, LENGTH), generator=draw).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    found: dict[str, list[float]] = {"Trainer": [], "model": [], "trl": []}
    for _ in range(options.rounds):
        for way, seconds in found.items():
            seconds.append(measure(way, options.layers, options.steps, data, tokenizer))
            print(f"  {way:8} {seconds[-1]:6.2f}", flush=True)
    base = statistics.median(found["Trainer"])
    for way, seconds in found.items():
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{way:8} {middle:6.2f} CPU s a step ({spread}), {middle / base:.3f} x")


if __name__ == "__main__":
    main()
