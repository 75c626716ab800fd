"""DR-LoRA in a loop of one's own: two calls around the optimizer's step.

python examples/plain_loop.py [--tiny] [--steps 120] [--out FOLDER]
"""

from __future__ import annotations

import itertools

import torch
from common import BATCH, add_adapter, load_base, load_data, parse_arguments, print_ranks
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import drlora


def main() -> None:
    """Train, save, show the ranks."""
    options = parse_arguments("plain_loop")
    base, tokenizer = load_base(options.tiny)
    model = add_adapter(base, options.steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    dynamics = drlora.RankDynamics(model, total_steps=options.steps)
    data = load_data(tokenizer, options.steps)
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    loader = DataLoader(data, BATCH, shuffle=True, collate_fn=collator)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model.train()
    for batch in itertools.islice(batches, options.steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        dynamics.before_optimizer_step()
        optimizer.step()
        grants = dynamics.after_optimizer_step(optimizer)
        schedule.step()
        optimizer.zero_grad()
        if grants:
            print(f"step {dynamics.step}: loss {loss:.3f}, ranks for {len(grants)} experts")
    model.save_pretrained(options.out)
    print_ranks(dynamics)


if __name__ == "__main__":
    main()
