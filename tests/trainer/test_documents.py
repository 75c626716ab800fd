"""Documents of a packed row that attend apart: the gradients of attention with a mask, for less."""

from __future__ import annotations

import copy

import pytest
import torch
from run_checks import assert_same_run, interrupt_at
from test_sft import DATA, trainer_of
from tiny import make_model
from tiny_run import make_tokenizer, save_all
from torch.nn.functional import scaled_dot_product_attention
from trl import pack_dataset

from drlora.cli.main import main
from drlora.trainer import documents

PACKED = pack_dataset(DATA, 22, "bfd")


def step(trainer, attends_apart):
    """Loss and gradients of one training step on all rows."""
    trainer.attends_apart = attends_apart
    model = trainer.model
    model.zero_grad()
    batch = trainer.data_collator([PACKED[i] for i in range(len(PACKED))])
    assert "position_ids" in batch
    trainer.current_gradient_accumulation_steps = 1  # which train() sets
    loss = trainer.training_step(model, batch, (batch["labels"] >= 0).sum())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert model.config._attn_implementation == "sdpa", "it is as it was between the steps"
    return loss, gradients


@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {}),
        ("qwen3_moe", {"num_key_value_heads": 2}),
        ("mixtral", {"sliding_window": 4, "num_key_value_heads": 2}),
        ("deepseek_v3", {}),
        ("phimoe", {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    ],
)
def test_loss_and_every_gradient(tmp_path, family, changes, checkpointing, monkeypatch):
    model = make_model(
        family, vocab_size=len(make_tokenizer()), attn_implementation="sdpa", **changes
    )
    trainer = trainer_of(tmp_path, PACKED, model, packing=True, max_length=22,
                         gradient_checkpointing=checkpointing)  # fmt: skip
    assert trainer.attends_apart, "found fit when the trainer was made"
    loss, gradients = step(trainer, attends_apart=False)
    rows = []

    def watched(query, *args, **kwargs):
        rows.append(query.shape[:3:2])
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    other, others = step(trainer, attends_apart=True)
    assert set(rows) == {(8, 15)}, "eight documents, the longest of 15 tokens"
    torch.testing.assert_close(other, loss)
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
def test_where_it_is_not_fit_attention_is_as_it_was(tmp_path, monkeypatch):
    def made(attention="sdpa", **settings):
        base = make_model(vocab_size=len(make_tokenizer()), attn_implementation=attention)
        return trainer_of(tmp_path, PACKED, base, **settings).attends_apart

    flat = dict(packing=True, max_length=22)
    assert made(**flat) and made(padding_free=True)
    assert not made(), "rows are padded"
    assert not made("eager", **flat), "what was asked for is kept"
    attend = documents.attend_apart

    def leaking(module, query, key, value, mask, position_ids=None, **settings):
        joined = torch.arange(position_ids.shape[1])[None]
        return attend(module, query, key, value, mask, position_ids=joined, **settings)

    def without_positions(*args, position_ids=None, **settings):
        return attend(*args, **settings)

    for other in (leaking, without_positions):
        monkeypatch.setitem(documents.AttentionInterface._global_mapping, documents.NAME, other)
        assert not made(**flat)


def test_held_out_rows_that_are_padded_keep_their_mask(tmp_path):
    """A packed run is measured on padded examples."""
    base = make_model(vocab_size=len(make_tokenizer()), attn_implementation="sdpa")
    trainer = trainer_of(tmp_path, PACKED, copy.deepcopy(base), packing=True, max_length=22)
    padded = trainer_of(tmp_path, DATA, base)
    batch = padded.data_collator([DATA[i] for i in range(4)])
    trainer.model.load_state_dict(padded.model.state_dict())
    losses = [one.prediction_step(one.model, dict(batch), True)[0] for one in (trainer, padded)]
    assert torch.equal(*losses)


@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
def test_a_resumed_packed_run_is_the_straight_one(tmp_path, monkeypatch):
    settings = dict(training=dict(packing=True, per_device_train_batch_size=1),
                    data=dict(max_length=40))  # fmt: skip
    straight, cut = (save_all(tmp_path / name, **settings) for name in ("straight", "cut"))
    calls = []
    attend = documents.attend_apart
    monkeypatch.setitem(
        documents.AttentionInterface._global_mapping,
        documents.NAME,
        lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs),
    )
    assert main(["train", str(straight)]) == 0
    assert len(calls) > 12, "it is attention of documents that trains"
    with monkeypatch.context() as patch:
        interrupt_at(8, patch)
        assert main(["train", str(cut)]) == 130
    assert main(["train", str(cut), "--resume"]) == 0
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "straight" / "run")
