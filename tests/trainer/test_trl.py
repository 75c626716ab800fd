"""TRL's SFTTrainer, DPOTrainer and GRPOTrainer drive DR-LoRA like transformers' Trainer.

TRL checkpoints activations by default, so every run here does too.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import make_model
from tiny_run import make_tokenizer
from transformers import TrainerCallback

import drlora
from drlora.adapter.inject import adapted_layers

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    # TRL asks for flash attention when it packs; eager and sdpa read its position ids too.
    pytest.mark.filterwarnings("ignore:.*attention implementation.*"),
]

KINDS = ["sft", "dpo", "grpo"]
STEPS = 8  # growth after steps 3, 5 and 7
SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=2, warmup_steps=3,
                settle_steps=1, lora_alpha=8.0)  # fmt: skip
WORDS = ["abc", "defg", "hi", "jklmn", "op", "qrst", "uvw", "xyz a"] * 2
DATA = {
    "sft": [{"prompt": f"{word}:", "completion": f" {word[::-1]}"} for word in WORDS],
    "dpo": [{"prompt": f"{w}:", "chosen": f" {w[::-1]}", "rejected": f" {w} no"} for w in WORDS],
    "grpo": [{"prompt": f"{word}:"} for word in WORDS],
}
ARGUMENTS = {
    "sft": dict(per_device_train_batch_size=2, max_length=16),
    "dpo": dict(per_device_train_batch_size=2, max_length=32),
    "grpo": dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
                 beta=0.1),
}  # fmt: skip


def vowels(completions, **_):
    """A reward that differs between completions."""
    return [float(sum(c in "aeiou" for c in text)) + len(text) % 5 for text in completions]


def tiny_model():
    """One layer: what is tested is how often and with what TRL calls it."""
    return make_model(vocab_size=len(make_tokenizer()), num_hidden_layers=1)


class Tokens(TrainerCallback):
    """Notes what the meters hold at each optimizer step, before it is used: E sums and a count."""

    def __init__(self):
        self.sums = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        adapter = next(iter(adapted_layers(model, "default").values())).adapter("default")
        self.sums.append((adapter.meter.sum_E.clone(), adapter.meter.num_tokens.item()))


def make_trainer(kind, folder, *, model=None, config=None, callbacks=(), data=None, **arguments):
    """A trainer of TRL on a tiny model; the adapter goes in as `peft_config` unless it is there."""
    tokenizer = make_tokenizer()
    peft_config = None
    if model is None:
        model = tiny_model()
        peft_config = config or drlora.DrLoraConfig(**SETTINGS)
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, learning_rate=1e-2, warmup_steps=1, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, save_steps=4, logging_steps=1, seed=3,
    )  # fmt: skip
    make_arguments = getattr(trl, f"{kind.upper()}Config")
    rewards = dict(reward_funcs=vowels) if kind == "grpo" else {}
    return getattr(trl, f"{kind.upper()}Trainer")(
        model,
        args=make_arguments(**{**settings, **ARGUMENTS[kind], **arguments}),
        train_dataset=Dataset.from_list(data or DATA[kind]),
        eval_dataset=Dataset.from_list(DATA[kind][:4]),
        processing_class=tokenizer,
        peft_config=peft_config,
        # Before the callback that uses the meters up.
        callbacks=[*callbacks, drlora.DrLoraCallback()],
        **rewards,
    )


def dynamics_of(trainer):
    (callback,) = (
        c for c in trainer.callback_handler.callbacks if isinstance(c, drlora.DrLoraCallback)
    )
    return callback.dynamics


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def wrapped_model(**settings):
    config = drlora.DrLoraConfig(**{**SETTINGS, **settings})
    return get_peft_model(tiny_model(), config)


@pytest.mark.parametrize(
    ("kind", "given"), [("sft", "config"), ("sft", "model"), ("dpo", "model"), ("grpo", "config")]
)
def test_a_run_grows_saves_and_resumes_exactly(kind, given, tmp_path):
    """Losses, ranks, averages and weights of a resumed run equal the straight one's to the bit."""

    def trainer(folder, **changes):
        torch.manual_seed(0)
        model = wrapped_model(router="train") if given == "model" else None
        return make_trainer(kind, tmp_path / folder, model=model, **changes)

    straight = trainer("straight")
    straight.train()
    # As if it had been ended after its first checkpoint: what was logged later is written anew.
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))

    one, other = dynamics_of(straight), dynamics_of(resumed)
    assert one.event_steps == (3, 5, 7) and one.step == other.step == STEPS
    assert one.budget()[0] == one.budget()[1]
    assert len({rank for block in one.ranks().values() for rank in block["down"]}) > 1
    assert losses_of(straight) == losses_of(resumed) and len(losses_of(straight)) == STEPS
    wanted, got = one.state_dict(), other.state_dict()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    parameters = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in parameters)
    logs = [(tmp_path / folder / "growth.jsonl").read_text() for folder in ("straight", "cut")]
    assert logs[0] == logs[1] != ""

    straight.save_model(str(tmp_path / "saved"))
    base = tiny_model()
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
    ids = torch.randint(3, 20, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, straight.model.eval()(ids).logits)


@pytest.mark.parametrize("beta", [0.1, 0.0], ids=["reference", "no reference"])
def test_grpo_counts_policy_tokens_once(beta, tmp_path):
    """Neither generation nor the reference pass, and not twice under gradient checkpointing."""
    tokens = Tokens()
    trainer = make_trainer("grpo", tmp_path, callbacks=[tokens], beta=beta,
                           gradient_accumulation_steps=2, save_strategy="no")  # fmt: skip
    passes = []
    layer = next(iter(adapted_layers(trainer.model, "default").values()))
    layer.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.train()
    assert len(passes) > 2 * passes.count(True), "nothing but policy passes ran"
    counted = sum(count for _, count in tokens.sums)
    assert counted == trainer.state.log_history[-2]["num_tokens"] > 0
    shares = torch.stack([sums.sum() / count for sums, count in tokens.sums])
    assert ((shares > 0) & (shares <= 1)).all()  # top-k weights of a token sum to at most 1


def test_dpo_counts_policy_tokens_once(tmp_path):
    """The same with the reference pass in the loop and before it; and as many as the data has."""
    runs = []
    for precomputed in (False, True):
        torch.manual_seed(0)
        tokens = Tokens()
        make_trainer("dpo", tmp_path, callbacks=[tokens], num_train_epochs=1, save_strategy="no",
                     precompute_ref_log_probs=precomputed).train()  # fmt: skip
        runs.append(tokens.sums)
    assert len(runs[0]) == len(WORDS) // 2, "one epoch"
    in_data = sum(
        2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2  # and two ends
        for row in DATA["dpo"]
    )
    for (sums, count), (others, other_count) in zip(*runs, strict=True):
        assert count == other_count
        torch.testing.assert_close(sums, others, rtol=1e-4, atol=1e-4)
    assert sum(count for _, count in runs[0]) == in_data


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(pad_to_multiple_of=8),
        dict(packing=True),
        dict(packing=True, packing_strategy="wrapped"),
        dict(padding_free=True, max_length=None),
        dict(gradient_accumulation_steps=2, per_device_train_batch_size=1),
        dict(gradient_checkpointing=False),
        dict(gradient_checkpointing_kwargs={"use_reentrant": True}),
    ],
    ids=["padded", "padded to 8", "packed", "wrapped", "padding-free", "accumulated",
         "not checkpointed", "re-entrant"],
)  # fmt: skip
def test_sft_counts_each_token_once_and_no_padding(changes, tmp_path):
    tokens = Tokens()
    trainer = make_trainer("sft", tmp_path, callbacks=[tokens], num_train_epochs=1, max_steps=-1,
                           config=drlora.DrLoraConfig(**{**SETTINGS, "r_init": 4}),
                           save_strategy="no", **changes)  # fmt: skip
    trainer.train()
    in_data = sum(len(row["prompt"] + row["completion"]) + 1 for row in DATA["sft"])
    assert sum(count for _, count in tokens.sums) == in_data


def test_assistant_only_loss_counts_what_the_model_reads(tmp_path):
    """Routing is counted over all real tokens, as in pre-filling; the loss is on the answers."""
    tokens = Tokens()
    chat = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]}
        for word in WORDS
    ]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}:{% endif %}{% endfor %}"
    )
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        tiny_model(),
        args=trl.SFTConfig(
            str(tmp_path), num_train_epochs=1, per_device_train_batch_size=2, report_to=[],
            assistant_only_loss=True, use_cpu=True, bf16=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(chat), processing_class=tokenizer,
        peft_config=drlora.DrLoraConfig(**SETTINGS),
        callbacks=[tokens, drlora.DrLoraCallback()],
    )  # fmt: skip
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert 0 < (labels != -100).sum() < labels.numel()
    trainer.train()
    assert sum(count for _, count in tokens.sums) == sum(2 * len(word) + 2 for word in WORDS)
    assert dynamics_of(trainer).budget()[0] == dynamics_of(trainer).budget()[1]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_in_bfloat16_and_the_best_model_at_the_end(kind, tmp_path):
    """TRL's default precision; evaluation between steps counts nothing."""
    tokens = Tokens()
    changes = {} if kind == "grpo" else dict(load_best_model_at_end=True)
    trainer = make_trainer(kind, tmp_path, callbacks=[tokens], bf16=True, eval_strategy="steps",
                           eval_steps=2, save_steps=2, max_grad_norm=0.1, **changes)  # fmt: skip
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    evaluated = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(evaluated) == STEPS // 2
    assert sum(count for _, count in tokens.sums) == _tokens_seen(trainer)
    if kind == "grpo":
        return
    best = torch.tensor([entry["eval_loss"] for entry in evaluated]).argmin().item()
    assert trainer.state.best_model_checkpoint.endswith(f"-{evaluated[best]['step']}")
    saved = PeftModel.from_pretrained(tiny_model(), trainer.state.best_model_checkpoint)
    ranks = {name: layer.adapter("default").ranks()
             for name, layer in adapted_layers(saved, "default").items()}  # fmt: skip
    assert dynamics_of(trainer).ranks() == ranks


def _tokens_seen(trainer):
    """What TRL counted in training."""
    return [e["num_tokens"] for e in trainer.state.log_history if "loss" in e][-1]


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_reference_of_a_trained_adapter_is_that_adapter(kind, tmp_path):
    """TRL copies its parameters into an adapter called "ref"; the ranks must come along."""
    first = make_trainer("sft", tmp_path / "first")
    first.train()
    first.save_model(str(tmp_path / "sft"))
    base = tiny_model()
    model = PeftModel.from_pretrained(base, tmp_path / "sft", is_trainable=True)
    trainer = make_trainer(kind, tmp_path / kind, model=model)
    ids = torch.randint(3, 20, (2, 8))

    def logits(adapter):
        model.set_adapter(adapter)
        with torch.no_grad():
            found = model.eval()(ids).logits
        model.set_adapter("default")
        return found

    start = logits("default")
    assert torch.equal(logits("ref"), start)
    with model.disable_adapter(), torch.no_grad():
        assert (model(ids).logits - start).abs().max() > 1e-3, "the adapter does nothing"
    trainer.train()
    assert torch.equal(logits("ref"), start), "the reference moved"
    assert not torch.equal(logits("default"), start)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any(".ref." in name for name in trained)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_without_a_trained_adapter_the_reference_is_the_base(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, save_strategy="no")
    ids = torch.randint(3, 20, (2, 8))
    with torch.no_grad():
        wanted = tiny_model()(ids).logits
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None
    with trl.trainer.utils.use_adapter(trainer.model, None), torch.no_grad():
        assert torch.equal(trainer.model.eval()(ids).logits, wanted)


def test_a_second_adapter_grows_and_the_first_stays(tmp_path):
    model = wrapped_model()
    first = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    model.add_adapter("second", drlora.DrLoraConfig(**SETTINGS))
    model.set_adapter("second")
    trainer = make_trainer("sft", tmp_path, model=model, save_steps=4)
    trainer.train()
    dynamics = dynamics_of(trainer)
    assert dynamics.adapter_name == "second" and dynamics.budget()[0] == dynamics.budget()[1]
    assert first and all(torch.equal(model.get_parameter(n), p) for n, p in first.items())
    ranks = adapted_layers(model, "default")["model.layers.0.mlp"].adapter("default").ranks()
    assert set(ranks["down"]) == {2}
    assert (tmp_path / "checkpoint-4" / "second" / "adapter_model.safetensors").exists()


def test_a_script_places_ranks_by_the_loss_that_it_tells(tmp_path):
    """Otherwise the model's own would be wanted, and batches of pairs have none."""
    placing = {**SETTINGS, "start": "gradient", "options": {"start_a": "gradient"}}
    trainer = make_trainer("dpo", tmp_path, config=drlora.DrLoraConfig(**placing))
    with pytest.raises(drlora.ConfigError, match="loss=trainer.compute_loss"):
        trainer.train()
    (growth,) = (
        c for c in trainer.callback_handler.callbacks if isinstance(c, drlora.DrLoraCallback)
    )
    growth.loss = trainer.compute_loss
    trainer.train()
    assert growth.dynamics.budget()[0] == growth.dynamics.budget()[1]
