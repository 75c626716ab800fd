"""TRL's SFTTrainer drives DR-LoRA like transformers' Trainer: a model and one callback."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import get_peft_model
from tiny import make_model
from tiny_run import make_tokenizer

import drlora

trl = pytest.importorskip("trl")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_sft_trainer_grows_ranks_to_the_budget(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    config = drlora.DrLoraConfig(
        r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=2, warmup_steps=1, settle_steps=1
    )
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_length=16,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    callback = drlora.DrLoraCallback()
    trainer = trl.SFTTrainer(
        get_peft_model(model, config),
        args=arguments,
        train_dataset=Dataset.from_list([{"text": "abc def " * 3}] * 16),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.dynamics is not None
    spent, stored = callback.dynamics.budget()
    assert spent == stored
    ranks = {rank for block in callback.dynamics.ranks().values() for rank in block["down"]}
    assert len(ranks) > 1
