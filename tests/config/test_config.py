"""Settings: presets, derived values, and refusals that name the value and the way out."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora import ConfigError, DrLoraConfig
from drlora.config.methods import METHODS, Method
from drlora.config.options import Option
from drlora.config.registry import SALIENCIES
from drlora.ranks.schedule import Competitors, make_schedule

BAD = {
    "order": (dict(r_init=9, r_target=8, r_max=16), "r_init=9, r_target=8, r_max=16"),
    "order at the top": (dict(r_init=8, r_target=16, r_max=12), "r_init <= r_target <= r_max"),
    "rank zero": (dict(r_init=0), "r_init=0 must be at least 1"),
    "fraction": (dict(r_target=8.5), "r_target=8.5 must be a whole number"),
    "beta": (dict(beta=1.0), r"beta=1.0 is out of range; it must be \[0, 1\)"),
    "gamma": (dict(gamma=-1), "gamma=-1 is out of range"),
    "gamma nan": (dict(gamma=float("nan")), "gamma=nan is out of range"),
    "dropout": (dict(lora_dropout=1.5), "lora_dropout=1.5"),
    "alpha": (dict(lora_alpha=0), "lora_alpha=0 must be greater than 0"),
    "word": (dict(beta="high"), "beta='high' must be a number"),
    "p_grow": (dict(p_grow=1.5), r"p_grow=1.5 must lie in \(0, 1\], or be 'auto'"),
    "grow_every": (dict(grow_every=0), "grow_every=0 must be a whole number of steps, at least 1"),
    "half a step": (dict(grow_every=1.5), "grow_every=1.5 must be .* at least 1, or 'auto'"),
    "settle_steps": (dict(settle_steps=-1), "settle_steps=-1 must be .* at least 0, or 'auto'"),
    "automatic": (dict(p_grow="automatic"), "p_grow='automatic' must be a number"),
    "projections": (dict(projections=["gate_up", "up"]), r"\['gate_up', 'up'\] is not understood"),
    "projection": (dict(projections=["sideways"]), r"\['sideways'\] is not understood"),
    "signal": (
        dict(options={"routing_signal": "vibes"}),
        "routing_signal='vibes' is not known; choose one of",
    ),
    "rank_per": (dict(options={"rank_per": "layer"}), "rank_per='layer'"),
    "router": (dict(router=True), "router=True is not known; choose one of"),
    "engine": (dict(engine="cuda"), "engine='cuda'"),
    "clock": (dict(young_rows="new"), "young_rows='new'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused(case):
    settings, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        DrLoraConfig(**settings)


def test_presets_are_the_published_settings():
    """arXiv 2601.04823, v3 (OLMoE) and v5."""
    v3, v5 = DrLoraConfig.preset("paper-v3"), DrLoraConfig.preset("paper-v5")
    assert (v3.r_init, v3.r_target, v3.r_max) == (32, 64, 128)
    assert (v5.r_init, v5.r_target, v5.r_max) == (8, 16, 32)
    for config in (v3, v5):
        assert (config.beta, config.gamma, config.warmup_steps) == (0.9, 1.2, 0.03)
        assert config.projections == ["up", "down"] and config.option("rank_per") == "expert"
        assert config.router == "train" and config.scaling == 2.0
    for config, steps, cap in ((v3, 37_997, 9), (v5, 3_750, 2)):  # cap: floor(0.1 (r_max - r_init))
        schedule = make_schedule(config, [Competitors(64)], steps)
        assert (schedule.grow_every, schedule.settle_steps, schedule.cap) == (200, 200, cap)
    assert DrLoraConfig.preset("paper-v5", r_max=64).r_max == 64
    with pytest.raises(ConfigError, match="'paper-v9' is not known; choose one of"):
        DrLoraConfig.preset("paper-v9")


@given(r_init=st.integers(1, 8), more=st.integers(0, 8), rslora=st.booleans())
def test_scaling_does_not_depend_on_the_live_rank(r_init, more, rslora):
    config = DrLoraConfig(r_init=r_init, r_target=r_init + more, r_max=64, lora_alpha=12.0,
                          use_rslora=rslora)  # fmt: skip
    divisor = (r_init + more) ** 0.5 if rslora else r_init + more
    assert config.scaling == pytest.approx(12.0 / divisor)


def test_warmup_is_a_number_of_steps_or_a_share():
    assert DrLoraConfig(warmup_steps=0.03).resolve_warmup(38_000) == 1140
    assert DrLoraConfig(warmup_steps=7).resolve_warmup(38_000) == 7


def test_the_cap_is_not_lost_to_rounding():
    config = DrLoraConfig(r_init=10, r_target=20, r_max=40, p_grow=0.1)
    assert make_schedule(config, [], 1000).cap == 3


def test_projections_are_put_in_order():
    assert DrLoraConfig(projections=["down", "up"]).projections == ["up", "down"]


def test_a_whole_number_may_be_written_as_a_float():
    """Version 0.1 took settle_steps=20.0, so saved configurations may have it."""
    assert make_schedule(DrLoraConfig(settle_steps=0.5), [], 401).settle_steps == 201
    config = DrLoraConfig(settle_steps=20.0)
    assert config.settle_steps == 20 and isinstance(config.settle_steps, int)


OPTIONS = {
    "unknown": ({"mov_share": 0.1}, "options.mov_share=0.1 is not known; did you mean move_share"),
    "no mapping": (["move_share"], r"options=\['move_share'\] must be a mapping"),
    "share": ({"move_share": 1.5}, r"options.move_share=1.5 must be a number from 0 to 1"),
    "text": ({"start_batches": "all"}, "options.start_batches='all' must be a whole number of at"),
    "yes": ({"split_by_active": "yes"}, "options.split_by_active='yes' must be true or false"),
    "ratio": ({"b_lr_ratio": 0}, "options.b_lr_ratio=0 must be a number greater than 0"),
    "nan": ({"b_lr_ratio": float("nan")}, "options.b_lr_ratio=nan must be a number greater than 0"),
    "scale of rows along no gradient": (
        {"start_a_scale": 2.0},
        "options.start_a_scale=2.0 has no effect with options.start_a='random'",
    ),
    "scale of young rows drawn at random": (
        {"young_a_scale": 0.5},
        "options.young_a_scale=0.5 has no effect with options.young_a='random'",
    ),
    "rows along the gradient of experts without rows": (
        {"start_a": "gradient"},
        "options.start_a='gradient' has no effect with start='none'",
    ),
    "batches that nothing reads": (
        {"start_batches": 4},
        "options.start_batches=4 has no effect with start='uniform' and options.start_a='random'",
    ),
    "unused": (
        {"hot_fraction": 0.5},
        "options.hot_fraction=0.5 has no effect with start='uniform'",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_right_are_refused(case):
    options, message = OPTIONS[case]
    rules = {}
    if "start='none'" in message:
        rules = dict(start="none", r_init=4, r_target=4, r_max=4, target_modules="all-linear")
    with pytest.raises(ConfigError, match=message):
        DrLoraConfig(options=options, **rules)


def test_options_are_filled_in_and_of_the_chosen_rules():
    assert DrLoraConfig() == DrLoraConfig(options={"move_share": 0.0})
    assert DrLoraConfig(start="hot").option("hot_fraction") == 0.25
    assert "hot_fraction" not in DrLoraConfig().options
    again = DrLoraConfig(**dataclasses.asdict(DrLoraConfig(start="hot")))
    assert again == DrLoraConfig(start="hot")
    kept = DrLoraConfig.for_method("lora", options={"routing_signal": "count", "move_share": 0.5})
    assert (kept.option("routing_signal"), kept.option("move_share")) == ("count", 0.0)


IDLE = {"start_a": "gradient", "start_a_scale": 2.0, "start_batches": 4, "young_a": "probe",
        "young_a_scale": 0.5}  # fmt: skip


@pytest.mark.parametrize("method", sorted(METHODS.names()))
def test_one_set_of_options_does_for_all_methods(method):
    """What has no effect under a method is left out; what has is kept."""
    config = DrLoraConfig.for_method(method, r_init=2, r_target=4, r_max=8, options=IDLE)
    assert config.option("start_batches") == (4 if config.starts_from_data else 8)
    if config.option("start_a") == "random":
        assert config.option("start_a_scale") == 1.0


def test_a_saved_adapter_with_an_option_without_effect_is_read(tmp_path):
    config = DrLoraConfig(options={"start_a": "gradient", "start_a_scale": 2.0, "start_batches": 4})
    config.options["start_a"] = "random"  # as an earlier version let it be
    config.save_pretrained(tmp_path)
    assert DrLoraConfig.from_pretrained(tmp_path) == DrLoraConfig()


def test_a_configuration_of_version_0_1_is_read(tmp_path):
    saved = dict(
        peft_type="DRLORA", r_init=2, r_target=4, r_max=8, move_share=0.1, hot_fraction=0.25,
        routing_signal="count", use_dora=False, base_model_type="olmoe", schedule={"step": 3},
        gate_up_order="halves", experts=["model.layers.0.mlp.experts"],
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    config = DrLoraConfig.from_pretrained(tmp_path)
    assert (config.option("move_share"), config.option("routing_signal")) == (0.1, "count")
    assert config.recorded("base_model_type") == "olmoe" and config.experts == saved["experts"]
    assert config.recorded("schedule") == {"step": 3}
    config.save_pretrained(tmp_path / "again")
    assert DrLoraConfig.from_pretrained(tmp_path / "again") == config


def test_a_rule_of_ones_own_is_known_by_name():
    with pytest.raises(ConfigError, match="saliency='mine' is not known.*import the module"):
        DrLoraConfig(saliency="mine")
    assert DrLoraConfig(saliency="mine", inference_mode=True).saliency == "mine"
    SALIENCIES.add("mine", len, {"sharpness": Option(2.0, "how sharp", low=0)})
    try:
        assert DrLoraConfig(saliency="mine").option("sharpness") == 2.0
        with pytest.raises(ConfigError, match="saliency='mine' is registered already"):
            SALIENCIES.add("mine", max)
        METHODS.add("ours", Method("ours", "here", lambda given: {"saliency": "mine"}))
        config = DrLoraConfig.for_method("ours", options={"sharpness": 3})
        assert (config.saliency, config.option("sharpness")) == ("mine", 3)
    finally:
        SALIENCIES.remove("mine")
        METHODS.remove("ours")
