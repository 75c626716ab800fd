"""`drlora train` is TRL's SFTTrainer: the same bits, a loss that costs less, and packed rows."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from run_checks import losses
from tiny import make_model
from tiny_run import make_tokenizer, save_all
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.cli.main import main
from drlora.data import encode_examples, load_examples, pad_token_id
from drlora.errors import ConfigError
from drlora.trainer.objectives import OBJECTIVES, OFF, OwnSettings, make_trainer
from drlora.trainer.sft import sees_other_documents

SETTINGS = dict(r_init=1, r_target=3, r_max=8, p_grow=0.5, grow_every=2, settle_steps=2,
                warmup_steps=2)  # fmt: skip
TRAINING = dict(
    max_steps=12, warmup_steps=2, learning_rate=0.01, per_device_train_batch_size=2,
    gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", report_to="none", seed=42,
    weight_decay=0.0, lr_scheduler_type="linear", use_cpu=True, disable_tqdm=True,
)  # fmt: skip
# What TRL has otherwise, and a recipe has off.
AS_IN_RECIPES = {**OFF, "router_aux_loss_coef": 0.0}


def by_command_line(folder, **training):
    """A run of the tiny recipe; returns losses and ranks."""
    same = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert main(["train", str(save_all(folder, training={**same, **training}))]) == 0
    return losses(folder / "run"), json.loads((folder / "run" / "result.json").read_text())["ranks"]


def losses_of(trainer):
    return {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


def test_the_command_line_is_a_script_of_trl_with_our_callback(tmp_path):
    """Losses and ranks, to the bit; TRL itself reads and tokenizes the data in the script."""
    found, ranks = by_command_line(tmp_path / "cli", token_metrics=True)

    folder = tmp_path / "cli"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    growth = drlora.DrLoraCallback()
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(tmp_path / "script"), **TRAINING, **AS_IN_RECIPES),
        train_dataset=Dataset.from_json(str(folder / "train.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=drlora.DrLoraConfig(**SETTINGS),
        callbacks=[growth],
    )
    trainer.train()
    assert losses_of(trainer) == found and len(found) == 12
    assert growth.dynamics.ranks() == ranks
    logged = (folder / "run" / "metrics.jsonl").read_text()
    assert "mean_token_accuracy" in logged and "entropy" in logged


def test_without_token_metrics_it_is_transformers_trainer(tmp_path):
    """The loss of the model's own head, to the bit, and nothing that was not asked for."""
    found, ranks = by_command_line(tmp_path / "cli")

    folder = tmp_path / "cli"
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(42)
    growth = drlora.DrLoraCallback()
    trainer = Trainer(
        get_peft_model(model, drlora.DrLoraConfig(**SETTINGS)),
        TrainingArguments(str(tmp_path / "script"), **TRAINING),
        train_dataset=encode_examples(
            load_examples(str(folder / "train.jsonl")), tokenizer, 64
        ).tokens,
        data_collator=DataCollatorForLanguageModeling(pad_token_id(tokenizer)),
        callbacks=[growth],
    )
    trainer.train()
    assert losses_of(trainer) == found and growth.dynamics.ranks() == ranks
    assert '"entropy"' not in (folder / "run" / "metrics.jsonl").read_text()


DOCUMENTS = [
    {"input_ids": [3 + (i * 7 + j * j) % 26 for j in range(length)]}
    for i, length in enumerate([9, 4, 12, 7, 15, 3, 11, 5])
]
DATA = Dataset.from_list([{**one, "labels": one["input_ids"]} for one in DOCUMENTS])


def trainer_of(folder, data=DATA, model=None, own=None, **arguments):
    torch.manual_seed(0)
    model = model or make_model(vocab_size=len(make_tokenizer()))
    settings = {**TRAINING, **AS_IN_RECIPES, "gradient_accumulation_steps": 1, **arguments}
    trainer = make_trainer(
        OBJECTIVES["sft"],
        own or OwnSettings(),
        continues=False,
        model=get_peft_model(model, drlora.DrLoraConfig(**SETTINGS)),
        args=SFTConfig(str(folder), **settings),
        train_dataset=data,
        eval_dataset=None,
        processing_class=make_tokenizer(),
        callbacks=[drlora.DrLoraCallback()],
    )
    for parameter in trainer.model.parameters():  # B is 0 at first, and A has no gradient
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer


def loss_and_gradients(trainer, batch):
    model = trainer.model
    model.zero_grad()
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # which train() sets
    inputs = trainer._prepare_inputs(dict(batch))
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=(batch["labels"] >= 0).sum())
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_four_ways_to_one_loss(tmp_path, padding_free, monkeypatch):
    """The model's head, the targets in chunks, TRL's head without its metrics and TRL's own."""
    found = {}
    for way in ("model", "fused", "trl", "targets"):
        if way == "targets":
            monkeypatch.setattr("drlora.evaluation.head.LEAST_VOCABULARY", 1)
        trainer = trainer_of(tmp_path, own=OwnSettings(token_metrics=way == "trl"),
                             padding_free=padding_free)  # fmt: skip
        if way == "fused":  # a CPU chooses it for no run
            trainer.way = way
            drlora.trainer.sft.add_fused_lm_head(trainer.model.get_base_model())
        assert trainer.way == way
        batch = trainer.data_collator([DATA[i] for i in range(4)])
        found[way] = loss_and_gradients(trainer, batch)
    loss, gradients = found.pop("model")
    for other, others in found.values():
        torch.testing.assert_close(other, loss)
        assert gradients and all(g.abs().max() > 0 for g in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, msg=name)


def test_a_run_with_a_large_vocabulary_grows_as_without(tmp_path, monkeypatch, capsys):
    """Losses of each step within rounding, and the same ranks; it is said once."""
    found, ranks = by_command_line(tmp_path / "plain")
    assert "targets alone" not in capsys.readouterr().out
    monkeypatch.setattr("drlora.evaluation.head.LEAST_VOCABULARY", 1)
    chunked, chunked_ranks = by_command_line(tmp_path / "chunked")
    assert capsys.readouterr().out.count("the loss is computed at the targets alone") == 1
    assert chunked_ranks == ranks and chunked.keys() == found.keys()
    for step, loss in found.items():
        assert chunked[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "setting", [dict(label_smoothing_factor=0.1), dict(torch_compile=True)], ids=str
)
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor.*:FutureWarning")
def test_what_chunks_do_not_know_is_left_to_the_model(tmp_path, monkeypatch, setting):
    monkeypatch.setattr("drlora.evaluation.head.LEAST_VOCABULARY", 1)
    assert trainer_of(tmp_path).way == "targets"
    assert trainer_of(tmp_path, **setting).way == "model"


def test_answers_are_generated_with_the_loss_of_targets_in(tmp_path, monkeypatch):
    monkeypatch.setattr("drlora.evaluation.head.LEAST_VOCABULARY", 1)
    model = trainer_of(tmp_path).model.eval()
    given = dict(input_ids=torch.tensor([[5, 9, 11]]), max_new_tokens=4, do_sample=False)
    given["attention_mask"] = torch.ones(1, 3, dtype=torch.int64)
    found = model.generate(**given)
    del model.get_base_model().forward
    assert torch.equal(found, model.generate(**given))


@pytest.mark.parametrize("setting", [dict(loss_type="dft"), dict(router_aux_loss_coef=0.01)])
def test_another_loss_is_trls_own(tmp_path, setting):
    trainer = trainer_of(tmp_path, **setting)
    assert trainer.way == "trl"
    batch = trainer.data_collator([DATA[i] for i in range(4)])
    plain = loss_and_gradients(trainer_of(tmp_path), batch)[0]
    assert (loss_and_gradients(trainer, batch)[0] - plain).abs() > 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
def test_packed_rows_are_the_same_documents(tmp_path, attention, strategy):
    """One loss, every gradient, and each token counted once: what padding holds is not there.

    A document's first token is no target in either: nothing comes before it.
    """
    model = make_model(vocab_size=len(make_tokenizer()), attn_implementation=attention)
    packed = pack_dataset(DATA, 22, strategy)
    assert len(packed) == 4 and len(DATA) == 8
    results = {}
    for name, data, settings in (
        ("padded", DATA, {}),
        ("packed", packed, dict(packing=True, packing_strategy=strategy, max_length=22)),
    ):
        trainer = trainer_of(tmp_path, data, copy.deepcopy(model), **settings)
        batch = trainer.data_collator([data[i] for i in range(len(data))])
        results[name] = loss_and_gradients(trainer, with_targets(batch))
        layer = next(iter(adapted_layers(trainer.model, "default").values()))
        results[name] += (layer.adapter("default").meter,)
        assert ("position_ids" in batch) == (name == "packed")
    (loss, gradients, meter), (other, others, packed_meter) = results.values()
    torch.testing.assert_close(other, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    tokens = sum(len(one["input_ids"]) for one in DOCUMENTS)
    assert meter.num_tokens == packed_meter.num_tokens == tokens
    torch.testing.assert_close(packed_meter.sum_E, meter.sum_E)


@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
def test_ranks_are_placed_by_rows_without_padding(tmp_path):
    """The rows of A that a padded batch of the same documents gives, of all layers."""
    model = make_model(vocab_size=len(make_tokenizer()))
    found = []
    for settings in ({}, {"padding_free": True}):
        config = drlora.DrLoraConfig.for_method("lora-all-gradient", r_target=4, r_max=4)
        torch.manual_seed(1)
        adapted = get_peft_model(copy.deepcopy(model), config)
        trainer = trainer_of(tmp_path, model=copy.deepcopy(model), **settings)
        batch = with_targets(trainer.data_collator([DATA[i] for i in range(len(DATA))]))
        assert ("max_length_q" in batch) == bool(settings)
        drlora.place_ranks(adapted, [batch])
        found.append({n: p for n, p in adapted.named_parameters() if "lora_A" in n})
    padded, flat = found
    assert len(padded) > 4
    for name, rows in padded.items():
        torch.testing.assert_close(flat[name], rows, rtol=0, atol=1e-4, msg=name)


def with_targets(batch):
    """The batch with no target at the start of a document, as packed rows have it."""
    labels = batch["labels"].clone()
    if "position_ids" not in batch:
        labels[:, 0] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_leaks_is_found(tmp_path, attention, monkeypatch):
    def fresh():
        return make_model(vocab_size=len(make_tokenizer()), attn_implementation=attention)

    trainer = trainer_of(tmp_path, model=fresh(), padding_free=True)
    assert not sees_other_documents(trainer.model, trainer.data_collator)

    def without_borders(examples):
        batch = trainer.data_collator(examples)
        return {k: batch[k] for k in ("input_ids", "labels")}  # as attention that reads none

    assert sees_other_documents(trainer.model, without_borders)
    monkeypatch.setattr("drlora.trainer.objectives.sees_other_documents", lambda *_: True)
    with pytest.raises(ConfigError, match=f"of type olmoe with attention '{attention}'"):
        trainer_of(tmp_path, model=fresh(), padding_free=True)


@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
def test_a_packed_run_from_the_command_line(tmp_path, capsys):
    """Fewer rows, and the routing of each token of a step counts once."""
    recipe = save_all(tmp_path, training=dict(packing=True, max_steps=8, save_steps=4,
                                              per_device_train_batch_size=1),
                      data=dict(max_length=40))  # fmt: skip
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert main(["train", str(recipe)]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["train"]["examples"] == 24
    assert "24 examples, packed to 6 rows" in said and "8 steps of 1 row" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["budget"]["spent"] == result["budget"]["stored"]
    assert result["after"]["loss"]["loss"] < result["before"]["loss"]["loss"]


@pytest.mark.parametrize("token_metrics", [False, True])
def test_a_row_with_nothing_to_learn_is_no_nan_and_no_divergence(tmp_path, token_metrics):
    """The rest of wrapped texts may be one token, whose label is shifted away."""
    training = dict(packing=True, packing_strategy="wrapped", per_device_train_batch_size=1,
                    token_metrics=token_metrics)  # fmt: skip
    recipe = save_all(tmp_path, training=training, data=dict(max_length=16))
    texts = [{"text": "abcdef"}] * 4 + [{"text": "aaaa"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "abc"}) + "\n")
    assert main(["train", str(recipe)]) == 0
    found = losses(tmp_path / "run").values()
    assert 0.0 in found and all(loss is not None and loss < 9 for loss in found)


def test_wrapped_packing_says_what_it_does(tmp_path, capsys):
    recipe = save_all(tmp_path, training=dict(packing=True, packing_strategy="wrapped",
                                              max_steps=12), data=dict(max_length=16))  # fmt: skip
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert "see those before them" in capsys.readouterr().out
