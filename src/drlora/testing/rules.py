"""The laws of rules of saliency, of ways to place ranks, and of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from drlora.config.adapter import DrLoraConfig
from drlora.config.methods import METHODS
from drlora.config.registry import SALIENCIES, STARTS
from drlora.ranks.contract import check_allocation
from drlora.ranks.probe import Directions
from drlora.ranks.saliency import Signals
from drlora.ranks.starts import Evidence, Start

_EXPERTS = 6
_SEEDS = range(5)


def check_saliency(name: str, **settings: Any) -> None:
    """Ask a rule of saliency for numbers, and let ranks grow by them.

    The laws: one finite number an expert; the same numbers for the same signals, also before
    anything is known of the experts; signals are read and not written. Growth by the rule then
    keeps the laws of `check_allocation`.

    Args:
        name: what the rule is registered under in `SALIENCIES`.
        settings: of DrLoraConfig, such as the rule's own `options`.

    Raises:
        AssertionError: with the law that is broken.
    """
    rule, config = SALIENCIES[name], DrLoraConfig(**{**settings, "saliency": name})
    for seed in _SEEDS:
        for known in (True, False):
            signals = _signals(config, seed, known)
            before = [t.clone() for t in _tensors(signals)]
            said = f"saliency={name!r}, {'known' if known else 'unknown'} experts"
            found, again = rule(signals), rule(_signals(config, seed, known))
            assert isinstance(found, Tensor), f"{said}: {type(found).__name__} is no tensor"
            assert found.shape == (_EXPERTS,), f"{said}: shape {tuple(found.shape)}, not (E,)"
            assert bool(found.isfinite().all()), f"{said}: {found.tolist()} is not finite"
            assert torch.equal(found, again), f"{said}: the same signals give other numbers"
            same = all(map(torch.equal, before, _tensors(signals)))
            assert same, f"{said}: the rule writes into its signals"
    check_allocation("grow", **{**settings, "saliency": name})


def check_start(name: str, **settings: Any) -> None:
    """Place the ranks of a block by a way to start.

    The laws: r_init ranks an expert on average, to the rank; no expert above r_max, and none
    without a rank unless the way `leaves_some_out`; the same ranks for the same evidence, also
    where tokens go to one expert alone.

    Args:
        name: what the way is registered under in `STARTS`.
        settings: of DrLoraConfig.

    Raises:
        AssertionError: with the law that is broken.
    """
    start: Start = STARTS[name]
    defaults = dict(r_init=2, r_target=4, r_max=4 * _EXPERTS)
    config = DrLoraConfig(**{**defaults, **settings, "start": name})
    for seed in _SEEDS:
        for alone in (False, True):
            said = f"start={name!r}, {'one expert used' if alone else 'all experts used'}"
            ranks = start.place(_evidence(config, seed, alone), config)
            again = start.place(_evidence(config, seed, alone), config)
            assert list(ranks) == list(again), f"{said}: the same evidence gives other ranks"
            whole = all(isinstance(r, int) and not isinstance(r, bool) for r in ranks)
            assert whole and len(ranks) == _EXPERTS, f"{said}: {ranks} is not one rank an expert"
            budget = _EXPERTS * config.r_init
            assert sum(ranks) == budget, f"{said}: {sum(ranks)} ranks in all, not {budget}"
            lowest = 0 if start.leaves_some_out else 1
            fits = lowest <= min(ranks) and max(ranks) <= config.r_max
            assert fits, f"{said}: {ranks} is not within {lowest} and r_max={config.r_max}"


def check_method(name: str, **settings: Any) -> None:
    """Ask a method for its settings.

    The laws: they are settings and options that exist; they win over what is given; a configuration
    that the method has made is made again by it from its own settings, as a run does that is read
    from its record; the budget r_target is as given.

    Args:
        name: what the method is registered under in `METHODS`.
        settings: of DrLoraConfig.

    Raises:
        AssertionError: with the law that is broken.
        ConfigError: if the settings are none.
    """
    assert name in METHODS, f"method={name!r} is not registered in METHODS"
    config = DrLoraConfig.for_method(name, **settings)
    own = {key: value for key, value in asdict(config).items() if key != "record"}
    again = DrLoraConfig.for_method(name, **_without_peft_type(own))
    assert again == config, f"method={name!r} makes of its own settings {again}, not {config}"
    wanted = settings.get("r_target", DrLoraConfig().r_target)
    assert config.r_target == wanted, f"method={name!r} changes r_target to {config.r_target}"


def _without_peft_type(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("peft_type", "use_dora")}


def _signals(config: DrLoraConfig, seed: int, known: bool) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    frequency_E, importance_E = torch.rand(2, _EXPERTS, generator=generator) * known
    ranks_E = torch.randint(1, config.r_max + 1, (_EXPERTS,), generator=generator)
    return Signals(frequency_E, importance_E, ranks_E, config.gamma, seed, dict(config.options))


def _tensors(signals: Signals) -> list[Tensor]:
    return [signals.frequency_E, signals.importance_E, signals.ranks_E]


def _evidence(config: DrLoraConfig, seed: int, alone: bool) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    share_E = torch.rand(_EXPERTS, generator=generator)
    if alone:
        share_E = torch.zeros(_EXPERTS).index_fill(0, torch.tensor([seed % _EXPERTS]), 1.0)
    directions = {}
    for projection in config.projections:
        rows_EDI = torch.linalg.qr(torch.rand(_EXPERTS, config.r_max, config.r_max,
                                              generator=generator))[0]  # fmt: skip
        strength_ED = torch.rand(_EXPERTS, config.r_max, generator=generator)
        directions[projection] = Directions(rows_EDI, strength_ED.sort(descending=True)[0])
    return Evidence((share_E / share_E.sum()).tolist(), directions)
