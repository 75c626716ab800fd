"""Probes find the experts' gradient and leave no trace; ranks and rows follow what they find."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from tiny import (
    checkpoint_activations,
    checkpointing_arguments,
    make_batch,
    make_model,
    plain_loop,
    trainable,
)
from transformers import Trainer, TrainingArguments

import drlora
from drlora import ConfigError, DrLoraConfig
from drlora.adapter.inject import adapted_layers
from drlora.ranks import probe
from drlora.ranks.placement import strongest_ranks
from drlora.ranks.probe import own_loss, probe_gradients

# Tiny batches leave some experts without a token.
pytestmark = pytest.mark.filterwarnings("ignore:.*matrices of experts have no gradient")

RANKS = dict(r_init=2, r_target=3, r_max=8, p_grow=0.5)


def adapted(seed=0, **settings):
    torch.manual_seed(seed)
    return get_peft_model(make_model(), DrLoraConfig(**{**RANKS, **settings})).train()


def adapters_of(model):
    return {n: layer.adapter("default") for n, layer in adapted_layers(model, "default").items()}


def true_gradients(seed, batches, loss=own_loss):
    """Block -> projection -> (E, O, I), from the base model itself."""
    torch.manual_seed(seed)
    model = make_model().train()
    for batch in batches:
        (loss(model, batch) / len(batches)).backward()
    return {
        f"model.layers.{number}.mlp": {
            "gate_up": layer.mlp.experts.gate_up_proj.grad,
            "down": layer.mlp.experts.down_proj.grad,
        }
        for number, layer in enumerate(model.model.layers)
    }


def few_tokens(seed):
    """So few that no expert's gradient has more directions than a probe has rows."""
    return {key: value[:1, :5] for key, value in make_batch(seed).items()}


@pytest.mark.parametrize("engine", ["naive", "loop", "grouped"])
def test_a_probe_spans_the_gradient_of_every_expert(engine):
    batches = [few_tokens(1), few_tokens(2)]
    model = adapted(engine=engine)
    found = probe_gradients(model, adapters_of(model), batches, count=12)
    for block, projections in true_gradients(0, batches).items():
        for projection, g_EOI in projections.items():
            rows_EDI, strength_ED = found[block][projection]
            missed_EOI = g_EOI - g_EOI @ rows_EDI.mT @ rows_EDI
            assert missed_EOI.norm() < 1e-4 * g_EOI.norm()
            assert rows_EDI.shape[:2] == strength_ED.shape == (6, 12)
            unit = torch.eye(12).expand(6, 12, 12)
            torch.testing.assert_close(rows_EDI @ rows_EDI.mT, unit, atol=1e-4, rtol=0)
            assert bool((strength_ED.diff(dim=1) <= 0).all())


def preference(model, batch):
    """That the first row be likelier than the second, as DPO has it where nothing moved yet."""
    ids = batch["input_ids"]
    likelihood_BT = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    of_rows = likelihood_BT.gather(2, ids[:, 1:, None]).sum((1, 2))
    return -torch.nn.functional.logsigmoid(0.1 * (of_rows[0] - of_rows[1]))


def test_the_loss_may_be_given():
    batches = [{"input_ids": make_batch(seed)["input_ids"][:, :3]} for seed in (1, 2)]
    model = adapted(start="gradient", options={"start_a": "gradient"})
    found = probe_gradients(model, adapters_of(model), batches, 12, preference)
    wanted = true_gradients(0, batches, preference)
    for block, projections in wanted.items():
        for projection, g_EOI in projections.items():
            rows_EDI = found[block][projection].rows_EDI
            assert (g_EOI - g_EOI @ rows_EDI.mT @ rows_EDI).norm() < 1e-4 * g_EOI.norm()
    with pytest.raises(ConfigError, match="or the loss of the training"):
        drlora.place_ranks(model, batches)
    drlora.place_ranks(model, batches, loss=preference)
    for block, adapter in adapters_of(model).items():
        for projection, pool in adapter.rank_pools.items():
            for expert, g_OI in enumerate(wanted[block][projection]):
                _, strength_D, v_DI = torch.linalg.svd(g_OI)
                span_DI = v_DI[: int((strength_D > 1e-4 * strength_D[0]).sum())]
                rows_RI = pool.lora_A.detach()[pool.owner == expert][: len(span_DI)]
                inside_RI = rows_RI @ span_DI.mT @ span_DI
                torch.testing.assert_close(inside_RI, rows_RI, rtol=0, atol=1e-3)


def test_rows_that_find_no_direction_stay_random():
    """An expert that no token went to has no gradient, and one of few tokens few directions."""
    batches = [few_tokens(1)]
    settings = dict(r_init=8, r_target=8, r_max=8, options={"start_a": "gradient"})
    model = adapted(**settings)
    pools = [pool for one in adapters_of(model).values() for pool in one.rank_pools.values()]
    drawn = [pool.lora_A.detach().clone() for pool in pools]
    with pytest.warns(UserWarning, match="of 24 matrices of experts have no gradient"):
        drlora.place_ranks(model, batches)
    counts = []
    for number, gradients in enumerate(
        g_EOI for of_block in true_gradients(0, batches).values() for g_EOI in of_block.values()
    ):
        pool = pools[number]
        for expert, g_OI in enumerate(gradients):
            found = int(torch.linalg.matrix_rank(g_OI, rtol=1e-4))
            own = (pool.owner == expert).nonzero().squeeze(1)
            rows_RI = pool.lora_A.detach()[own] / pool.row_norm
            torch.testing.assert_close(rows_RI @ rows_RI.T, torch.eye(8), rtol=0, atol=1e-4)
            spanned_RI = torch.cat([rows_RI[:found], drawn[number][own[found:]]])
            basis_IR = torch.linalg.qr(spanned_RI.T).Q
            inside_RI = rows_RI @ basis_IR @ basis_IR.T
            torch.testing.assert_close(inside_RI, rows_RI, rtol=0, atol=1e-4)
            counts.append(found)
    assert 0 in counts and any(0 < count < 8 for count in counts)


def test_the_strongest_directions_hold_most_of_the_gradient():
    """What a random sketch with 8 rows more than asked for is expected to keep."""
    batches = [make_batch(seed) for seed in range(3)]
    model = adapted()
    found = probe_gradients(model, adapters_of(model), batches, count=8)
    for block, projections in true_gradients(0, batches).items():
        for projection, g_EOI in projections.items():
            best = torch.linalg.svdvals(g_EOI)[:, :8].square().sum(1)
            rows_EDI, strength_ED = found[block][projection]
            kept = (g_EOI @ rows_EDI.mT).square().sum((1, 2))
            assert bool((kept >= 0.85 * best).all())
            torch.testing.assert_close(strength_ED.square().sum(1), best, rtol=0.5, atol=0)


def test_gate_and_up_apart_have_directions_of_their_own():
    batches = [few_tokens(1)]
    model = adapted(projections=["gate", "up", "down"])
    found = probe_gradients(model, adapters_of(model), batches, count=8)
    for block, projections in true_gradients(0, batches).items():
        halves = dict(zip(("gate", "up"), projections["gate_up"].chunk(2, dim=1), strict=True))
        for projection, g_EOI in halves.items():
            rows_EDI = found[block][projection].rows_EDI
            assert (g_EOI - g_EOI @ rows_EDI.mT @ rows_EDI).norm() < 1e-4 * g_EOI.norm()


def test_probing_leaves_no_trace():
    model, batch = (
        adapted(start="gradient", options={"start_a": "gradient"}, lora_dropout=0.1),
        make_batch(),
    )
    model.eval()
    before, state = model(**batch).logits, torch.get_rng_state()
    drlora.place_ranks(model, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(**batch).logits, before) and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(adapter.probes for adapter in adapters_of(model).values())
    assert not any(adapter.frequency.any() for adapter in adapters_of(model).values())
    assert not any(adapter.meter.num_tokens for adapter in adapters_of(model).values())


@pytest.mark.parametrize("method", ["static", "gradient"])
def test_probing_in_the_trainer_under_reentrant_checkpointing(method, tmp_path):
    torch.manual_seed(0)
    config = DrLoraConfig.for_method(method, r_init=2, r_target=2, r_max=8)
    model = get_peft_model(make_model(), config)
    data = [{key: value[0] for key, value in make_batch(seed).items()} for seed in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, **checkpointing_arguments(use_reentrant=True),
    )  # fmt: skip
    callback = drlora.DrLoraCallback()
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert {sum(r) for block in callback.dynamics.ranks().values() for r in block.values()} == {12}
    assert all(adapter.frequency.any() for adapter in adapters_of(model).values())


def test_gradients_that_were_there_stay():
    model = adapted()
    model(**make_batch(0)).loss.backward()
    before = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    counted = {name: a.meter.sum_E.clone() for name, a in adapters_of(model).items()}
    drlora.ranks_from_routing(model, [make_batch(1)])
    assert before and all(dict(model.named_parameters())[n].grad is g for n, g in before.items())
    for name, adapter in adapters_of(model).items():
        assert torch.equal(adapter.meter.sum_E, counted[name])


def test_rows_start_along_the_gradient():
    batches = [make_batch(seed) for seed in range(2)]
    model = adapted(
        options={"start_a": "gradient", "start_a_scale": 3.0},
    )
    directions = probe_gradients(model, adapters_of(model), batches, count=8)
    random_A = {n: a.rank_pools["down"].lora_A.clone() for n, a in adapters_of(model).items()}
    drlora.place_ranks(model, batches)
    for block, adapter in adapters_of(model).items():
        pool = adapter.rank_pools["down"]
        assert pool.book.ranks().tolist() == [2] * 6
        for expert in range(6):
            own = pool.lora_A[pool.owner == expert]
            wanted = directions[block]["down"].rows_EDI[expert, :2] * pool.row_norm * 3
            torch.testing.assert_close(own.detach(), wanted)
        free = pool.owner < 0
        assert bool(free.any()) and torch.equal(pool.lora_A[free], random_A[block][free])


def test_ranks_go_to_the_strongest_directions():
    batches = [make_batch(seed) for seed in range(2)]
    model = adapted(start="gradient")
    directions = probe_gradients(model, adapters_of(model), batches, count=8)
    drlora.place_ranks(model, batches)
    for block, adapter in adapters_of(model).items():
        energy = [d.strength_ED.square() for d in directions[block].values()]
        worth = sum(e / e.sum() for e in energy)
        for projection in ("gate_up", "down"):
            ranks = adapter.ranks()[projection]
            assert sum(ranks) == 12 and ranks == strongest_ranks(worth.tolist(), 12, 8)
        assert max(ranks) > 2


def test_what_was_placed_trains_on():
    model = adapted(start="gradient", options={"start_a": "gradient"}, grow_every=2, warmup_steps=1,
                    settle_steps=1)  # fmt: skip
    with pytest.raises(ConfigError, match="start_a='gradient', but no ranks are placed"):
        drlora.RankDynamics(model, 9)
    batch = make_batch()
    drlora.place_ranks(model, [batch])
    dynamics = drlora.RankDynamics(model.train(), 9)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = plain_loop(model, dynamics, optimizer, range(9), lambda step: batch)
    assert losses[-1] < losses[0]
    assert all(sum(r) == 18 for block in dynamics.ranks().values() for r in block.values())


UNPLACED = [
    {"start": "routing"},
    {"start": "gradient", "options": {"start_a": "gradient"}},
    {"options": {"start_a": "gradient"}},
]


@pytest.mark.parametrize("settings", UNPLACED)
@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # under no_grad
def test_experts_whose_ranks_are_not_placed_are_not_trained(settings, checkpointing):
    """A loop without RankDynamics would train nothing, and save nothing."""
    model, batch = adapted(**settings), make_batch()
    if checkpointing is not None:
        model.enable_input_require_grads()
        checkpoint_activations(model, use_reentrant=checkpointing)
    with pytest.raises(ConfigError, match="no ranks are placed yet; call drlora.place_ranks"):
        model(**batch).loss.backward()
    with torch.no_grad():
        model(**batch)
    with model.disable_adapter():
        model(**batch)
    model.eval()(**batch)
    drlora.place_ranks(model.train(), [batch])
    model(**batch).loss.backward()
    assert all(a.rank_pools["down"].lora_B.grad.any() for a in adapters_of(model).values())


def test_others_train_beside_an_adapter_that_is_not_placed():
    model = adapted()
    model.add_adapter("second", DrLoraConfig(**RANKS, start="routing"))
    model.train()(**make_batch()).loss.backward()
    with pytest.raises(ConfigError, match=r"'second' is not active.*set_adapter\('second'\)"):
        drlora.place_ranks(model, [make_batch()], "second")
    model.set_adapter("second")
    model.base_model.disable_adapter_layers()
    with pytest.raises(ConfigError, match="'second' is disabled.*enable_adapter_layers"):
        drlora.place_ranks(model, [make_batch()], "second")
    model.base_model.enable_adapter_layers()
    with pytest.raises(ConfigError, match="no ranks are placed"):
        model(**make_batch())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(**make_batch())  # a frozen one serves


def test_a_block_without_ranks_trains_if_another_has_some():
    model = adapted(start="hot")
    blocks = drlora.rank_map(model)
    ranks = {block: dict.fromkeys(blocks[block], [0] * 6) for block in blocks}
    ranks[next(iter(blocks))] = dict.fromkeys(blocks[next(iter(blocks))], [2] * 6)
    drlora.start_ranks(model, ranks)
    model(**make_batch()).loss.backward()


def test_as_many_batches_are_drawn_as_the_option_says():
    drawn = []

    def endless():
        while True:
            drawn.append(make_batch(len(drawn)))
            yield drawn[-1]

    for settings in UNPLACED:
        drawn.clear()
        options = {**settings.get("options", {}), "start_batches": 3}
        model, twin = (adapted(**{**settings, "options": options}) for _ in range(2))
        drlora.place_ranks(model, endless())
        assert len(drawn) == 3
        drlora.place_ranks(twin, drawn)
        for one, other in zip(adapters_of(model).values(), adapters_of(twin).values(), strict=True):
            assert one.ranks() == other.ranks()
            assert torch.equal(one.rank_pools["down"].lora_A, other.rank_pools["down"].lora_A)


def uneven(model):
    return {
        b: dict.fromkeys(inner, [3, 1, 2, 1, 4, 1]) for b, inner in drlora.rank_map(model).items()
    }


def test_rows_are_laid_in_the_ranks_that_were_given(tmp_path):
    batches = [make_batch(seed) for seed in range(2)]
    model = adapted(options={"start_a": "gradient"})
    ranks = uneven(model)
    drlora.start_ranks(model, ranks)
    with pytest.raises(ConfigError, match="start_a='gradient', but no rows are laid yet"):
        drlora.RankDynamics(model, 20)
    with pytest.raises(ConfigError, match="no rows are laid yet"):
        model(**make_batch())
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True).train()
    found = probe_gradients(model, adapters_of(model), batches, count=8)
    drlora.place_ranks(model, batches)
    assert drlora.rank_map(model) == ranks
    for block, adapter in adapters_of(model).items():
        pool = adapter.rank_pools["down"]
        own = pool.lora_A[pool.owner == 4].detach()
        wanted = found[block]["down"].rows_EDI[4, :4] * pool.row_norm
        torch.testing.assert_close(
            own, wanted * model.peft_config["default"].option("start_a_scale")
        )
    drlora.RankDynamics(model, 20)
    with pytest.raises(ConfigError, match="placed already"):
        drlora.place_ranks(model, batches)


@pytest.mark.parametrize("start", ["routing", "gradient"])
def test_ranks_that_are_given_and_placed_by_data_contradict_each_other(start):
    model = adapted(start=start)
    ranks = uneven(model)
    with pytest.raises(ConfigError, match=f"start='{start}' places ranks by data.*keep one"):
        drlora.start_ranks(model, ranks)
    drlora.place_ranks(model, [make_batch()])
    drlora.start_ranks(model, ranks)  # a change of what was placed


def directions(dtype, batches, gain):
    """Of all experts, where the loss is `gain` times what it is."""
    model = adapted()
    model.get_base_model().to(dtype)

    def gained(model, batch):
        return own_loss(model, batch) * gain

    return probe_gradients(model, adapters_of(model), batches, 4, gained)


@pytest.mark.parametrize("gain", [2.0**-14, 2.0**6])
def test_float16_finds_what_float32_finds(gain):
    """Where the loss of a token is so small that float16 holds no gradient of it, and where what
    is scaled for that is too large for it."""
    batches = [make_batch(seed) for seed in range(2)]
    wanted = directions(torch.float32, batches, gain)
    found = directions(torch.float16, batches, gain)
    for block, projections in wanted.items():
        for projection, (rows_EDI, strength_ED) in projections.items():
            same_E = (rows_EDI[:, 0] * found[block][projection].rows_EDI[:, 0]).sum(1).abs()
            assert same_E.min() > 0.99
            torch.testing.assert_close(
                found[block][projection].strength_ED[:, 0], strength_ED[:, 0], rtol=0.02, atol=0
            )


def test_scaling_changes_no_digit_elsewhere(monkeypatch):
    batches = [make_batch(seed) for seed in range(2)]
    scaled = directions(torch.float32, batches, 1.0)
    monkeypatch.setattr(probe, "_SCALES", (1.0,))
    plain = directions(torch.float32, batches, 1.0)
    for block, projections in plain.items():
        for projection, (rows_EDI, _) in projections.items():
            assert torch.equal(scaled[block][projection].rows_EDI, rows_EDI)


def test_a_batch_whose_gradient_is_not_finite_is_left_out():
    bad = make_batch(1)
    model = adapted()
    embedding = model.get_input_embeddings()
    good = probe_gradients(model, adapters_of(model), [make_batch(0)], count=4)

    def spoil(module, args, output):
        return output * float("nan") if torch.equal(args[0], bad["input_ids"]) else output

    handle = embedding.register_forward_hook(spoil)
    with pytest.warns(UserWarning, match="1 of 2 batches had a gradient that is NaN"):
        found = probe_gradients(model, adapters_of(model), [bad, make_batch(0)], count=4)
    for block, projections in good.items():
        for projection, directions in projections.items():
            assert torch.equal(found[block][projection].strength_ED, directions.strength_ED)
    with pytest.raises(ConfigError, match="over 1 batches, of which none had a finite one"):
        probe_gradients(model, adapters_of(model), [bad], count=4)
    handle.remove()


@pytest.mark.parametrize(
    ("batches", "match"),
    [([], "over 0 batches"), ([{"input_ids": torch.tensor([[1, 2, 3]])}], "gives no loss")],
)
def test_batches_that_give_no_gradient_are_refused(batches, match):
    model = adapted(options={"start_a": "gradient"})
    with pytest.raises(ConfigError, match=match):
        drlora.place_ranks(model, batches)
    assert not any(adapter.probes for adapter in adapters_of(model).values())


@given(
    st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 7),
    st.floats(0, 1),
)
def test_strongest_ranks(worth, r_max, fullness):
    width = min(map(len, worth))
    worth = [sorted(row[:width], reverse=True) for row in worth]
    total = len(worth) + int(fullness * len(worth) * (r_max - 1))
    ranks = strongest_ranks(worth, total, r_max)
    assert sum(ranks) == total and min(ranks) >= 1 and max(ranks) <= r_max
    padded = [row + [0.0] * r_max for row in worth]
    taken = [padded[e][n] for e, rank in enumerate(ranks) for n in range(1, rank)]
    left = [padded[e][n] for e, rank in enumerate(ranks) for n in range(rank, r_max)]
    assert not taken or not left or min(taken) >= max(left)
