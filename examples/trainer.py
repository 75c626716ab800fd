"""DR-LoRA in transformers' Trainer: the model is wrapped, one callback is added.

python examples/trainer.py [--tiny] [--steps 120] [--out FOLDER]

The folder holds the adapter, the Trainer's checkpoints and growth.jsonl, one line a grant.
"""

from __future__ import annotations

from common import BATCH, add_adapter, load_base, load_data, parse_arguments, print_ranks
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import drlora


def main() -> None:
    """Train, save, show the ranks."""
    options = parse_arguments("trainer")
    base, tokenizer = load_base(options.tiny)
    model = add_adapter(base, options.steps)
    growth = drlora.DrLoraCallback()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            warmup_steps=options.steps // 10,
            weight_decay=0.0,
            logging_steps=max(1, options.steps // 6),
            report_to="none",
            seed=1,
        ),
        train_dataset=load_data(tokenizer, options.steps),
        data_collator=DataCollatorForLanguageModeling(tokenizer.pad_token_id),
        callbacks=[growth],
    )
    trainer.train()
    model.save_pretrained(options.out)
    print_ranks(growth.dynamics)


if __name__ == "__main__":
    main()
