"""The laws that every policy of allocation keeps, to be tried out on one of your own.

    ALLOCATIONS.add("steal", Steal())
    check_allocation("steal", r_init=4, r_target=4)      # or an AssertionError that says why

There is no model: two blocks of six experts have pools, and at each event new statistics, drawn
from a seed. Whether the policy is any good is another question.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter
from drlora.config.adapter import DrLoraConfig
from drlora.config.registry import ALLOCATIONS
from drlora.moe.blocks import MoEBlock
from drlora.ranks.event import Growth
from drlora.ranks.groups import Scored, schedule_for
from drlora.ranks.policies import Policy
from drlora.ranks.schedule import Schedule, StepCounts

_EXPERTS, _STEPS = 6, 24
_DEFAULTS: dict[str, Any] = dict(
    r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=4, warmup_steps=4, settle_steps=2
)


def check_allocation(name: str, **settings: Any) -> None:
    """Run a policy through a whole run with settings of each kind.

    The laws: the experts together own what the plan allows, and exactly the budget at the end; no
    expert passes r_max, or gains more than the cap at one event; rows that change hands begin with
    B = 0, and all others stay as they are; the same run twice has the same ranks, and one that is
    resumed after its first, middle or last event, too; to be asked for a change changes nothing;
    where no expert has any saliency, all this holds as well.

    Args:
        name: what the policy is registered under in `ALLOCATIONS`.
        settings: of DrLoraConfig, such as ranks that the policy can start from. Budgets of a layer
            and of the model, and ranks of experts and of projections, are tried in turn.

    Raises:
        AssertionError: with the law that is broken, and the settings.
        ConfigError: if the policy refuses the settings, or makes a change that is none.
    """
    chosen = {**_DEFAULTS, **settings}
    options = chosen.pop("options", {})
    for scope, per in product(("layer", "model"), ("expert", "projection")):
        config = DrLoraConfig(
            **{"budget_scope": scope, **chosen, "allocation": name},
            options={"rank_per": per, **options},
        )
        said = f"allocation={name!r}, budget_scope={config.budget_scope!r}, rank_per={per!r}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no expert has any saliency")
            _check(config, False, said)
            _check(config, True, f"{said}, without any saliency")


def _check(config: DrLoraConfig, is_blind: bool, said: str) -> None:
    """One kind of settings, with statistics or without."""
    policy: Policy = ALLOCATIONS[config.allocation]
    straight = _Run(config, is_blind)
    ranks = list(straight.events(policy, said))
    again = list(_Run(config, is_blind).events(policy, said))
    assert again == ranks, f"{said}: two runs differ in ranks"
    steps = sorted(straight.saved)
    last = steps[-1] if steps else 0
    for step in {steps[0], steps[len(steps) // 2], last} if steps else ():
        resumed = _Run(config, is_blind, (straight.schedule, straight.saved[step]))
        for _ in resumed.events(policy, said, after=step):
            pass
        found = {name: _state_of(adapter) for name, adapter in resumed.adapters.items()}
        same = all(_are_equal(found[name], straight.saved[last][name]) for name in found)
        assert same, f"{said}: resumed after step {step}, the run ends with other ranks"


class _Run:
    """A run of the pools alone.

    Attributes:
        saved: step -> what a checkpoint would hold, after each event.
    """

    def __init__(
        self, config: DrLoraConfig, is_blind: bool, saved: tuple[Schedule, dict] | None = None
    ) -> None:
        self.is_blind = is_blind
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        self.adapters = {name: _make_adapter(name, config) for name in ("first", "second")}
        torch.set_rng_state(generator_state)
        if saved:
            self.schedule, state = saved
            for name, adapter in self.adapters.items():
                adapter.load_state_dict(state[name])
        else:
            self.schedule = schedule_for(self.adapters, config, _STEPS, begins=True)
        self.config = config
        self.growth = Growth(self.adapters, config, self.schedule)
        self.saved: dict[int, dict] = {}

    def events(self, policy: Policy, said: str, after: int = 0) -> Iterator[list[list[int]]]:
        """The ranks of all groups after each event that follows on step `after`."""
        for step in range(after + 1, _STEPS + 1):
            if not self.growth.is_event(step):
                continue
            self._observe(step)
            before = {name: _state_of(adapter) for name, adapter in self.adapters.items()}
            ranks = [group.ranks() for group in self.growth.groups]
            self._refuse_side_effects(policy, step, before, said)
            self.growth.event(StepCounts(step, step, step), None)
            self._check_ranks(step, ranks, said)
            self._check_rows(before, said)
            self.saved[step] = {name: _state_of(adapter) for name, adapter in self.adapters.items()}
            yield [group.ranks() for group in self.growth.groups]
        for group in self.growth.groups:
            budget = group.plan.owned(len(group.plan.event_steps))
            owned = sum(group.ranks())
            assert owned == budget, f"{said}: {owned} ranks are owned in the end, not {budget}"

    @torch.no_grad()
    def _observe(self, step: int) -> None:
        """New statistics, and rows that have learned something."""
        generator = torch.Generator().manual_seed(step)
        for adapter in self.adapters.values():
            shape, seen = adapter.frequency.shape, not self.is_blind
            adapter.frequency.copy_(torch.rand(shape, generator=generator) * seen)
            for pool in adapter.rank_pools.values():
                owned_R = pool.owner >= 0
                for statistic in (pool.importance, pool.uncertainty):
                    if statistic is not None:
                        fresh_R = torch.rand(len(owned_R), generator=generator)
                        statistic.copy_(fresh_R * owned_R * seen)
                learned = torch.rand(pool.lora_B.shape, generator=generator)
                pool.lora_B.copy_(learned * owned_R[:, None])

    def _refuse_side_effects(self, policy: Policy, step: int, before: dict, said: str) -> None:
        """Ask for the change without making it."""
        for group in self.growth.groups:
            scored: Scored = self.growth.score(group, step)
            policy.change(self.config, scored, group.plan.event_number(step))
        for name, adapter in self.adapters.items():
            same = _are_equal(_state_of(adapter), before[name])
            assert same, f"{said}: `change` itself writes into the pools of {name!r}"

    def _check_ranks(self, step: int, before: list[list[int]], said: str) -> None:
        for group, old in zip(self.growth.groups, before, strict=True):
            ranks, plan = group.ranks(), group.plan
            most = max(sum(old), plan.owned(plan.event_number(step)))
            assert sum(ranks) <= most, f"{said}: {sum(ranks)} ranks at step {step}, {most} are due"
            highest, gained = max(ranks), max(n - o for n, o in zip(ranks, old, strict=True))
            assert highest <= self.config.r_max, f"{said}: rank {highest} at step {step}"
            assert gained <= plan.cap, f"{said}: {gained} ranks at once, the cap is {plan.cap}"

    def _check_rows(self, before: dict[str, dict[str, Tensor]], said: str) -> None:
        for name, adapter in self.adapters.items():
            for projection, pool in adapter.rank_pools.items():
                place = f"pools.{projection}."
                moved_R = pool.owner != before[name][f"{place}owner"]
                kept = torch.equal(pool.lora_B[~moved_R], before[name][f"{place}lora_B"][~moved_R])
                assert kept, f"{said}: rows that stayed with their experts have changed"
                assert not pool.lora_B[moved_R].any(), f"{said}: a row changed hands with its B"


def _make_adapter(name: str, config: DrLoraConfig) -> ExpertsAdapter:
    block = MoEBlock(name, f"{name}.experts", None, _EXPERTS, hidden_size=8, expert_width=8)
    return ExpertsAdapter(block, config)


def _state_of(adapter: ExpertsAdapter) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in adapter.state_dict().items()}


def _are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())
