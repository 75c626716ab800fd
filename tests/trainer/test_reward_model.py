"""TRL's RewardTrainer with the callback: a score head and the ranks of experts learn together."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import make_config
from tiny_run import LETTERS, make_tokenizer
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

import drlora

WORDS = [LETTERS[i : i + 4] for i in range(16)]
PAIRS = [{"prompt": f"{w}:", "chosen": f" {w[::-1]}", "rejected": f" {w} no"} for w in WORDS]


def make_base(family):
    torch.manual_seed(0)
    config = make_config(family, vocab_size=len(make_tokenizer()), num_labels=1)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "phimoe"])
def test_the_head_and_the_experts_are_trained_and_saved(family, tmp_path):
    growth = drlora.DrLoraCallback()
    trainer = RewardTrainer(
        make_base(family),
        args=RewardConfig(
            str(tmp_path), max_steps=12, learning_rate=1e-2, warmup_steps=1, report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, save_strategy="no",
            per_device_train_batch_size=4,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
        peft_config=drlora.DrLoraConfig(
            r_init=2, r_target=4, r_max=8, grow_every=2, warmup_steps=3, settle_steps=1,
            task_type="SEQ_CLS", modules_to_save=["score"],
        ),
        callbacks=[growth],
    )  # fmt: skip
    trainer.train()
    found = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    assert growth.dynamics.budget()[0] == growth.dynamics.budget()[1]
    head = trainer.model.get_submodule("base_model.model.score").modules_to_save["default"]
    assert (head.weight - make_base(family).score.weight).abs().max() > 1e-3

    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(make_base(family), tmp_path / "saved").eval()
    ids = torch.randint(3, 20, (2, 8))
    with torch.no_grad():
        wanted = trainer.model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, wanted)
        with loaded.disable_adapter():
            assert (loaded(ids).logits - wanted).abs().max() > 1e-3
