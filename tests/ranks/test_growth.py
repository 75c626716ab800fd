"""Laws 3 and 5: growth changes no function and no old row; free rows are inert."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_model, plain_loop, trainable

import drlora
from drlora.adapter.inject import adapted_layers

SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=4, warmup_steps=1,
                settle_steps=2, lora_alpha=8.0)  # fmt: skip
TOTAL = 15  # events after steps 5, 9 and 13

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
}


def start(total=TOTAL, optimizer="adamw", **changes):
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**{**SETTINGS, **changes}))
    return model, drlora.RankDynamics(model, total), OPTIMIZERS[optimizer](trainable(model))


def pools(model):
    return [
        pool
        for layer in adapted_layers(model, "default").values()
        for pool in layer.drlora_adapters["default"].pools.values()
    ]


@pytest.mark.parametrize("engine", ["naive", "loop", "grouped"])
@pytest.mark.parametrize("rank_per", ["expert", "projection"])
def test_growth_leaves_the_function_unchanged(rank_per, engine):
    model, dynamics, optimizer = start(options={"rank_per": rank_per}, engine=engine)
    grown = 0
    for step in range(TOTAL):
        model.train()
        model(**make_batch(step)).loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        model.eval()
        before = model(**make_batch(99)).logits
        grants = dynamics.after_optimizer_step(None)  # without an optimizer: growth alone
        after = model(**make_batch(99)).logits
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
        optimizer.zero_grad()
        grown += len(grants)
    assert grown > 3
    assert dynamics.budget()[0] == dynamics.budget()[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_old_rows_moments_and_parameters_are_untouched_by_growth(optimizer):
    model, dynamics, optimizer = start(optimizer=optimizer)
    plain_loop(model, dynamics, optimizer, range(4))
    model(**make_batch(4)).loss.backward()
    dynamics.before_optimizer_step()
    optimizer.step()
    parameters = trainable(model)
    weights = [p.detach().clone() for p in parameters]
    moments = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()
                if v is not None} for p in parameters]  # fmt: skip
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    owners = [pool.owner.clone() for pool in pools(model)]
    owned = {id(p): pool.owner >= 0 for pool in pools(model) for p in (pool.lora_A, pool.lora_B)}
    owned = {key: mask.clone() for key, mask in owned.items()}
    assert dynamics.after_optimizer_step(optimizer), "step 5 is an event"
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    assert [id(p) for p in trainable(model)] == [id(p) for p in parameters]
    for parameter, weight, moment in zip(parameters, weights, moments, strict=True):
        old = owned[id(parameter)]
        assert torch.equal(parameter[old], weight[old])
        for key, value in moment.items():
            now = torch.as_tensor(optimizer.state[parameter][key])
            assert torch.equal(now, value) if now.dim() == 0 else torch.equal(now[old], value[old])
    for pool, owner in zip(pools(model), owners, strict=True):
        assert torch.equal(pool.owner[owner >= 0], owner[owner >= 0])
        assert (pool.owner != owner).any()


@pytest.mark.parametrize("engine", ["naive", "loop", "grouped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_free_rows_have_no_gradient_and_no_moments(optimizer, engine):
    model, dynamics, optimizer = start(optimizer=optimizer, engine=engine)
    initial = [pool.lora_B.detach().clone() for pool in pools(model)]
    for step in range(11):
        model.train()
        model(**make_batch(step)).loss.backward()
        dynamics.before_optimizer_step()
        for pool in pools(model):
            free = pool.owner < 0
            assert free.any() and (pool.lora_A.grad[free] == 0).all()
            assert (pool.lora_B.grad[free] == 0).all()
        optimizer.step()
        dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()
    for pool, b in zip(pools(model), initial, strict=True):
        free = pool.owner < 0
        assert free.any()
        assert torch.equal(pool.lora_B[free], b[free])
        for parameter in (pool.lora_A, pool.lora_B):
            for key, value in optimizer.state[parameter].items():
                if key != "step" and value is not None:
                    assert (value[free] == 0).all(), key


def test_one_rank_per_expert_or_one_per_projection():
    for rank_per, alike in (("expert", True), ("projection", False)):
        model, dynamics, optimizer = start(options={"rank_per": rank_per})
        plain_loop(model, dynamics, optimizer, range(TOTAL))
        ranks = dynamics.ranks().values()
        assert all(block["gate_up"] == block["down"] for block in ranks) == alike
        for block in ranks:
            assert sum(block["gate_up"]) == sum(block["down"]) == 6 * 4


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_weight_decay_does_not_wear_out_free_rows(kind):
    """Decay shrinks rows that nobody reads; a row that wakes up starts at full size again."""
    model, dynamics, _ = start()
    optimizer = kind(trainable(model), lr=1e-2, weight_decay=5.0)
    plain_loop(model, dynamics, optimizer, range(5))
    for pool in pools(model):
        young, free = pool.birth == 5, pool.owner < 0
        fresh = 1 / (3 * pool.lora_A.shape[1]) ** 0.5  # of the uniform draw
        assert young.any() and pool.lora_A[free].std() < 0.9 * fresh
        assert pool.lora_A[young].std().item() == pytest.approx(fresh, rel=0.15)
        assert (pool.lora_B[young] == 0).all()
        assert (optimizer.state[pool.lora_A]["exp_avg"][young] == 0).all()


def test_without_weight_decay_growth_writes_no_weight_at_all():
    model, dynamics, _ = start()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    plain_loop(model, dynamics, optimizer, range(4))
    model(**make_batch(4)).loss.backward()
    dynamics.before_optimizer_step()
    optimizer.step()
    before = [p.detach().clone() for p in trainable(model)]
    assert dynamics.after_optimizer_step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(trainable(model), before, strict=True))


def test_grants_tell_who_and_why():
    model, dynamics, optimizer = start()
    plain_loop(model, dynamics, optimizer, range(4))
    model(**make_batch(4)).loss.backward()
    dynamics.before_optimizer_step()
    adapters = dict(dynamics.adapters)
    signals = {
        name: (a.frequency.clone(), [p.importance.clone() for p in a.pools.values()])
        for name, a in adapters.items()
    }
    optimizer.step()
    grants = dynamics.after_optimizer_step(optimizer)
    for grant in grants:
        frequency, importance = signals[grant.block]
        assert grant.step == 5 and grant.granted > 0 and grant.rank == 2 + grant.granted
        assert grant.routing == pytest.approx(frequency[grant.expert].item())
        rows = [2 * grant.expert, 2 * grant.expert + 1]
        mean = torch.stack([values[rows] for values in importance]).mean().item()
        assert grant.importance == pytest.approx(mean)
        wanted = grant.routing * grant.importance / 3**1.2
        assert grant.saliency == pytest.approx(wanted)


@pytest.mark.parametrize("reset", ["grown", "all"])
def test_importance_restarts_after_an_event(reset):
    model, dynamics, optimizer = start(options={"importance_reset": reset})
    plain_loop(model, dynamics, optimizer, range(4))
    model(**make_batch(4)).loss.backward()
    dynamics.before_optimizer_step()
    frequencies = [a.frequency.clone() for a in dynamics.adapters.values()]
    before = [pool.importance.clone() for pool in pools(model)]
    optimizer.step()
    grown = {(g.block, g.expert) for g in dynamics.after_optimizer_step(optimizer)}
    for adapter, frequency in zip(dynamics.adapters.values(), frequencies, strict=True):
        assert torch.equal(adapter.frequency, frequency), "f is kept"
    position = 0
    for name, adapter in dynamics.adapters.items():
        for pool in adapter.pools.values():
            for row, owner in enumerate(pool.owner.tolist()):
                if owner < 0:
                    continue
                zeroed = reset == "all" or (name, owner) in grown
                wanted = 0.0 if zeroed else before[position][row].item()
                assert pool.importance[row].item() == wanted
            position += 1


def test_settings_that_cannot_reach_the_budget_are_refused_before_training():
    with pytest.raises(drlora.ConfigError, match="grow_every"):
        start(grow_every=200, p_grow=0.1)


def test_growth_without_any_signal_is_told_about():
    """Evaluation mode all along: nothing was observed, so the order is only that of the numbers."""
    model, dynamics, optimizer = start()
    with pytest.warns(UserWarning, match="no expert has any saliency"):
        for step in range(TOTAL):
            model.eval()(**make_batch(step)).loss.backward()
            dynamics.before_optimizer_step()
            optimizer.step()
            dynamics.after_optimizer_step(optimizer)
            optimizer.zero_grad()
    assert dynamics.budget()[0] == dynamics.budget()[1]


def test_the_trained_state_is_the_budgets_to_the_byte_before_and_after_growth():
    """Weights, gradients and two moments of E * r_target rows, whatever r_init and r_max are."""
    wanted = None
    for r_init, r_max in ((2, 8), (3, 40), (4, 4)):
        model, dynamics, optimizer = start(r_init=r_init, r_max=r_max)
        parameters = [p for pool in pools(model) for p in (pool.lora_A, pool.lora_B)]
        row_bytes = sum(p[0].nbytes for p in parameters)
        wanted = wanted or 4 * 6 * 4 * row_bytes
        for step in range(TOTAL):
            optimizer.zero_grad()
            model.train()(**make_batch(step)).loss.backward()
            dynamics.before_optimizer_step()
            optimizer.step()
            dynamics.after_optimizer_step(optimizer)
            kept = [t for p in parameters for t in (p, p.grad, *optimizer.state[p].values())]
            assert sum(t.untyped_storage().nbytes() for t in kept if t.dim()) == wanted
        assert trainable(model) and len(parameters) == len(trainable(model))


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])  # ZeRO-3's, and that of ZeRO-1 and 2
def test_gradients_that_an_engine_keeps_to_itself_are_not_taken_for_zero(mark):
    model, dynamics, _ = start()
    for pool in pools(model):
        setattr(pool.lora_A, mark, 1)
    with pytest.raises(drlora.ConfigError, match="DeepSpeed ZeRO keeps the gradients to itself"):
        dynamics.before_optimizer_step()
    model, dynamics, _ = start(saliency="routing")
    for pool in pools(model):
        setattr(pool.lora_A, mark, 1)
    dynamics.before_optimizer_step()


class ScheduleFree(torch.optim.Optimizer):
    """SGD that keeps a second iterate under `name`, which gradients move, and goes after it.

    As schedule-free optimizers do; `z` is their name for it.
    """

    def __init__(self, parameters, name="z", weight_decay=0.0):
        super().__init__(parameters, {"lr": 1e-2, "weight_decay": weight_decay})
        self.name = name

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            iterate = state.setdefault(self.name, parameter.detach().clone())
            parameter.lerp_(iterate, 0.1)
            iterate.sub_(1e-2 * parameter.grad)


@pytest.mark.parametrize("allocation", ["grow", "prune"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:ScheduleFree has no second moment")
def test_iterates_of_an_optimizer_begin_where_rows_do(allocation, weight_decay):
    """Weights are no moments: with zeros there, rows that change hands would be pulled to zero."""
    start_at = {"r_init": 6} if allocation == "prune" else {}
    model, dynamics, _ = start(allocation=allocation, **start_at)
    optimizer = ScheduleFree(trainable(model), weight_decay=weight_decay)
    owners = [pool.owner.clone() for pool in pools(model)]
    plain_loop(model, dynamics, optimizer, range(5))
    for pool, before in zip(pools(model), owners, strict=True):
        rows = pool.owner != before
        assert rows.any()
        for parameter in (pool.lora_A, pool.lora_B):
            assert torch.equal(optimizer.state[parameter]["z"][rows], parameter.detach()[rows])
    norms = [pool.lora_A.detach().norm(dim=1) for pool in pools(model)]
    plain_loop(model, dynamics, optimizer, range(5, 8))
    for pool, before in zip(pools(model), norms, strict=True):
        torch.testing.assert_close(pool.lora_A.detach().norm(dim=1), before, rtol=0.1, atol=0)


def test_what_an_optimizer_keeps_under_an_unknown_name_is_told_once():
    model, dynamics, _ = start()
    optimizer = ScheduleFree(trainable(model), name="of_its_own")
    with pytest.warns(UserWarning) as told:
        plain_loop(model, dynamics, optimizer, range(TOTAL))
    said = [str(w.message) for w in told if "of_its_own" in str(w.message)]
    assert len(said) == 1 and "ScheduleFree keeps ['of_its_own'] for each weight" in said[0]
