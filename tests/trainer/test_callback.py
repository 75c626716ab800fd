"""DrLoraCallback in transformers' Trainer: clipping, skipped steps, compiled models, resume."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch._dynamo as dynamo
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel, get_peft_model
from tiny import (
    VOCAB,
    checkpoint_activations,
    checkpointing_arguments,
    make_batch,
    make_model,
    trainable,
)
from tiny_trainer import SETTINGS, STEPS, dynamics_of, make_trainer
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    TrainerCallback,
)

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.io.jsonl import read_lines
from drlora.runs.metrics_log import MetricsLog


class StopAfter(TrainerCallback):
    """Ends the run early, as a time limit would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= self.step


class Watch(TrainerCallback):
    """Keeps what a parameter was after each step."""

    def __init__(self, parameter):
        self.parameter, self.seen = parameter, [parameter.detach().clone()]

    def on_step_end(self, *_, **__):
        self.seen.append(self.parameter.detach().clone())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_signals_are_taken_after_clipping(accumulate, tmp_path):
    """A clip factor c scales the importance of all rows by c * c and no expert's share of it.

    The first step has no importance yet, because B is still zero; the second is looked at.
    """
    found = {}
    for norm in (0.0, 1e-3):
        trainer = make_trainer(
            tmp_path, max_grad_norm=norm, gradient_accumulation_steps=accumulate,
            warmup_steps=0, optim="sgd", callbacks=[StopAfter(2)], save_strategy="no",
            settings=dict(beta=0.0),
        )  # fmt: skip
        for parameter in trainable(trainer.model):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        trainer.args.learning_rate = 0.0  # so that both runs see the same weights
        trainer.train()
        norms = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
        pools = [p for a in dynamics_of(trainer).adapters.values() for p in a.rank_pools.values()]
        found[norm] = norms[1], torch.cat([pool.importance for pool in pools])
    (norm, whole), (same_norm, clipped) = found[0.0], found[1e-3]
    assert norm == pytest.approx(same_norm, rel=1e-5) and norm > 1e-2
    factor = 1e-3 / (norm + 1e-6)
    assert (whole > 0).any()
    torch.testing.assert_close(clipped, whole * factor**2, rtol=1e-3, atol=0.0)


@pytest.fixture
def overflows(monkeypatch):
    """Steps, by their number, that accelerate reports as skipped, as its GradScaler makes it do."""
    chosen, real = set(), AcceleratedOptimizer.step

    def step(self, closure=None):
        self.seen = getattr(self, "seen", 0) + 1
        self._is_overflow = self.seen in chosen
        if not self._is_overflow:
            real(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    return chosen


def test_skipped_steps_are_not_counted_and_resume_knows_it(overflows, tmp_path):
    """The Trainer counts them, the optimizer's clock does not; growth goes by the latter.

    Growth is logged under the Trainer's steps.
    """
    settings = dict(warmup_steps=2, settle_steps=3, grow_every=1)  # growth after 3, 4 and 5
    overflows.update({4, 6})
    straight = make_trainer(tmp_path / "straight", settings=settings)
    straight.train()
    assert straight.state.global_step == STEPS and dynamics_of(straight).step == STEPS - 2
    overflows.clear()
    overflows.add(4)
    make_trainer(tmp_path / "cut", settings=settings, callbacks=[StopAfter(4)]).train()
    overflows.clear()
    overflows.add(2)  # the sixth step is the second one after resuming
    resumed = make_trainer(tmp_path / "cut", settings=settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    one, other = dynamics_of(straight), dynamics_of(resumed)
    assert other.step == one.step and one.budget()[0] == one.budget()[1]
    assert all(torch.equal(other.state_dict()[k], v) for k, v in one.state_dict().items())
    logs = [(tmp_path / name / "growth.jsonl").read_text() for name in ("straight", "cut")]
    assert logs[0] == logs[1]
    assert {json.loads(line)["step"] for line in logs[0].splitlines()} == {3, 5, 7}


def test_skipped_steps_cost_no_growth_event_and_are_logged(overflows, tmp_path):
    """More of them than settle_steps leaves room for."""
    overflows.update({4, 7, 8})  # the last event is on one of them
    log = tmp_path / "metrics.jsonl"
    trainer = make_trainer(tmp_path, save_strategy="no", callbacks=[MetricsLog(log)])
    trainer.train()
    dynamics = dynamics_of(trainer)
    assert dynamics.step == STEPS - 3 and dynamics.budget()[0] == dynamics.budget()[1]
    counts = [entry.get("skipped_steps", 0) for entry in read_lines(log) if "loss" in entry]
    assert counts == [0, 0, 0, 1, 1, 1, 2, 3]


def test_a_frozen_adapter_is_refused(tmp_path):
    """As loaded without is_trainable=True: a run of it would look alive and change nothing."""
    get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_model(), tmp_path)
    trainer = make_trainer(tmp_path, model=model)
    with pytest.raises(drlora.ConfigError, match="is_trainable=True"):
        trainer.train()


def test_a_new_run_of_the_same_trainer_starts_from_step_zero(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.train()
    ranks = dynamics_of(trainer).ranks()
    trainer.train()
    assert dynamics_of(trainer).step == STEPS and dynamics_of(trainer).ranks() == ranks


def test_a_real_grad_scaler_in_a_loop():
    """Scaled until it overflows in float16 autocast: what is skipped leaves no trace in signals."""
    torch.manual_seed(0)
    tries = 200  # of which 8 are to succeed; growth waits for them
    config = drlora.DrLoraConfig(**{**SETTINGS, "settle_steps": tries + 1})
    model = get_peft_model(make_model(), config).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    dynamics = drlora.RankDynamics(model, total_steps=STEPS + tries)
    skips = 0
    for step in range(tries):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**make_batch(step)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before = dynamics.state_dict()
        dynamics.before_optimizer_step()
        finite = all(p.grad.isfinite().all() for p in trainable(model) if p.grad is not None)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
        assert skipped != finite
        dynamics.after_optimizer_step(optimizer, skipped=skipped)
        optimizer.zero_grad()
        after = dynamics.state_dict()
        if skipped:
            skips += 1
            assert after["step"] == before["step"]
            assert all(after[k].isfinite().all() for k in after)
        if dynamics.step == STEPS:
            break
    assert skips > 0 and dynamics.step == STEPS
    assert dynamics.budget()[0] == dynamics.budget()[1]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning")
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_compiled_training_equals_checkpointed_training_then_generation(family, tmp_path):
    """The Trainer's own switches: one run compiled, the other checkpointed; they must agree.

    Not both in one: then transformers' hook on the embeddings breaks the graph, at 20 s a model.
    test_compile.py has checkpointing inside of the graph.
    """
    dynamo.reset()
    runs = []
    for compiled in (False, True):
        trainer = make_trainer(
            tmp_path, base=one_layer(family), settings=dict(router="train"), save_strategy="no",
            torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None,
            **({} if compiled else checkpointing_arguments()),
        )  # fmt: skip
        router = Watch(next(p for n, p in trainer.model.named_parameters() if _is_router(n)))
        trainer.add_callback(router)
        trainer.train()
        assert torch.equal(router.seen[1], router.seen[0]), "the router moved in the warm-up"
        assert not torch.equal(router.seen[-1], router.seen[0])
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        model = trainer.model.eval()
        ids = make_batch(9)["input_ids"]
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        with torch.compiler.set_stance("force_eager"):  # or every length would be compiled
            texts = [
                model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache)
                for cache in (True, False)
            ]
        assert torch.equal(*texts)
        runs.append((losses, dynamics_of(trainer).ranks(), dynamics_of(trainer).budget(), texts[0]))
    (eager, eager_ranks, _, eager_text), (losses, ranks, budget, text) = runs
    assert dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert losses == pytest.approx(eager, rel=1e-4) and ranks == eager_ranks
    assert budget[0] == budget[1] and torch.equal(text, eager_text)
    dynamo.reset()


def _is_router(name):
    return "modules_to_save" in name


def one_layer(family):
    if family != "gpt_oss":
        return make_model(family, num_hidden_layers=1)
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=6, num_experts_per_tok=2,
        layer_types=["full_attention"], bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GptOssForCausalLM(config)


def test_several_padded_passes_before_one_backward():
    """What is computed again in the backward pass is counted with its own padding."""
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS)).train()
    checkpoint_activations(model.get_base_model())
    model.enable_input_require_grads()
    loss = 0.0
    for pad in (2, 5, 0):
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, 12 - pad :] = 0
        loss = loss + model(**make_batch(pad), attention_mask=mask, use_cache=False).loss
    loss.backward()
    for layer in adapted_layers(model, "default").values():
        assert layer.adapter("default").meter.num_tokens.item() == 3 * 24 - 7


def test_two_callbacks_each_find_their_own_step(tmp_path):
    """One adapter trains, another callback's state must not be taken for its own."""
    callback, other = drlora.DrLoraCallback(), drlora.DrLoraCallback(adapter="other")
    state = make_trainer(tmp_path).state
    state.global_step = 5
    one, two = callback.state(), other.state()
    one["attributes"]["step"], two["attributes"]["step"] = 3, 4
    state.stateful_callbacks = {"DrLoraCallback": [callback.state(), one, two]}
    assert callback._saved(state)["step"] == 3 and other._saved(state)["step"] == 4
    state.stateful_callbacks = {"DrLoraCallback": one}
    assert callback._saved(state)["step"] == 3 and other._saved(state) == {}


def test_state_goes_into_json(tmp_path):
    callback = drlora.DrLoraCallback(log_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = drlora.DrLoraCallback(**json.loads(json.dumps(callback.state()))["args"])
    assert again.log_dir == str(tmp_path) and again.adapter is None
