"""DR-LoRA in TRL's GRPOTrainer: the model answers, a function rewards, and experts grow.

python examples/grpo.py [--tiny] [--steps 120] [--out FOLDER]

`beta` above 0 asks for a reference: the adapter switched off.
"""

from __future__ import annotations

from difflib import SequenceMatcher

from common import BATCH, adapter_settings, load_base, load_pairs, parse_arguments, print_ranks
from trl import GRPOConfig, GRPOTrainer

import drlora


def likeness(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 for the right answer, 0 for one that shares no sound with it."""
    pairs = zip(completions, answer, strict=True)
    return [SequenceMatcher(None, text, right, autojunk=False).ratio() for text, right in pairs]


def main() -> None:
    """Train, save, show the ranks."""
    options = parse_arguments("grpo")
    base, tokenizer = load_base(options.tiny)
    growth = drlora.DrLoraCallback()
    trainer = GRPOTrainer(
        model=base,
        reward_funcs=likeness,
        args=GRPOConfig(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            num_generations=4,
            max_completion_length=16,
            beta=0.02,
            learning_rate=5e-4,
            warmup_steps=options.steps // 10,
            bf16=False,  # TRL's default is True
            report_to="none",
            seed=1,
        ),
        train_dataset=load_pairs(options.steps).rename_column("completion", "answer"),
        processing_class=tokenizer,
        peft_config=adapter_settings(options.steps),
        callbacks=[growth],
    )
    trainer.train()
    trainer.save_model(options.out)
    print_ranks(growth.dynamics)


if __name__ == "__main__":
    main()
