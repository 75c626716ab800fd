"""`drlora inspect`: figures of models that are too large to load, from their config alone."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny import make_model
from tiny_run import save_model_folder
from transformers import AutoModelForCausalLM, OlmoeConfig

from drlora.cli.inspection import CHART_HEIGHT, growth_chart, print_inspection
from drlora.cli.main import main
from drlora.config.adapter import DrLoraConfig
from drlora.embedded import model_folder
from drlora.forecast.step import Batch
from drlora.runs.inspect import inspect
from drlora.runs.inspection import MeanRank, SizeAtRank


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    """The config of allenai/OLMoE-1B-7B-0924."""
    folder = tmp_path_factory.mktemp("olmoe")
    OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def ask(capsys, *arguments) -> dict:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_olmoe_blocks_and_parameters(olmoe, capsys):
    found = ask(capsys, olmoe, "preset=paper-v3")
    assert len(found["blocks"]) == 16
    assert {b["experts"] for b in found["blocks"]} == {64}
    assert {b["top_k"] for b in found["blocks"]} == {8}
    assert {(b["hidden_size"], b["expert_width"]) for b in found["blocks"]} == {(2048, 1024)}
    assert found["blocks"][15]["router"] == "model.layers.15.mlp.gate"
    experts = 16 * 64 * 3 * 2048 * 1024
    attention_and_norms = 16 * (4 * 2048 * 2048 + 4 * 2048)
    rest = 2 * 50304 * 2048 + 2048 + 16 * 64 * 2048
    assert found["parameters"]["experts"] == experts
    assert found["parameters"]["total"] == experts + attention_and_norms + rest  # 6.9 billion


def test_olmoe_adapter_and_memory(olmoe, capsys):
    found = ask(capsys, olmoe, "preset=paper-v3")
    numbers_a_rank = 16 * 64 * 2 * (2048 + 1024)  # layers, experts, up and down, A row + B column
    routers = 16 * 64 * 2048
    assert found["adapter"]["beside"] == {
        "layers": 0, "ordinary_lora": 0, "modules_to_save": 0, "routers": routers
    }  # fmt: skip
    for name, rank in (("r_init", 32), ("r_target", 64), ("r_max", 128)):
        assert found["adapter"][name] == {
            "rank": rank,
            "parameters": rank * numbers_a_rank + routers,
        }
    assert found["adapter"]["budget_ranks"] == 64 * 64 * 16 * 2
    memory = found["memory_gb"]
    assert memory["dtype"] == "bfloat16"
    assert memory["weights"] == pytest.approx(2 * 6_919_161_856 / 1e9)
    # float32 weight, gradient and two moments
    assert memory["adapter_at_budget"] == pytest.approx(16 * (64 * numbers_a_rank + routers) / 1e9)
    at_r_max = 16 * (128 * numbers_a_rank + routers) / 1e9
    assert memory["adapter_at_r_max_everywhere"] == pytest.approx(at_r_max)
    in_float32 = ask(capsys, olmoe, "--dtype", "float32")["memory_gb"]
    assert in_float32["weights"] == 2 * memory["weights"]


def test_olmoe_paper_v3_plan(olmoe, capsys):
    growth = ask(capsys, olmoe, "preset=paper-v3", "--steps", 37_997)["growth"]
    assert growth["warmup_steps"] == 1140
    assert growth["events"] == 184
    assert growth["quota_module_ranks"] == 23
    assert (growth["grow_every"], growth["settle_steps"], growth["cap_ranks"]) == (200, 200, 9)
    curve = growth["mean_ranks"]
    assert len(curve) == 184
    assert curve[0] == {"step": 1140, "mean_rank": 32 + 23 // 2 / 64}
    assert curve[-1] == {"step": 1140 + 183 * 200, "mean_rank": 64}
    assert growth["reached"]
    # 2 * 64 * 32 module ranks at 23 an event are spent after 178.1 events, so at the 179th
    assert growth["reached_at_step"] == 1140 + 178 * 200


def test_a_plan_out_of_reach_says_why(olmoe, capsys):
    given = ("grow_every=200", "p_grow=0.05", "--steps", 1000)
    growth = ask(capsys, olmoe, "preset=paper-v3", *given)["growth"]
    assert growth["reached"] is False
    assert "the budget cannot be reached: 64 experts" in growth["reason"]


def test_text_for_people(olmoe, capsys):
    path = olmoe / "config.json"
    assert main(["inspect", str(path), "preset=paper-v3", "--steps", "37997"]) == 0
    said = capsys.readouterr().out
    for part in (
        "6,919,161,856 parameters",
        "16 MoE blocks",
        "404,750,336 parameters",
        "of them 2,097,152 in routers",
        "weights 13.84 (bfloat16)",
        "6.48 GB (r_max for every expert would be 12.92 GB)",
        "184 events, one every 200 steps from step 1,140 to 37,740 of 37,997",
        "at most 9 ranks an expert and event",
        "quota 23 module ranks",
        "the budget is reached at step 36,740",
        # Events and mean rank of the paper's Table 10, which has 36.49 and 41.88 there.
        "6,000      25     36.484",
        "12,000      55     41.875",
    ):
        assert part in said
    assert len(said.splitlines()) < 40


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": ["q_proj", "o_proj"], "target_rank": 3},
        {"target_modules": "all-linear", "projections": ["up", "down"], "router": "train"},
        {"modules_to_save": ["lm_head"], "router": "train"},
        {"experts": ["model.layers.1.mlp.experts"], "router": "train"},
    ],
    ids=["experts", "attention", "paper", "in full", "one block"],
)
def test_figures_are_those_of_a_real_adapter(tmp_path, capsys, changes):
    folder = save_model_folder(tmp_path / "model")
    config = DrLoraConfig(r_init=1, r_target=3, r_max=8, p_grow=0.5, **changes)
    found = inspect(str(folder), config, dtype="bfloat16")
    base = make_model("olmoe").to(torch.bfloat16)
    total, in_base = sum(p.numel() for p in base.parameters()), base.state_dict()
    model = get_peft_model(base, config)
    lora = [p for name, p in model.named_parameters() if "lora_" in name and "pools" not in name]
    saved = [p for n, p in model.named_parameters() if "modules_to_save.default" in n]
    routers = [p for p in saved if len(p) == 6]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.adapter.r_target.parameters == sum(p.numel() for p in trained)
    beside = found.adapter.beside
    assert beside.ordinary_lora == sum(p.numel() for p in lora)
    assert beside.layers == len(lora) // 2
    assert beside.routers == sum(p.numel() for p in routers)
    assert beside.modules_to_save == sum(p.numel() for p in saved) - beside.routers
    kept = [x for p in trained for x in (p, p.grad, *optimizer.state[p].values()) if x.dim()]
    kept_gb = sum(x.numel() * x.element_size() for x in kept) / 1e9
    assert found.memory_gb.adapter_at_budget == pytest.approx(kept_gb)
    assert found.parameters.total == total == sum(x.numel() for x in in_base.values())
    print_inspection(found)
    assert f"{sum(p.numel() for p in trained):,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["./nowhere"], "model='./nowhere'"),
        (["MODEL", "r_targt=3"], "did you mean adapter.r_target?"),
        (["MODEL", "r_init=9", "r_target=3"], "ranks are out of order"),
        (["MODEL", "--dtype", "float99"], "dtype='float99'"),
    ],
)
def test_bad_input(olmoe, capsys, arguments, part):
    arguments = [str(olmoe) if word == "MODEL" else word for word in arguments]
    assert main(["inspect", *arguments]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "settings", "rank"),
    [
        ("drlora", {}, 3),
        ("drlora-global", {}, 8),  # a layer may fill up to r_max everywhere
        ("adalora", {}, 5),  # begins with 1.5 r_target and prunes
        ("hot", {"options": {"hot_fraction": 0.5}}, 3),
    ],
)
def test_stored_rows_are_those_of_the_method(tmp_path, method, settings, rank):
    folder = save_model_folder(tmp_path / "model")
    given = dict(r_init=1, r_target=3, r_max=8, p_grow=0.5, **settings)
    config = DrLoraConfig.for_method(method, **given)
    found = inspect(str(folder), config)
    model = get_peft_model(make_model("olmoe"), config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.adapter.stored == SizeAtRank(rank, trained)
    memory = found.memory_gb
    assert sum(dataclasses.asdict(memory.parts).values()) == pytest.approx(16 * trained / 1e9)
    assert memory.adapter_at_budget == pytest.approx(16 * trained / 1e9)
    for row in memory.by_rank:
        total = memory.weights + row.trained + memory.activations
        assert row.total == pytest.approx(total)


def test_activations_are_what_autograd_keeps():
    config = DrLoraConfig(r_init=8, r_target=16, r_max=32, engine="grouped")
    base = AutoModelForCausalLM.from_pretrained(model_folder(), dtype="float32")
    model = get_peft_model(base, config)
    ids = torch.arange(4 * 64).reshape(4, 64)
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(s.nbytes() for pointer, s in storages.items() if pointer not in own)
    loss.backward()
    memory = inspect("embedded", config, dtype="float32", batch=Batch(4, 64)).memory_gb
    # The gradient of the logits, twice, is there at the peak too, and what the loss works in.
    logits = ids.numel() * model.config.vocab_size * 4
    assert kept < memory.activations * 1e9 < kept + 4 * logits
    assert memory.activations_with_checkpointing < memory.activations


@pytest.mark.parametrize(
    ("steps", "settings", "said"),
    [
        (1000, dict(grow_every=10, settle_steps=600), "reached at 33% .* raise grow_every"),
        (1000, dict(grow_every=98, settle_steps=0), "leaves .* steps to learn"),
        (500, dict(grow_every=180, settle_steps=20, p_grow=0.5), "only 3 events"),
        (1000, dict(grow_every=40, settle_steps=200), None),
    ],
)
def test_warnings_in_words(tmp_path, steps, settings, said, capsys):
    folder = save_model_folder(tmp_path / "model")
    config = DrLoraConfig(**{**dict(r_init=8, r_target=16, r_max=64, warmup_steps=20), **settings})
    found = inspect(str(folder), config, steps)
    assert len(found.warnings) == (said is not None)
    if said:
        assert re.search(said, found.warnings[0]), found.warnings
    print_inspection(found)
    assert ("warning: " in capsys.readouterr().out) == bool(said)


def test_the_plan_as_a_chart():
    events = [MeanRank(40 + 10 * n, 8.0 + n) for n in range(1, 9)]
    lines = growth_chart(SimpleNamespace(start_rank=8, steps=240, mean_ranks=events))
    assert len(lines) == CHART_HEIGHT + 1
    assert lines[0].startswith("    16 ") and lines[0].endswith("█")
    heights = [sum(row[7:].ljust(60)[i] != " " for row in lines[:-1]) for i in range(60)]
    assert heights == sorted(heights) and heights[0] == 3 and heights[-1] == CHART_HEIGHT
    assert "step 0" in lines[-1] and "240" in lines[-1]
    assert growth_chart(SimpleNamespace(start_rank=8, steps=240, mean_ranks=[])) == []
