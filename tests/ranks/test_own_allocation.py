"""A policy of allocation that comes from outside: this file is all that it takes.

Every event moves one rank from the poorest expert (of least saliency) to the richest.
"""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_batch, make_model, plain_loop, trainable
from transformers import Trainer, TrainerCallback, TrainingArguments

import drlora
from drlora.config.options import Option
from drlora.config.registry import ALLOCATIONS
from drlora.errors import ConfigError
from drlora.ranks.contract import check_allocation
from drlora.ranks.policies import Change, Policy

SETTINGS = dict(allocation="steal", r_init=4, r_target=4, r_max=8, grow_every=3, warmup_steps=2,
                settle_steps=1, lora_dropout=0.1)  # fmt: skip
TOTAL, CUT = 24, 12  # events after steps 2, 5, ..., 23


class Steal(Policy):
    noun, done = "stealing", "stealing is over"

    def check(self, config):
        if config.r_init != config.r_target:
            raise ConfigError(
                f"allocation='steal' moves ranks and adds none: r_init={config.r_init} and "
                f"r_target={config.r_target} must be the same."
            )

    def change(self, config, scored, event):
        ranks, saliency_E = scored.group.ranks(), scored.saliency_E
        experts = range(len(ranks))
        keeps = config.option("keeps")
        poor = min((e for e in experts if ranks[e] > keeps), key=lambda e: saliency_E[e])
        rich = max((e for e in experts if ranks[e] < config.r_max), key=lambda e: saliency_E[e])
        if poor == rich:
            return Change()
        taken = [int(expert == poor) for expert in experts]
        return Change(scored.group.weakest_rows(taken), [int(e == rich) for e in experts])


@pytest.fixture(autouse=True)
def registered():
    options = {"keeps": Option(1, "the rank that nothing is stolen from", low=0)}
    ALLOCATIONS.add("steal", Steal(), options)
    yield
    ALLOCATIONS.remove("steal")


def start(**changes):
    torch.manual_seed(0)
    return get_peft_model(make_model(), drlora.DrLoraConfig(**{**SETTINGS, **changes}))


def test_it_keeps_the_contract():
    check_allocation("steal", r_init=4, r_target=4)
    check_allocation("steal", r_init=2, r_target=2, r_max=3, options={"keeps": 0})


@pytest.mark.parametrize("changes", [{}, dict(budget_scope="model")], ids=["layer", "model"])
def test_every_event_moves_one_rank_from_the_poorest_to_the_richest(changes):
    model = start(**changes)
    dynamics = drlora.RankDynamics(model, TOTAL)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    assert dynamics.event_steps == tuple(range(2, TOTAL, 3))
    moved = 0
    model.train()
    for step in range(TOTAL):
        model(**make_batch(step)).loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        event = dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()
        for scored in event.scored:
            blocks = {member.block for member in scored.group.members}
            changed = sorted(g.granted for g in event if g.block in blocks)
            assert changed in ([-1, 1], [])
            moved += bool(changed)
        owned, stored = dynamics.budget()
        wanted = 2 * 2 * 6 * 4  # blocks, projections, experts, r_target
        assert owned == wanted and stored == wanted * (2 if changes else 1)
    assert moved > 4 and dynamics.growth.done_share == 1.0


def test_a_trained_adapter_is_saved_and_loaded(tmp_path):
    model = start()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    plain_loop(model, drlora.RankDynamics(model, TOTAL), optimizer, range(TOTAL))
    wanted, ranks = model.eval()(**make_batch(99)).logits, drlora.rank_map(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["allocation"] == "steal"
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(loaded.eval()(**make_batch(99)).logits, wanted)
    assert drlora.rank_map(loaded) == ranks
    ALLOCATIONS.remove("steal")  # in inference rules decide nothing
    unknown = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(unknown.eval()(**make_batch(99)).logits, wanted)
    trainable_one = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    with pytest.raises(ConfigError, match="allocation='steal' is not known.*import the module"):
        drlora.RankDynamics(trainable_one, TOTAL, step=0)


@pytest.mark.parametrize(("ranks", "allocation"), [("keep", "grow"), ("grow", "steal")])
def test_it_can_be_continued(tmp_path, ranks, allocation):
    """With kept ranks nothing is stolen any more; otherwise it goes on."""
    model = start(options={"keeps": 2})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    plain_loop(model, drlora.RankDynamics(model, TOTAL), optimizer, range(TOTAL))
    model.save_pretrained(tmp_path)
    again = drlora.continue_adapter(make_model(), tmp_path, ranks=ranks)
    assert drlora.rank_map(again) == drlora.rank_map(model)
    assert torch.equal(again.eval()(**make_batch(9)).logits, model.eval()(**make_batch(9)).logits)
    config = again.peft_config["default"]
    assert config.allocation == allocation and config.options.get("keeps", 2) == 2
    dynamics = drlora.RankDynamics(again, TOTAL)
    assert bool(dynamics.event_steps) == (allocation == "steal")


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def train(folder, begin, end):
    """Under the Trainer, from its checkpoint of step `begin` (0 for none) to step `end`."""
    rows = [{k: v[0] for k, v in make_batch(seed, rows=1).items()} for seed in range(48)]
    arguments = TrainingArguments(
        str(folder), max_steps=TOTAL, per_device_train_batch_size=2, learning_rate=1e-2,
        weight_decay=0.1, save_steps=CUT, save_strategy="steps", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=5, logging_strategy="no",
    )  # fmt: skip
    callbacks = [drlora.DrLoraCallback(), StopAfter(end)]
    trainer = Trainer(start(), arguments, train_dataset=Dataset.from_list(rows),
                      callbacks=callbacks)  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{begin}") if begin else None)
    trainer.save_model(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def test_a_resumed_run_is_the_straight_run_to_the_bit(tmp_path):
    wanted = train(tmp_path / "straight", 0, TOTAL)
    train(tmp_path / "cut", 0, CUT)
    found = train(tmp_path / "cut", CUT, TOTAL)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    births = torch.cat([value for key, value in found.items() if key.endswith("birth")])
    assert (births > CUT).any() and ((births > 0) & (births < CUT)).any(), "events on both sides"


def test_settings_that_do_not_fit_are_the_policys_to_refuse():
    with pytest.raises(ConfigError, match="r_init=2 and r_target=4 must be the same"):
        start(r_init=2)
    with pytest.raises(ConfigError, match="options.keeps=-1"):
        start(options={"keeps": -1})
    with pytest.raises(ConfigError, match="options.keeps=1 has no effect with allocation='grow'"):
        start(allocation="grow", options={"keeps": 1})
