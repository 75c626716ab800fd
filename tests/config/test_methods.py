"""Methods by name: each trains, spends its budget, resumes exactly, and is what its name says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from tiny import make_batch, make_model, plain_loop, trainable
from tiny_run import save_all

import drlora
from drlora import ConfigError, DrLoraConfig
from drlora.adapter.inject import adapted_layers
from drlora.adapter.pool import RankPool
from drlora.config.methods import METHODS
from drlora.config.options import GENERAL
from drlora.config.registry import SALIENCIES, STARTS
from drlora.ranks.continue_adapter import continue_adapter
from drlora.ranks.probe import probe_gradients
from drlora.ranks.rank_map import free_parameters
from drlora.ranks.saliency import RANK_IMPORTANCES, RowSums, Signals, row_sums
from drlora.runs.recipe import load_recipe
from drlora.runs.train import train

SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=2, warmup_steps=3,
                settle_steps=1, lora_alpha=8.0)  # fmt: skip
TOTAL = 9  # events after steps 3, 5 and 7
EXPERTS, LAYERS = 6, 2
SHARED_RANK = 7  # 4 x 6 (24 + 24) / (24 + 6 x 24), rounded: two widths of 12, three of 8


def start(method, seed=0, base=None, **changes):
    """A model that is about to be trained by `method`."""
    torch.manual_seed(seed)
    if method in METHODS:
        config = DrLoraConfig.for_method(method, **{**SETTINGS, **changes})
    else:
        config = DrLoraConfig(**{**SETTINGS, **SETTINGS_BESIDE[method], **changes})
    model = get_peft_model(base or make_model(), config)
    if config.starts_from_data:
        drlora.place_ranks(model, [make_batch(seed) for seed in range(3)])
    dynamics = drlora.RankDynamics(model, TOTAL)
    return model, dynamics, make_optimizer(model, config)


def make_optimizer(model, config):
    """AdamW, with LoRA+'s groups where the settings ask for them."""
    if config.option("b_lr_ratio") == 1:
        return torch.optim.AdamW(trainable(model), lr=1e-2)
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=config.option("b_lr_ratio")
    )


@pytest.mark.parametrize("grows", [False, True])
def test_what_is_asked_of_young_rows_is_told_to_be_idle_where_no_rank_grows(grows):
    options = {"young_a": "gradient", "young_a_scale": 2.0}
    config = DrLoraConfig(r_init=2, r_target=4 if grows else 2, r_max=8, options=options)
    model = get_peft_model(make_model(), config)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        drlora.RankDynamics(model, TOTAL)
    said = [str(one.message) for one in told if "change nothing" in str(one.message)]
    assert len(said) == (0 if grows else 1)
    assert grows or "young_a='gradient', young_a_scale=2.0 change nothing" in said[0]


def run(method, **changes):
    """The ranks before and after a run."""
    model, dynamics, optimizer = start(method, **changes)
    before = dynamics.ranks()
    plain_loop(model, dynamics, optimizer, range(TOTAL))
    return before, dynamics.ranks()


SETTINGS_BESIDE = {  # what has no name of its own
    "placed": dict(start="routing"),
    "floor": dict(budget_scope="model", options={"layer_floor": 0.5}),
    "moving": dict(options={"move_share": 0.25}),
    "young": dict(options={"young_a": "gradient"}),
    "young-probe": dict(options={"young_a": "probe", "young_a_scale": 2.0}),
    "probed": dict(start="gradient", options={"start_a": "gradient"}),
    "beside": dict(target_modules="all-linear", options={"common_budget": True}),
}


@pytest.mark.parametrize("method", [*METHODS, *SETTINGS_BESIDE])
def test_every_method_trains_at_the_budget_resumes_exactly_and_loads(method, tmp_path):
    model, dynamics, optimizer = start(method)
    first = plain_loop(model, dynamics, optimizer, range(5))
    model.save_pretrained(tmp_path)
    state = dynamics.state_dict()
    moments = optimizer.state_dict()
    torch.save(moments, tmp_path / "optimizer.pt")
    losses = plain_loop(model, dynamics, optimizer, range(5, TOTAL))
    assert all(torch.isfinite(torch.tensor([*first, *losses])))
    rank = {"lora-active": 2, "lora-shared-outer": SHARED_RANK, "lora-attention": 0,
            "lora-all-linear": 3, "lora-all-linear-gradient": 3, "lora-all-gradient": 3,
            "drlora-all-informed": 3, "beside": 3,
            "hot-published": 1}.get(method, 4)  # fmt: skip
    assert dynamics.budget()[0] == LAYERS * 2 * EXPERTS * rank

    again = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    resumed = drlora.RankDynamics(again, TOTAL)
    resumed.load_state_dict(state)
    optimizer = make_optimizer(again, resumed.config)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert plain_loop(again, resumed, optimizer, range(5, TOTAL)) == losses
    assert resumed.ranks() == dynamics.ranks()

    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    with torch.no_grad():
        wanted = again.eval()(**make_batch(7)).logits
        assert torch.equal(loaded.eval()(**make_batch(7)).logits, wanted)
        merged = loaded.merge_and_unload()(**make_batch(7)).logits
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "rslora", "lora-gradient"])
def test_uniform_methods_give_every_expert_the_same_rank_for_good(method):
    before, after = run(method)
    assert before == after
    assert {r for block in after.values() for ranks in block.values() for r in ranks} == {4}
    scale = DrLoraConfig.for_method(method, **SETTINGS).scaling
    assert scale == 8 / 4**0.5 if method == "rslora" else 8 / 4


def test_static_ranks_follow_routing_and_never_change():
    before, after = run("static")
    assert before == after
    model = get_peft_model(make_model(), DrLoraConfig(**SETTINGS))
    batches = [make_batch(seed) for seed in range(3)]
    assert before == drlora.ranks_from_routing(model, batches, mean_rank=4)
    assert max(r for block in before.values() for r in block["down"]) > 4


def test_gradient_ranks_follow_the_probe_and_never_change():
    before, after = run("gradient")
    assert before == after and before != run("static")[0]
    settings = {**SETTINGS, "r_init": 4, "start": "gradient"}
    model = get_peft_model(make_model(), DrLoraConfig(**settings))
    drlora.place_ranks(model, [make_batch(seed) for seed in range(3)])
    assert drlora.rank_map(model) == before
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


def test_hot_only_leaves_the_rest_at_rank_0():
    """A quarter of 6 experts, rounded up, share the whole budget of a block."""
    before, after = run("hot")
    assert before == after
    model = get_peft_model(make_model(), DrLoraConfig(**SETTINGS))
    routed = drlora.ranks_from_routing(model, [make_batch(s) for s in range(3)], mean_rank=4)
    for name, block in after.items():
        assert sorted(block["down"]) == [0, 0, 0, 0, 12, 12] and block["gate_up"] == block["down"]
        hot = [e for e, rank in enumerate(block["down"]) if rank]
        assert max(range(6), key=routed[name]["down"].__getitem__) in hot


def test_hot_as_published_gives_hot_experts_lora_s_rank_and_scaling():
    before, after = run("hot-published", r_target=8)
    assert before == after
    for block in after.values():  # E * 2 ranks on 2 of 6 experts, since a quarter is rounded up
        assert sorted(block["down"]) == [0, 0, 0, 0, 6, 6] and block["gate_up"] == block["down"]
    model, _, _ = start("hot-published", r_target=8, use_rslora=True)
    config = model.peft_config["default"]
    assert (config.r_init, config.r_target, config.r_max) == (2, 2, 8)
    assert config.scaling == pytest.approx(8 / 8**0.5)
    assert (config.option("hot_fraction"), config.option("budget_share")) == (0.25, 1.0)


def test_experts_without_a_rank_compute_what_the_base_does():
    model, dynamics, optimizer = start(
        "hot", options={"hot_fraction": 0.01}, r_target=1, base=make_model()
    )
    plain_loop(model, dynamics, optimizer, range(2))
    plain = make_model()
    for name, layer in adapted_layers(model, "default").items():
        ranks = torch.tensor(layer.adapter("default").ranks()["down"])
        assert (ranks > 0).sum() == 1
        cold = (ranks == 0).nonzero()[:2].T  # one token that two experts without a rank serve
        x, weights = torch.randn(1, 32), torch.full((1, 2), 0.5)
        wanted = plain.get_submodule(f"{name}.experts")(x, cold, weights)
        assert torch.equal(layer.eval()(x, cold, weights), wanted)


def test_adalora_starts_above_the_budget_and_prunes_the_least_important_of_all_layers():
    model, dynamics, optimizer = start("adalora")
    owned, scores = [dynamics.budget()[0]], {}
    for step in range(TOTAL):
        model.train()(**make_batch(step)).loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        pools = {(b, p): pool for b, a in dynamics.adapters.items()
                 for p, pool in a.rank_pools.items()}  # fmt: skip
        scores = {key: (pool.row_scores(), pool.owner.clone()) for key, pool in pools.items()}
        if dynamics.after_optimizer_step(optimizer):
            owned.append(dynamics.budget()[0])
            for projection in ("gate_up", "down"):
                kept, gone = [], []
                for (_, p), pool in pools.items():
                    if p == projection:
                        score, owner = scores[_, p]
                        kept += score[pool.owner >= 0].tolist()
                        gone += score[(pool.owner < 0) & (owner >= 0)].tolist()
                assert max(gone) <= min(kept)
        for pool in pools.values():
            free = pool.owner < 0
            assert not pool.lora_B[free].any() and not pool.importance[free].any()
            assert not optimizer.state[pool.lora_A]["exp_avg"][free].any()
        optimizer.zero_grad()
    budget = LAYERS * 2 * EXPERTS * 4
    assert owned == [budget * 3 // 2, 112, 98, budget], "the cube of the time that is left"
    blocks = list(dynamics.ranks().values())
    assert sum(blocks[0]["down"]) != sum(blocks[1]["down"]), "layers share one budget"


def test_a_global_budget_is_shared_by_layers_and_a_floor_limits_that():
    def shares(**changes):
        _, after = run("drlora-global", **changes)
        return [sum(block["down"]) for block in after.values()]

    free, even, half = (
        shares(),
        shares(options={"layer_floor": 1.0}),
        shares(options={"layer_floor": 0.5}),
    )
    assert sum(free) == sum(even) == sum(half) == LAYERS * EXPERTS * 4
    assert free[0] != free[1] and even == [24, 24]
    assert min(half) >= EXPERTS * (2 + 1) and abs(half[0] - half[1]) <= abs(free[0] - free[1])
    model, dynamics, _ = start("drlora-global")
    assert dynamics.budget()[1] == LAYERS * 2 * EXPERTS * 8, "E * r_max rows are stored"


@pytest.mark.parametrize("r_init", [2, 4])
def test_moving_takes_the_weakest_ranks_of_the_less_salient_half(r_init):
    """With growth, and with ranks that were all handed out before (r_init = r_target)."""
    model, dynamics, optimizer = start("moving", r_init=r_init)
    moved = 0
    for step in range(TOTAL):
        model.train()(**make_batch(step)).loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        before = {b: (a.frequency.clone(), a.ranks()["down"],
                      [(p.owner.clone(), p.row_scores()) for p in a.rank_pools.values()])
                  for b, a in dynamics.adapters.items()}  # fmt: skip
        changes = dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()
        for block in {change.block for change in changes}:
            mine = [change for change in changes if change.block == block]
            gave = {c.expert: -c.granted for c in mine if c.granted < 0}
            moved += sum(gave.values())
            _, ranks, rows = before[block]
            assert sum(gave.values()) <= 0.25 * sum(ranks) and len(gave) <= EXPERTS // 2
            got = [c.saliency for c in mine if c.granted > 0]
            assert all(c.saliency <= max(got) for c in mine if c.granted < 0)
            scores = sum(score for _, score in rows)
            for expert, count in gave.items():
                (owner, _), pool = rows[0], next(iter(dynamics.adapters[block].pools.values()))
                gone = (owner == expert) & (pool.owner != expert)
                kept = (owner == expert) & (pool.owner == expert)
                assert gone.sum() == count and scores[gone].max() <= scores[kept].min()
                young = pool.owner[gone] >= 0
                assert not pool.lora_B[gone].any() and pool.birth[gone][young].eq(step + 1).all()
    assert moved > 4 and dynamics.budget()[0] == dynamics.budget()[1]


def test_young_rows_of_a_can_point_where_the_gradient_does_and_a_does_not():
    model, dynamics, optimizer = start("young", p_grow=0.34)  # at most 2 ranks, as many as old
    plain_loop(model, dynamics, optimizer, range(2))
    model.train()(**make_batch(2)).loss.backward()
    dynamics.before_optimizer_step()
    optimizer.step()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()
               if n.endswith("lora_A")}  # fmt: skip
    before = model.eval()(**make_batch(99)).logits
    changes = dynamics.after_optimizer_step(optimizer)
    torch.testing.assert_close(model(**make_batch(99)).logits, before, rtol=1e-6, atol=1e-6)
    for change in changes:
        for name, pool in dynamics.adapters[change.block].rank_pools.items():
            young = (pool.owner == change.expert) & (pool.birth == 3)
            old = (pool.owner == change.expert) & (pool.birth == 0)
            key = next(n for n in moments if f"{change.block}." in n and f".{name}." in n)
            a, moment = pool.lora_A.detach(), moments[key][old]
            assert young.sum() == change.granted and change.granted <= 2
            assert (a[young] @ a[old].T).abs().max() < 1e-5
            torch.testing.assert_close(a[young] @ a[young].T, torch.eye(change.granted) / 3)
            # Nothing of the gradient is left outside of what old and young rows span.
            if change.granted == 2:
                basis = torch.linalg.qr(torch.cat([a[old], a[young]]).T).Q
                assert (moment - moment @ basis @ basis.T).norm() < 1e-4 * moment.norm()
    assert any(change.granted == 2 for change in changes)


def test_a_probe_shows_young_rows_more_than_the_old_rows_of_their_expert_do():
    model, dynamics, optimizer = start("young-probe", r_init=1, r_target=3, p_grow=0.3)
    plain_loop(model, dynamics, optimizer, range(2))
    seen = {}
    experts = adapted_layers(model, "default")
    hooks = [layer.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[:2]}))
             for n, layer in experts.items()]  # fmt: skip
    model.train()(**make_batch(2)).loss.backward()
    for hook in hooks:
        hook.remove()
    dynamics.before_optimizer_step()
    optimizer.step()
    before = model.eval()(**make_batch(99)).logits
    changes = dynamics.after_optimizer_step(optimizer)
    torch.testing.assert_close(model(**make_batch(99)).logits, before, rtol=1e-6, atol=1e-6)
    assert not any(layer.adapter("default").probes for layer in experts.values())
    assert any(change.granted == 2 for change in changes), "more than an expert has old rows"
    for change in changes:
        pool = dynamics.adapters[change.block].rank_pools["gate_up"]
        own, a = pool.owner == change.expert, pool.lora_A.detach()
        young, old = a[own & (pool.birth == 3)], a[own & (pool.birth == 0)]
        assert (young @ old.T).abs().max() < 1e-5
        torch.testing.assert_close(young @ young.T, torch.eye(change.granted) * 4 / 3)
        x_TH, index_TK = seen[change.block]  # what the gradient of this weight is made of
        tokens = x_TH[(index_TK == change.expert).any(dim=1)].detach()
        basis = torch.linalg.qr(torch.cat([old, tokens]).T).Q
        assert basis.shape[1] < pool.in_features
        assert (young - young @ basis @ basis.T).norm() < 1e-4 * young.norm()


def test_rank_by_active_experts_is_r_over_k_once():
    model, dynamics, _ = start("lora-active")
    config = model.peft_config["default"]
    assert (config.r_target, config.lora_alpha, config.option("split_by_active")) == (2, 4.0, False)
    assert config.scaling == DrLoraConfig(**SETTINGS).scaling
    assert dynamics.budget() == (LAYERS * 2 * EXPERTS * 2,) * 2


def test_lora_plus_lets_b_learn_faster_and_says_so_if_it_does_not():
    model, dynamics, optimizer = start("lora-plus")
    plain_loop(model, dynamics, optimizer, range(1))
    groups = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    (pool, *_) = dynamics.adapters["model.layers.0.mlp"].rank_pools.values()
    assert groups[id(pool.lora_B)] == pytest.approx(16 * groups[id(pool.lora_A)])
    model, dynamics, _ = start("lora-plus")
    with pytest.warns(UserWarning, match="b_lr_ratio=16.0.*same learning rate"):
        plain_loop(model, dynamics, torch.optim.AdamW(trainable(model)), range(1))


def test_random_growth_ignores_statistics_and_follows_the_seed():
    """Other data, other routing and gradients: the same ranks. Another seed: others."""

    def grown(seed, data):
        model, dynamics, optimizer = start("random", seed, make_model())
        plain_loop(model, dynamics, optimizer, range(TOTAL), lambda step: make_batch(data + step))
        return dynamics.ranks()

    assert grown(0, data=0) == grown(0, data=50) != grown(1, data=0)
    blocks = list(grown(0, data=0).values())
    assert blocks[0] != blocks[1], "each block draws for itself"


def test_shared_outer_factors_are_one_matrix():
    """Five clipped AdamW steps of a pool end where those of one matrix for all experts do."""
    torch.manual_seed(0)
    experts, rank = 3, 2
    for shared in ("lora_A", "lora_B"):
        pool = RankPool(experts, 5, 4, rank, experts * rank, shared=shared)
        with torch.no_grad():  # B is zero at the start, and what is equal is no test
            pool.lora_B.copy_(torch.randn(rank, 4).repeat(experts, 1))
        own = {name: getattr(pool, name).detach().clone() for name in ("lora_A", "lora_B")}
        own[shared] = own[shared][:rank]
        twin = {name: torch.nn.Parameter(value) for name, value in own.items()}
        targets = [torch.randn(experts * rank, 4) for _ in range(5)]
        x_NI = torch.randn(experts * rank, 5)

        def loss(a_RI, b_RO, target, x=x_NI):
            return ((x * a_RI).sum(1, keepdim=True) * b_RO - target).square().sum()

        def step(parameters, optimizer, value):
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return norm

        of_pool = [pool.lora_A, pool.lora_B]
        optimizers = [torch.optim.AdamW(p, lr=1e-2, eps=1e-20, weight_decay=0.1)
                      for p in (of_pool, list(twin.values()))]  # fmt: skip
        for target in targets:
            whole = {n: p.repeat(experts, 1) if n == shared else p for n, p in twin.items()}
            norms = [
                step(of_pool, optimizers[0], loss(*pool(torch.float32), target)),
                step(list(twin.values()), optimizers[1], loss(*whole.values(), target)),
            ]
            torch.testing.assert_close(norms[0], norms[1])
        for name, value in twin.items():
            wanted = value.repeat(experts, 1) if name == shared else value
            torch.testing.assert_close(getattr(pool, name).data, wanted.data)
        assert pool.spare_numbers == (experts - 1) * rank * twin[shared].shape[1]


def test_shared_outer_has_lora_s_numbers_and_is_refused_with_unequal_ranks():
    model, _, _ = start("lora-shared-outer")
    pools = [p for layer in adapted_layers(model, "default").values()
             for p in layer.adapter("default").rank_pools.values()]  # fmt: skip
    assert {pool.book.ranks().max() for pool in pools} == {SHARED_RANK}
    assert model.peft_config["default"].scaling == 8 / 4
    trained = sum(p.numel() for p in trainable(model)) - free_parameters(model)
    lora = sum(p.numel() for p in trainable(start("lora")[0]))
    assert abs(trained / lora - 1) < 0.5 / SHARED_RANK  # ranks are whole
    with pytest.raises(ConfigError, match="rows in common need one rank"):
        get_peft_model(make_model(), DrLoraConfig(**SETTINGS, options={"shared_outer": True}))


@pytest.mark.parametrize("method", ["lora-shared-outer", "lora-active", "lora-all-linear"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_that_a_method_changes_leave_the_scaling(method, use_rslora):
    config = DrLoraConfig.for_method(method, **SETTINGS, use_rslora=use_rslora)
    scaling, rank = config.scaling, config.r_target
    model = get_peft_model(make_model(), config)
    assert config.r_target != rank and config.scaling == pytest.approx(scaling)
    linears = [m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)]
    assert all(found == pytest.approx(scaling) for found in linears)


BESIDE = ["lora-attention", "lora-all-linear", "lora-all-linear-gradient", "lora-all-gradient"]


@pytest.mark.parametrize("method", BESIDE)
def test_lora_beside_the_experts_spends_their_budget_on_all_its_layers(method):
    model, dynamics, _ = start(method)
    config = model.peft_config["default"]
    lora = sum(p.numel() for p in trainable(start("lora")[0]))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    names = {name.rpartition(".")[2] for name in layers}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"} and len(layers) == 4 * LAYERS
    assert {m.r["default"] for m in layers.values()} == {config.target_rank}
    assert {m.scaling["default"] for m in layers.values()} == {config.scaling} == {8 / 4}
    trained = sum(p.numel() for p in trainable(model)) - free_parameters(model)
    a_rank = sum(sum(m.get_base_layer().weight.shape) for m in layers.values())
    assert abs(trained - lora) <= a_rank / 2, "as near as whole ranks go"
    ranks = {r for block in dynamics.ranks().values() for rs in block.values() for r in rs}
    assert ranks == ({0} if method == "lora-attention" else {3})
    assert config.target_rank >= max(ranks)


def test_rows_lie_along_the_gradient_beside_other_layers_too():
    config = DrLoraConfig.for_method("lora-all-linear-gradient", **SETTINGS)
    model = get_peft_model(make_model(), config)
    blocks = adapted_layers(model, "default")
    adapters = {name: layer.adapter("default") for name, layer in blocks.items()}
    batches = [make_batch(seed) for seed in range(3)]
    found = probe_gradients(model, adapters, batches, count=3)
    drlora.place_ranks(model, batches)
    for name, adapter in adapters.items():
        for projection, pool in adapter.rank_pools.items():
            wanted_RI = found[name][projection].rows_EDI.flatten(0, 1) * pool.row_norm * 3
            torch.testing.assert_close(pool.lora_A.detach(), wanted_RI)


@pytest.mark.parametrize("begin", ["routing", "hot", "gradient"])
def test_a_budget_in_common_is_refused_where_experts_start_with_unequal_ranks(begin):
    config = DrLoraConfig(
        r_init=4, r_target=4, r_max=4, start=begin, target_modules="all-linear",
        options={"common_budget": True},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="common_budget cannot work.*with one rank and lose none"):
        get_peft_model(make_model(), config)


@pytest.mark.parametrize(
    ("method", "at_equal_ranks"),
    [("beside", "lora-all-linear"), ("drlora-all-informed", "lora-all-gradient")],
)
def test_experts_grow_within_the_budget_that_they_share(method, at_equal_ranks):
    growing, grown, _ = start(method)
    equal, _, _ = start(at_equal_ranks)
    config, wanted = growing.peft_config["default"], equal.peft_config["default"]
    assert (config.r_init, config.r_target, config.r_max) == (2, 3, 6)
    assert config.target_rank == wanted.target_rank
    assert config.scaling == wanted.scaling == config.target_alpha / config.target_rank

    def owned(model):
        return sum(p.numel() for p in trainable(model)) - free_parameters(model)

    assert owned(growing) < owned(equal)
    plain_loop(growing, grown, make_optimizer(growing, config), range(TOTAL))
    assert owned(growing) == owned(equal)
    ranks = {r for block in grown.ranks().values() for rs in block.values() for r in rs}
    assert len(ranks) > 1 and max(ranks) <= 6


def test_experts_that_are_left_out_by_the_settings_are_no_fault(tmp_path):
    model, _, _ = start("lora-attention")
    model.save_pretrained(tmp_path)
    found = drlora.verify(tmp_path)
    names = {f.name for f in found.findings if f.name in ("no-expert-touched", "inert-experts")}
    assert names == {"no-expert-touched"} and not any(f.is_fault for f in found.findings)


def test_a_budget_in_common_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="common_budget.*target_modules=None"):
        get_peft_model(make_model(), DrLoraConfig(options={"common_budget": True}))
    with pytest.raises(ConfigError, match="common_budget.*Lower r_target"):
        start("lora-attention", r_target=64)
    with pytest.raises(ConfigError, match="common_budget.*Raise r_target"):
        start("lora-all-linear", r_target=1)
    with pytest.raises(ConfigError, match="nothing is left to grow. Raise r_target"):
        start("beside", r_init=1, r_target=2)
    with pytest.raises(ConfigError, match="start='none' gives no expert a rank"):
        DrLoraConfig(start="none", r_init=16)


@pytest.mark.parametrize("method", ["lora-shared-outer", *BESIDE])
def test_ranks_set_when_an_adapter_is_put_in_stay_when_it_is_continued(method, tmp_path):
    model, dynamics, _ = start(method)
    model.save_pretrained(tmp_path)
    again = continue_adapter(make_model(), tmp_path)
    assert drlora.rank_map(again) == dynamics.ranks()
    config, before = again.peft_config["default"], model.peft_config["default"]
    for name in ("r_target", "scaling", "target_rank"):
        assert getattr(config, name) == getattr(before, name)
    with torch.no_grad():
        assert torch.equal(again(**make_batch(3)).logits, model(**make_batch(3)).logits)


def test_epng_moves_ranks_at_the_budget_to_rows_apart_from_the_others():
    model, dynamics, optimizer = start("epng")
    before = dynamics.ranks()
    pools = [p for layer in adapted_layers(model, "default").values()
             for p in layer.adapter("default").rank_pools.values()]  # fmt: skip
    plain_loop(model, dynamics, optimizer, range(3))
    after = dynamics.ranks()
    assert before != after and dynamics.budget()[0] == LAYERS * 2 * EXPERTS * 4
    grown = 0
    for pool in pools:
        for expert in range(EXPERTS):
            own = pool.owner == expert
            young, old = own & (pool.birth == pool.birth.max()), own & (pool.birth == 0)
            if pool.birth.max() and young.any() and own.sum() <= pool.in_features:
                a_RI = pool.lora_A.detach()
                cosines = torch.nn.functional.normalize(a_RI[young]) @ a_RI[old].T
                assert cosines.abs().max() < 1e-5 * pool.row_norm
                grown += 1
    assert grown


def test_what_the_released_script_computes():
    weight, grad = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    a_R, b_R = row_sums(weight, grad, is_signed=True), row_sums(2 * weight, grad, is_signed=True)
    assert a_R.tolist() == [-5.0] and row_sums(weight, grad).tolist() == [11.0]
    rule = RANK_IMPORTANCES["released"]
    assert rule.is_signed and rule.of(RowSums(a_R, b_R, 2, 2)).tolist() == [15.0]
    config = DrLoraConfig.for_method("drlora-released", **SETTINGS, router="train")
    assert (config.router, config.young_rows) == ("frozen", "shared")
    assert config.option("routing_signal") == "count"


def test_informed_growth_starts_with_three_quarters_of_the_budget():
    assert DrLoraConfig.for_method("drlora-informed", **SETTINGS).settle_steps == 0.5
    before, after = run("drlora-informed")
    assert sum(map(sum, (b["down"] for b in before.values()))) == LAYERS * EXPERTS * 3
    assert sum(map(sum, (b["down"] for b in after.values()))) == LAYERS * EXPERTS * 4


def test_rules_and_their_names():
    assert set(RANK_IMPORTANCES) == set(GENERAL["rank_importance"].choices)
    assert SALIENCIES.names() == ("product", "routing", "importance", "random")
    assert STARTS.names() == ("uniform", "routing", "hot", "gradient", "none")
    f, g, ranks = torch.tensor([0.5, 0.25]), torch.tensor([3.0, 8.0]), torch.tensor([1, 3])
    signals = Signals(f, g, ranks, gamma=2.0, seed=1)
    assert SALIENCIES["product"](signals).tolist() == [1.5 / 4, 2.0 / 16]
    assert SALIENCIES["routing"](signals).tolist() == [0.5 / 4, 0.25 / 16]
    assert SALIENCIES["importance"](signals).tolist() == [3 / 4, 8 / 16]
    assert torch.equal(SALIENCIES["random"](signals), SALIENCIES["random"](signals))


def test_a_method_wins_over_settings_and_can_be_named_twice():
    config = DrLoraConfig.for_method("lora", **SETTINGS, saliency="random")
    assert (config.r_init, config.r_target, config.r_max, config.saliency) == (4, 4, 4, "product")
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert all(f"| `{name}` |" in page for name in METHODS)
    with pytest.raises(ConfigError, match="method='loar' is not known.*'lora'"):
        DrLoraConfig.for_method("loar")


@pytest.mark.parametrize("method", [*METHODS])
def test_a_recipe_names_a_method_and_its_record_means_the_same(method, tmp_path):
    path = save_all(tmp_path, method=method)
    recipe = load_recipe(path)
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(path) == recipe and recipe.method == method
    settings = DrLoraConfig.for_method(method, r_target=3, r_init=1, r_max=8, p_grow=0.5)
    assert recipe.adapter.start == settings.start
    assert recipe.adapter.r_init == settings.r_init


@pytest.mark.parametrize("method", ["hot", "drlora-global"])
def test_drlora_train_records_what_methods_are_compared_at(method, tmp_path):
    result = train(load_recipe(save_all(tmp_path, method=method), ["evaluation.exact_match=false"]))
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["method"] == method
    numbers = 2 * 6 * 3 * ((32 + 48) + (24 + 32))  # layers, experts, rank, gate_up and down
    assert saved["trainable_parameters"] == numbers
    assert saved["stored_parameters"] == numbers * (8 / 3 if method == "drlora-global" else 1)
    grew = (tmp_path / "run" / "growth.jsonl").exists()
    assert grew == (method != "hot")
    assert len({tuple(r) for block in result.ranks.values() for r in block.values()}) > 1
