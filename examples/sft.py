"""DR-LoRA in TRL's SFTTrainer: supervised fine-tuning on prompts and completions.

python examples/sft.py [--tiny] [--steps 120] [--out FOLDER]

The trainer puts the adapter in itself, from `peft_config`.
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
from trl import SFTConfig, SFTTrainer

import drlora


def main() -> None:
    """Train, save, show the ranks."""
    options = parse_arguments("sft")
    base, tokenizer = load_base(options.tiny)
    growth = drlora.DrLoraCallback()
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            max_length=MAX_LENGTH,
            learning_rate=2e-3,
            warmup_steps=options.steps // 10,
            bf16=False,  # TRL's default is True
            report_to="none",
            seed=1,
        ),
        train_dataset=load_pairs(options.steps),
        processing_class=tokenizer,
        peft_config=adapter_settings(options.steps),
        callbacks=[growth],
    )
    trainer.train()
    trainer.save_model(options.out)
    print_ranks(growth.dynamics)


if __name__ == "__main__":
    main()
