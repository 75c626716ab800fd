"""Pretrain a small model on the packed corpus; the learning rate follows the clock.

    export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 OMP_NUM_THREADS=1
    torchrun --nproc_per_node 2 experiments/pretrain/pretrain.py --model olmoe --minutes 80
    python experiments/pretrain/pretrain.py --model llama --minutes 25
    python experiments/pretrain/pretrain.py --model llama_moe --minutes 40

`llama_moe` starts from the newest checkpoint of `llama`, its FFNs split into experts.

One process a core with one thread each: threads of one process wait for each other at every
operation, which is ruinous where other programs share the cores. The malloc settings keep freed
memory in the process; without them a third of the time goes into page faults.
`--resume` goes on from the newest checkpoint, and may set another length.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from models import NAMES, SPLIT, has_experts, new_model, split_dense
from pace import Pace, Schedule
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
from transformers.trainer_utils import get_last_checkpoint

CACHE = Path(".cache/pretrain")
BALANCE_COEFFICIENT = 0.01
NEVER = 10_000_000


class Curve(TrainerCallback):
    """Keep the run's settings and loss curve beside its checkpoints, written anew at every save."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            losses = curve(state.log_history, self.run["step_tokens"])
            tokens = state.global_step * self.run["step_tokens"]
            result = {"run": {**self.run, "tokens": tokens}, **losses}
            self.path.write_text(json.dumps(result) + "\n")


class BalancedTrainer(Trainer):
    """Adds a balance loss of every layer by itself.

    The model's own balance loss pools the layers, so that an overload in one layer may make up for
    a dead expert in another.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        balanced = model.training and has_experts(self.model.config)
        if balanced:
            inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if balanced:
            loss = loss + BALANCE_COEFFICIENT * layer_balance(outputs.router_logits, self.model)
        return (loss, outputs) if return_outputs else loss

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        # Checkpoints hold one matrix for each expert, as the hub does, the model one tensor for
        # all. Only `from_pretrained` converts; the Trainer's loader would leave experts untrained.
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        (model or self.model).load_state_dict(saved.state_dict())


def layer_balance(router_logits: tuple[torch.Tensor, ...], model: PreTrainedModel) -> torch.Tensor:
    """Mean over layers of the Switch balance loss; each layer's logits are [tokens, experts]."""
    config = model.config
    losses = [
        load_balancing_loss_func((logits_XE,), config.num_experts, config.num_experts_per_tok)
        for logits_XE in router_logits
    ]
    return torch.stack(losses).mean()


def curve(log: list[dict[str, float]], step_tokens: int) -> dict[str, list[dict[str, float]]]:
    """Training and held-out losses against tokens seen, from the Trainer's log."""
    train, heldout = [], {}
    for row in log:
        tokens = row["step"] * step_tokens
        if "loss" in row:
            rate = row["learning_rate"]
            train.append({"tokens": tokens, "loss": round(row["loss"], 4), "learning_rate": rate})
        for name, value in row.items():
            if name.startswith("eval_") and name.endswith("_loss"):
                heldout.setdefault(tokens, {})[name[5:-5]] = round(value, 4)
    return {"train": train, "heldout": [{"tokens": t, **losses} for t, losses in heldout.items()]}


def first_model(name: str, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> Any:
    """The model that the run starts from: random, or made from the finished dense model."""
    if name != "llama_moe":
        return new_model(name, tokenizer)
    checkpoint = get_last_checkpoint(str(output_folder(options.cache, "llama")))
    if checkpoint is None:
        raise SystemExit("llama_moe is made from llama: run --model llama first")
    dense = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return split_dense(dense, seed=options.seed, **SPLIT)


def output_folder(cache: Path, name: str) -> Path:
    """Where the checkpoints and the loss curve of a model go."""
    return cache / "checkpoints" / name


def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as a batch [rows, row tokens] that is its own label."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def by_domain(heldout: Dataset, rows: int) -> dict[str, Dataset]:
    """Up to `rows` held-out rows of each domain."""
    domains = heldout["domain"]
    chosen: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        if len(chosen.setdefault(domain, [])) < rows:
            chosen[domain].append(index)
    return {domain: heldout.select(indices) for domain, indices in sorted(chosen.items())}


def build_trainer(
    model: PreTrainedModel, packed: DatasetDict, pace: Pace, arguments: TrainingArguments
) -> BalancedTrainer:
    """A Trainer over the packed rows whose learning rate follows `pace`."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, pace.schedule)
    return BalancedTrainer(
        model=model,
        args=arguments,
        train_dataset=packed["train"],
        eval_dataset=by_domain(packed["heldout"], rows=8),
        data_collator=collated,
        optimizers=(optimizer, scheduler),
        callbacks=[pace],
    )


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Trainer settings of a run on processor cores."""
    return TrainingArguments(
        output_dir=str(output_folder(options.cache, options.model)),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=16,
        learning_rate=options.learning_rate,
        max_steps=NEVER,
        max_grad_norm=1.0,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=4 * options.save_steps,
        save_steps=options.save_steps,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        report_to="none",
        dataloader_pin_memory=False,
        seed=options.seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default="olmoe")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length by the clock, resumed time included")
    length.add_argument("--tokens", type=int, help="length in tokens")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--batch", type=int, default=8, help="rows a process and step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    arguments = training_arguments(options)
    torch.manual_seed(options.seed)
    packed = DatasetDict.load_from_disk(options.cache / "packed")
    row_tokens = len(packed["train"][0]["input_ids"])
    step_tokens = options.batch * arguments.world_size * row_tokens
    by_clock = options.minutes is not None
    units = options.minutes * 60 if by_clock else options.tokens / step_tokens
    tokenizer = AutoTokenizer.from_pretrained(options.cache / "tokenizer")
    model = first_model(options.model, tokenizer, options)
    trainer = build_trainer(model, packed, Pace(Schedule(units), by_clock), arguments)
    folder = output_folder(options.cache, options.model)
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "model": options.model,
        "length": units,
        "length_unit": "seconds" if by_clock else "steps",
        "processes": arguments.world_size,
        "step_tokens": step_tokens,
        "row_tokens": row_tokens,
        "corpus_tokens": len(packed["train"]) * row_tokens,
        "peak_learning_rate": options.learning_rate,
        "balance_coefficient": BALANCE_COEFFICIENT,
        "seed": options.seed,
    }
    trainer.add_callback(Curve(folder / "loss-curve.json", run))
    trainer.train(resume_from_checkpoint=options.resume)


if __name__ == "__main__":
    main()
