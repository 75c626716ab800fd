"""What users of PEFT's LoRA take for granted: tasks, hints, names, attributes, frozen adapters."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from peft import (
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import make_batch, make_config, make_model, trainable
from tiny_adapter import SETTINGS, logits, make_settings, trained
from transformers import Trainer, TrainerState, TrainingArguments

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.cli.main import main
from drlora.export.plan import apply_plan, make_plan

HEADS = {
    "SEQ_CLS": ("Qwen3MoeForSequenceClassification", AutoPeftModelForSequenceClassification),
    "TOKEN_CLS": ("Qwen3MoeForTokenClassification", AutoPeftModelForTokenClassification),
}
IDS = make_batch()["input_ids"]


def with_head(class_name, **changes):
    torch.manual_seed(0)
    config = make_config("qwen3_moe", num_labels=3, **changes)
    return getattr(transformers, class_name)(config)


def train_a_head(model, labels, steps=6):
    """With growth; the loss falls."""
    dynamics = drlora.RankDynamics(model, total_steps=8)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT used them up
@pytest.mark.parametrize("task", HEADS)
def test_classification_trains_saves_loads_and_exports(task, tmp_path, capsys):
    class_name, auto_class = HEADS[task]
    base = with_head(class_name)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    labels = torch.tensor([0, 2]) if task == "SEQ_CLS" else IDS % 3
    model = get_peft_model(base, make_settings(task_type=task))
    assert type(model).__name__ == f"PeftModel{class_name.removeprefix('Qwen3Moe')}"
    model = train_a_head(model, labels)
    wanted = model(input_ids=IDS).logits.detach()
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    again = PeftModel.from_pretrained(with_head(class_name), adapter).eval()
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    assert torch.equal(auto_class.from_pretrained(adapter)(input_ids=IDS).logits, wanted)
    card = (adapter / "README.md").read_text()
    assert f"Auto{class_name.replace('Qwen3Moe', 'Model')}.from_pretrained" in card
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    for format in ("peft", "per-expert", "merged"):
        used, folder = copy.deepcopy(model), tmp_path / format
        apply_plan(make_plan(used, format), used, batches, folder)
        if format == "merged":
            loaded = type(base).from_pretrained(folder)
        else:
            loaded = PeftModel.from_pretrained(with_head(class_name), folder)
            assert type(loaded) is type(model)
        got = loaded.eval()(input_ids=IDS).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert main(["export", str(adapter), "--format", "peft", "-o", str(tmp_path / "new")]) == 2
    assert f"task_type='{task}'" in capsys.readouterr().err


@pytest.mark.parametrize("class_name", ["Qwen3MoeModel", "Qwen3MoeForSequenceClassification"])
def test_models_that_generate_nothing_need_no_hint(class_name, tmp_path):
    """Feature extraction, and a reward model, whose one logit is trained through the experts."""
    config = make_config("qwen3_moe", num_labels=1)

    def base():
        torch.manual_seed(0)
        return getattr(transformers, class_name)(config)

    model = get_peft_model(base(), make_settings())
    assert type(model) is PeftModel and model.peft_config["default"].task_type is None
    dynamics = drlora.RankDynamics(model, total_steps=8)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model.train()
    for _ in range(6):
        out = model(input_ids=IDS)
        (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean().backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert type(loaded) is PeftModel
    assert torch.equal(loaded(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_a_causal_model_without_a_hint_generates_and_trains_in_the_trainer(tmp_path):
    model = get_peft_model(make_model(), make_settings())
    assert type(model) is PeftModel
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    arguments = TrainingArguments(
        tmp_path, max_steps=8, report_to="none", use_cpu=True, disable_tqdm=True,
        eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows), callbacks=[drlora.DrLoraCallback()],
    )  # fmt: skip
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    assert model.eval().generate(IDS, max_new_tokens=2, min_new_tokens=2).shape[1] == 14


def test_a_recipe_makes_an_adapter_for_causal_language_models():
    recipe = drlora.runs.recipe.recipe_from(
        {"model": "embedded", "output_dir": "x", "data": {"train": "embedded:arithmetic"}}
    )
    assert recipe.adapter_config().task_type == "CAUSAL_LM"


def test_layers_have_what_pefts_layers_have():
    model = trained(target_modules=["q_proj"])
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert {type(layer).__name__ for layer in layers} == {"DrLoraExperts", "ExactLinear"}
    for layer in layers:
        assert layer.cast_input_dtype_enabled is True
        assert (layer.in_features, layer.out_features) == (32, 32)


def test_input_is_not_cast_where_peft_is_told_not_to():
    model = trained(base=make_model().to(torch.bfloat16))
    (layer, *_) = adapted_layers(model, "default").values()
    seen = []
    pieces = layer.adapter("default").pieces
    layer.adapter("default").pieces = lambda dtype: seen.append(dtype) or pieces(dtype)
    inputs = torch.randn(3, 32), torch.tensor([[0], [1], [2]]), torch.ones(3, 1)
    assert layer(*inputs).dtype == torch.float32
    with disable_input_dtype_casting(model):
        assert not layer.cast_input_dtype_enabled
        layer(*inputs)
        assert logits(model).dtype == torch.bfloat16
    assert layer.cast_input_dtype_enabled
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[1, 5, 6], {"embed_tokens": [1, 5, 6]}], ids=["list", "dict"])
def test_trainable_token_indices(tokens, tied, tmp_path):
    def base():
        return make_model(tie_word_embeddings=tied)

    model = trained(base=base(), trainable_token_indices=tokens, router="train")
    weight = model.get_input_embeddings().weight
    moved = (weight - base().get_input_embeddings().weight).abs().amax(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == [1, 5, 6]
    model.save_pretrained(tmp_path / "adapter")
    for fast in (False, True):
        loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter", low_cpu_mem_usage=fast)
        assert torch.equal(logits(loaded), logits(model))
    state = drlora.adapter_state(model)
    assert any("trainable_tokens_delta" in key for key in state)
    for format in ("peft", "per-expert"):
        with pytest.raises(drlora.ConfigError, match=r"trainable_token_indices.*format merged"):
            make_plan(model, format)
    wanted = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", ["5", [1.5], {"embed_tokens": 5}, [True]])
def test_trainable_token_indices_of_another_type(value):
    with pytest.raises(drlora.ConfigError, match="trainable_token_indices=.*list of token ids"):
        make_settings(trainable_token_indices=value)


EVERYTHING = dict(router="train", target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("way", ["peft", "peft, second", "transformers", "from_pretrained"])
def test_nothing_trains_of_an_adapter_that_is_loaded_to_be_used(way, tmp_path):
    trained(**EVERYTHING).save_pretrained(tmp_path)
    if way == "transformers":
        model = make_model()
        model.load_adapter(tmp_path, is_trainable=False)
    elif way == "from_pretrained":
        model = PeftModel.from_pretrained(make_model(), tmp_path)
    else:
        model = get_peft_model(make_model(), make_settings(inference_mode=True))
        model.load_adapter(tmp_path, "other", is_trainable=False)
        model.set_adapter("other", inference_mode=True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []
    again = make_model()
    again.load_adapter(tmp_path, is_trainable=True)
    names = [name for name, p in again.named_parameters() if p.requires_grad]
    for part in (".pools.", "mlp.gate.modules_to_save", "q_proj.lora_A", "lm_head.modules_to_save"):
        assert any(part in name for name in names)


def test_a_state_dict_does_not_say_what_is_adapted():
    state = get_peft_model_state_dict(trained())
    model = make_model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(drlora.ConfigError, match="Leave state_dict out.*set_peft_model_state"):
        inject_adapter_in_model(make_settings(), model, state_dict=state)
    assert [type(module) for module in model.modules()] == before


def test_saving_a_configuration_writes_nothing_else(tmp_path):
    folder = tmp_path / "config"
    make_settings().save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["adapter_config.json"]
    model = trained()
    model.save_pretrained(tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    card.unlink()
    model.peft_config["default"].save_pretrained(tmp_path / "adapter")
    assert not card.exists()


def rows(first):
    ids = [make_batch(first + number, rows=1)["input_ids"][0].tolist() for number in range(8)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def make_trainer(folder, name, max_steps=12, **changes):
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS), adapter_name=name)
    settings = dict(
        max_steps=max_steps, per_device_train_batch_size=4, learning_rate=5e-2,
        eval_strategy="steps", eval_steps=3, save_steps=3, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    arguments = TrainingArguments(folder, **{**settings, **changes})
    return Trainer(
        model, arguments, train_dataset=rows(0), eval_dataset=rows(99),
        callbacks=[drlora.DrLoraCallback()],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_checkpoint_is_loaded_whatever_the_adapter_is_called(name, tmp_path):
    trainer = make_trainer(tmp_path, name)
    trainer.train()
    assert trainer.state.best_model_checkpoint != str(tmp_path / "checkpoint-12")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-7)


def test_resume_continues_an_adapter_with_a_name_of_its_own(tmp_path):
    whole = make_trainer(tmp_path / "whole", "mine", load_best_model_at_end=False)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", "mine", load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    one, other = (get_peft_model_state_dict(t.model, adapter_name="mine") for t in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_best_checkpoint_of_one_of_two_adapters_is_refused():
    callback = drlora.DrLoraCallback()
    model = get_peft_model(make_model(), make_settings())
    model.add_adapter("mine", make_settings())
    model.set_adapter("mine")
    state = TrainerState(max_steps=12, is_world_process_zero=False)
    arguments = SimpleNamespace(
        load_best_model_at_end=True, get_warmup_steps=lambda steps: 0, output_dir="x"
    )
    with pytest.raises(drlora.ConfigError, match="'default' into 'mine'.*Give the trained adapter"):
        callback.on_train_begin(arguments, state, None, model=model)
