"""DR-LoRA with accelerate: gradient accumulation, clipping, any number of processes.

python examples/accelerate_loop.py [--tiny] [--steps 120] [--out FOLDER]
accelerate launch --num_processes 2 examples/accelerate_loop.py --tiny
"""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import BATCH, add_adapter, load_base, load_data, parse_arguments, print_ranks
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import drlora


def main() -> None:
    """Train, save, show the ranks."""
    options = parse_arguments("accelerate_loop")
    accelerator = Accelerator(gradient_accumulation_steps=2)
    base, tokenizer = load_base(options.tiny)
    set_seed(1)
    model = add_adapter(base, options.steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    data = load_data(tokenizer, options.steps)
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    loader = DataLoader(data, BATCH // 2, shuffle=True, collate_fn=collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # The rank dynamics belong to the model itself, not to what wraps it for several processes.
    dynamics = drlora.RankDynamics(accelerator.unwrap_model(model), total_steps=options.steps)
    model.train()
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
                dynamics.before_optimizer_step()
            optimizer.step()
            if accelerator.sync_gradients:
                skipped = accelerator.optimizer_step_was_skipped
                dynamics.after_optimizer_step(optimizer, skipped=skipped)
            optimizer.zero_grad()
        if dynamics.step == options.steps:
            break
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.out)
        print_ranks(dynamics)
    accelerator.end_training()


if __name__ == "__main__":
    main()
