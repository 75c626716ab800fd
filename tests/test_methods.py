"""Methods by name: each trains, spends its budget, resumes exactly, and is what its name says."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from tiny import make_batch, make_model, plain_loop, trainable
from tiny_run import save_all

import drlora
from drlora import ConfigError, DrLoraConfig
from drlora.config import SALIENCIES, STARTS
from drlora.methods import METHODS
from drlora.recipe import load_recipe
from drlora.saliency import RULES, Signals
from drlora.starts import RULES as START_RULES
from drlora.train import train

SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=2, warmup_steps=1,
                settle_steps=1, lora_alpha=8.0)  # fmt: skip
TOTAL = 9  # events after steps 3, 5 and 7
EXPERTS, LAYERS = 6, 2


def start(method, seed=0, base=None, **changes):
    """A model that is about to be trained by `method`."""
    torch.manual_seed(seed)
    config = DrLoraConfig.for_method(method, **{**SETTINGS, **changes})
    model = get_peft_model(base or make_model(), config)
    if config.start != "uniform":
        drlora.place_ranks(model, [make_batch(seed) for seed in range(3)])
    dynamics = drlora.RankDynamics(model, TOTAL)
    return model, dynamics, torch.optim.AdamW(trainable(model), lr=1e-2)


def run(method, **changes):
    """The ranks before and after a run."""
    model, dynamics, optimizer = start(method, **changes)
    before = dynamics.ranks()
    plain_loop(model, dynamics, optimizer, range(TOTAL))
    return before, dynamics.ranks()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_at_the_budget_resumes_exactly_and_loads(method, tmp_path):
    model, dynamics, optimizer = start(method)
    first = plain_loop(model, dynamics, optimizer, range(5))
    model.save_pretrained(tmp_path)
    state = dynamics.state_dict()
    moments = optimizer.state_dict()
    torch.save(moments, tmp_path / "optimizer.pt")
    losses = plain_loop(model, dynamics, optimizer, range(5, TOTAL))
    assert all(torch.isfinite(torch.tensor([*first, *losses])))
    assert dynamics.budget()[0] == LAYERS * 2 * EXPERTS * 4

    again = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    resumed = drlora.RankDynamics(again, TOTAL)
    resumed.load_state_dict(state)
    optimizer = torch.optim.AdamW(trainable(again), lr=1e-2)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert plain_loop(again, resumed, optimizer, range(5, TOTAL)) == losses
    assert resumed.ranks() == dynamics.ranks()

    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    with torch.no_grad():
        wanted = again.eval()(**make_batch(7)).logits
        assert torch.equal(loaded.eval()(**make_batch(7)).logits, wanted)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_uniform_methods_give_every_expert_the_same_rank_for_good(method):
    before, after = run(method)
    assert before == after
    assert {r for block in after.values() for ranks in block.values() for r in ranks} == {4}
    scale = DrLoraConfig.for_method(method, **SETTINGS).scaling
    assert scale == {"lora": 8 / 4, "rslora": 8 / 4**0.5}[method]


def test_static_ranks_follow_routing_and_never_change():
    before, after = run("static")
    assert before == after
    model = get_peft_model(make_model(), DrLoraConfig(**SETTINGS))
    batches = [make_batch(seed) for seed in range(3)]
    assert before == drlora.ranks_from_routing(model, batches, mean_rank=4)
    assert max(r for block in before.values() for r in block["down"]) > 4


def test_ranks_are_placed_once_and_before_training():
    model = get_peft_model(make_model(), DrLoraConfig.for_method("static", **SETTINGS))
    with pytest.raises(ConfigError, match="place_ranks"):
        drlora.RankDynamics(model, TOTAL)
    state = torch.get_rng_state()
    drlora.place_ranks(model, [make_batch()])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match="placed already"):
        drlora.place_ranks(model, [make_batch()])


def test_random_growth_ignores_statistics_and_follows_the_seed():
    """Other data, other routing and gradients: the same ranks. Another seed: others."""

    def grown(seed, data):
        model, dynamics, optimizer = start("random", seed, make_model())
        plain_loop(model, dynamics, optimizer, range(TOTAL), lambda step: make_batch(data + step))
        return dynamics.ranks()

    assert grown(0, data=0) == grown(0, data=50) != grown(1, data=0)
    blocks = list(grown(0, data=0).values())
    assert blocks[0] != blocks[1], "each block draws for itself"


def test_rules_and_their_names():
    assert set(RULES) == set(SALIENCIES) and set(START_RULES) | {"uniform"} == set(STARTS)
    f, g, ranks = torch.tensor([0.5, 0.25]), torch.tensor([3.0, 8.0]), torch.tensor([1, 3])
    signals = Signals(f, g, ranks, gamma=2.0, seed=1)
    assert RULES["product"](signals).tolist() == [1.5 / 4, 2.0 / 16]
    assert RULES["routing"](signals).tolist() == [0.5 / 4, 0.25 / 16]
    assert RULES["importance"](signals).tolist() == [3 / 4, 8 / 16]
    assert torch.equal(RULES["random"](signals), RULES["random"](signals))


def test_a_method_wins_over_settings_and_can_be_named_twice():
    config = DrLoraConfig.for_method("lora", **SETTINGS, saliency="random")
    assert (config.r_init, config.r_target, config.r_max, config.saliency) == (4, 4, 4, "product")
    with pytest.raises(ConfigError, match="method='loar' is not known.*'lora'"):
        DrLoraConfig.for_method("loar")


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_names_a_method_and_its_record_means_the_same(method, tmp_path):
    path = save_all(tmp_path, method=method)
    recipe = load_recipe(path)
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(path) == recipe and recipe.method == method
    settings = DrLoraConfig.for_method(method, r_target=3, r_init=1, r_max=8, p_grow=0.5)
    assert recipe.adapter["start"] == settings.start
    assert recipe.adapter["r_init"] == settings.r_init


@pytest.mark.parametrize("method", ["static", "drlora"])
def test_drlora_train_records_what_methods_are_compared_at(method, tmp_path):
    result = train(load_recipe(save_all(tmp_path, method=method), ["evaluation.exact_match=false"]))
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["method"] == method
    numbers = 2 * 6 * 3 * ((32 + 48) + (24 + 32))  # layers, experts, rank, gate_up and down
    assert saved["trainable_parameters"] == saved["stored_parameters"] == numbers
    grew = (tmp_path / "run" / "growth.jsonl").exists()
    assert grew == (method == "drlora")
    assert len({tuple(r) for block in result.ranks.values() for r in block.values()}) > 1
