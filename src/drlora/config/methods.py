"""Methods by name: which settings of DrLoraConfig each one stands for.

    DrLoraConfig.for_method("static", r_target=16, r_max=64)
    drlora train RECIPE.yaml method=static

A method fixes only what makes it that method; these settings win over others that are given, so
that one recipe can be run under every name. All the rest (r_target, projections, router, engine)
is as given, and the budget is the same: E * r_target rows a block and projection. docs/methods.md
says what each is, where it comes from, and what is not alike.

A method of your own is one more entry: `METHODS.add("mine", Method(...))`, here or anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from drlora.config.options import GRADIENT_ALL, HOT_FRACTION
from drlora.config.registry import Registry

Settings = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        summary: what it does, in a line.
        source: where it was published.
        settings: from all settings as given (defaults filled in) to those that the method fixes.
    """

    summary: str
    source: str
    settings: Callable[[Mapping[str, Any]], Settings]


_PAPER = "arXiv 2601.04823"
# Every choice of DR-LoRA that another method makes otherwise.
_DR_LORA: Settings = dict(
    saliency="product", allocation="grow", start="uniform", budget_scope="layer"
)
_DR_LORA_OPTIONS: Settings = dict(rank_importance="product", start_a="random")
# Options of growth, which have no effect with another allocation.
_OF_GROWTH: Settings = dict(move_share=0.0, young_a="random")
# Rows of A as found by a probe, and their length: the same for all methods that have them.
_ALONG_GRADIENT: Settings = dict(start_a="gradient", start_a_scale=3.0)


def _choices(options: Settings | None = None, **changes: Any) -> Settings:
    """DR-LoRA's choices with changes, and its options with others on top."""
    settings = {**_DR_LORA, **changes}
    own = _OF_GROWTH if settings["allocation"] == "grow" else {}
    return {**settings, "options": {**_DR_LORA_OPTIONS, **own, **(options or {})}}


def _uniform(given: Mapping[str, Any], options: Settings | None = None) -> Settings:
    rank = given["r_target"]
    return _choices(options, r_init=rank, r_max=rank)


def _beside(
    given: Mapping[str, Any], layers: str, start: str = "uniform", options: Settings | None = None
) -> Settings:
    """Ordinary LoRA on `layers`, out of the budget of the experts."""
    beside = {"common_budget": True, **(options or {})}
    return _uniform(given, beside) | _ranks_of(layers) | {"start": start}


def _ranks_of(layers: str) -> Settings:
    """Of ordinary LoRA, by the common budget."""
    return {"target_modules": layers, "target_rank": None, "target_alpha": None}


def _hot(given: Mapping[str, Any]) -> Settings:
    rank = given["r_target"]
    fraction = given["options"].get("hot_fraction", HOT_FRACTION.default)
    r_max = math.ceil(rank / HOT_FRACTION.check("hot_fraction", fraction) - 1e-9)
    return _choices(r_init=rank, r_max=r_max, start="hot")


def _hot_published(given: Mapping[str, Any]) -> Settings:
    """Hot experts have r_target, as in LoRA: a quarter of the experts, so one of the budget."""
    rank = given["r_target"]
    quarter = {"hot_fraction": 0.25, "budget_share": 0.25}
    return _choices(quarter, r_init=rank, r_max=4 * math.ceil(rank / 4), start="hot")


def _adalora(given: Mapping[str, Any]) -> Settings:
    rank = math.ceil(1.5 * given["r_target"])
    return _choices(
        {"rank_importance": "sensitivity", "rank_per": "projection"},
        r_init=rank,
        r_max=rank,
        allocation="prune",
        budget_scope="model",
        beta=0.85,
    )


def _epng(given: Mapping[str, Any]) -> Settings:
    return _choices(
        {"routing_signal": "probability", "move_share": 0.1, "young_a": "orthogonal"},
        r_init=given["r_target"],
        r_max=max(given["r_max"], given["r_target"] + 1),
        saliency="routing",
        gamma=0.0,
    )


def _informed(given: Mapping[str, Any], options: Settings | None = None) -> Settings:
    first = max(1, 3 * given["r_target"] // 4)
    return _choices(
        {**_ALONG_GRADIENT, "young_a": "gradient", **(options or {})},
        r_init=first,
        young_rows="shared",
        settle_steps=0.5,
    )


def _all_informed(given: Mapping[str, Any]) -> Settings:
    options = {"common_budget": True, "start_a": GRADIENT_ALL}
    return _informed(given, options) | _ranks_of("all-linear")


def _dr_lora(**changes: Any) -> Callable[[Mapping[str, Any]], Settings]:
    return lambda given: _choices(**changes)


METHODS: Registry[Method] = Registry("method")
METHODS.add("lora", Method("every expert has rank r_target", "arXiv 2106.09685", _uniform))
METHODS.add(
    "rslora",
    Method(
        "LoRA, scaled by alpha / sqrt(r)",
        "arXiv 2312.03732",
        lambda given: {**_uniform(given), "use_rslora": True},
    ),
)
METHODS.add(
    "lora-plus",
    Method(
        "LoRA, B learns 16 times faster than A",
        "arXiv 2402.12354",
        lambda given: _uniform(given, {"b_lr_ratio": 16.0}),
    ),
)
METHODS.add(
    "lora-gradient",
    Method(
        "LoRA, A starts along the gradient that a few batches give each expert",
        "after arXiv 2407.05000 (LoRA-GA), by a probe",
        lambda given: _uniform(given, _ALONG_GRADIENT),
    ),
)
METHODS.add(
    "lora-shared-outer",
    Method(
        "LoRA, A of gate and up and B of down common to all experts, at a larger rank",
        "the layout of Megatron-Bridge, SGLang and Tinker",
        lambda given: _uniform(given, {"shared_outer": True}),
    ),
)
METHODS.add(
    "lora-attention",
    Method(
        "LoRA on the attention layers alone, at the rank that spends the experts' budget",
        "arXiv 2106.09685",
        lambda given: _beside(given, "all-attention", start="none"),
    ),
)
METHODS.add(
    "lora-all-linear",
    Method(
        "LoRA on experts and all other linear layers at one rank, within the experts' budget",
        "PEFT's all-linear, after arXiv 2305.14314 (QLoRA)",
        lambda given: _beside(given, "all-linear"),
    ),
)
METHODS.add(
    "lora-all-linear-gradient",
    Method(
        "LoRA on experts and all other linear layers, A of the experts starts along the gradient",
        "lora-all-linear with lora-gradient",
        lambda given: _beside(given, "all-linear", options=_ALONG_GRADIENT),
    ),
)
METHODS.add(
    "lora-all-gradient",
    Method(
        "LoRA on experts and all other linear layers, A of all of them starts along the gradient",
        "lora-all-linear with lora-gradient, after arXiv 2407.05000 (LoRA-GA)",
        lambda given: _beside(
            given, "all-linear", options={**_ALONG_GRADIENT, "start_a": GRADIENT_ALL}
        ),
    ),
)
METHODS.add(
    "lora-active",
    Method(
        "LoRA of rank r_target / (experts a token uses): a smaller budget",
        "LoRA Without Regret, Thinking Machines Lab 2025",
        lambda given: _uniform(given, {"split_by_active": True}),
    ),
)
METHODS.add(
    "adalora",
    Method(
        "starts at 1.5 r_target and prunes the least important ranks of all layers",
        "arXiv 2303.10512",
        _adalora,
    ),
)
METHODS.add(
    "hot",
    Method(
        "only the most used quarter of each block's experts, with all of its ranks",
        "arXiv 2603.24044 (MoE-Sieve), arXiv 2605.18795 (HELLoRA)",
        _hot,
    ),
)
METHODS.add(
    "hot-published",
    Method(
        "the most used quarter of each block's experts at rank r_target: a quarter of the budget",
        "arXiv 2603.24044 (MoE-Sieve), arXiv 2605.18795 (HELLoRA)",
        _hot_published,
    ),
)
METHODS.add(
    "static",
    Method(
        "ranks in proportion to how often tokens use the experts, placed before the first step",
        f"control for {_PAPER}",
        lambda given: _choices(r_init=given["r_target"], start="routing"),
    ),
)
METHODS.add(
    "gradient",
    Method(
        "ranks and rows of A along the gradient that a few batches give each expert, then fixed",
        "after arXiv 2502.12171 (GoRA) and 2407.05000 (LoRA-GA), by a probe",
        lambda given: _choices(_ALONG_GRADIENT, r_init=given["r_target"], start="gradient"),
    ),
)
METHODS.add(
    "random",
    Method(
        "growth as in DR-LoRA, to experts drawn at random",
        f"control for {_PAPER}",
        _dr_lora(saliency="random"),
    ),
)
METHODS.add(
    "epng",
    Method(
        "ranks move to experts of large router probability, new rows orthogonal",
        "after arXiv 2607.01789 (EPnG)",
        _epng,
    ),
)
METHODS.add("drlora", Method("ranks grow by saliency f g / (r + 1) ** gamma", _PAPER, _dr_lora()))
METHODS.add(
    "drlora-no-routing",
    Method("DR-LoRA without f", f"ablation of {_PAPER}", _dr_lora(saliency="importance")),
)
METHODS.add(
    "drlora-no-importance",
    Method("DR-LoRA without g", f"ablation of {_PAPER}", _dr_lora(saliency="routing")),
)
METHODS.add(
    "drlora-no-penalty",
    Method("DR-LoRA without the rank penalty", f"ablation of {_PAPER}", _dr_lora(gamma=0.0)),
)
METHODS.add(
    "drlora-global",
    Method(
        "DR-LoRA, all layers compete for one budget",
        f"ablation of {_PAPER}",
        _dr_lora(budget_scope="model"),
    ),
)
METHODS.add(
    "drlora-frozen-router",
    Method("DR-LoRA, router frozen", f"ablation of {_PAPER}", _dr_lora(router="frozen")),
)
METHODS.add(
    "drlora-trained-router",
    Method("DR-LoRA, router trained after the warm-up", _PAPER, _dr_lora(router="train")),
)


METHODS.add(
    "drlora-released",
    Method(
        "DR-LoRA by its released script: counts, signed sums added, router never trained",
        "github.com/gz-d/dr-lora",
        lambda given: _choices(
            {"routing_signal": "count", "rank_importance": "released"},
            router="frozen",
            young_rows="shared",
        ),
    ),
)
METHODS.add(
    "drlora-informed",
    Method(
        "three quarters of the ranks start along the gradient, saliency soon places the rest",
        "here",
        _informed,
    ),
)
METHODS.add(
    "drlora-all-informed",
    Method(
        "drlora-informed, and LoRA on all other linear layers along the gradient, in one budget",
        "drlora-informed with lora-all-gradient",
        _all_informed,
    ),
)


def method_settings(name: str, given: Mapping[str, Any]) -> Settings:
    """What the method fixes, if all settings are as `given`.

    Raises:
        ConfigError: if there is no such method.
    """
    return METHODS[name].settings(given)
