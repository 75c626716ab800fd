"""DR-LoRA in TRL's DPOTrainer: chosen and rejected answers; the reference is the adapter off.

python examples/dpo.py [--tiny] [--steps 120] [--out FOLDER]

Rejected here is the answer to another prompt.
"""

from __future__ import annotations

from common import (
    BATCH,
    MAX_LENGTH,
    adapter_settings,
    load_base,
    load_pairs,
    parse_arguments,
    print_ranks,
)
from trl import DPOConfig, DPOTrainer

import drlora


def main() -> None:
    """Train, save, show the ranks."""
    options = parse_arguments("dpo")
    base, tokenizer = load_base(options.tiny)
    data = load_pairs(options.steps).rename_column("completion", "chosen")
    answers = list(data["chosen"])
    growth = drlora.DrLoraCallback()
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            max_length=MAX_LENGTH,
            learning_rate=5e-4,
            warmup_steps=options.steps // 10,
            bf16=False,  # TRL's default is True
            report_to="none",
            seed=1,
        ),
        train_dataset=data.add_column("rejected", answers[1:] + answers[:1]),
        processing_class=tokenizer,
        peft_config=adapter_settings(options.steps),
        callbacks=[growth],
    )
    trainer.train()
    trainer.save_model(options.out)
    print_ranks(growth.dynamics)


if __name__ == "__main__":
    main()
