"""`drlora inspect`: figures of models that are too large to load, from their config alone."""

import json

import pytest
import torch
from peft import get_peft_model
from tiny import make_model
from tiny_run import save_model_folder
from transformers import OlmoeConfig

from drlora.cli import main
from drlora.config import DrLoraConfig
from drlora.inspection import inspect_model


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
    for name, rank in (("r_init", 32), ("r_target", 64), ("r_max", 128)):
        assert found["adapter"][name] == {"rank": rank, "parameters": rank * numbers_a_rank}
    assert found["adapter"]["budget_ranks"] == 64 * 64 * 16 * 2
    memory = found["memory_gb"]
    assert memory["dtype"] == "bfloat16"
    assert memory["weights"] == pytest.approx(2 * 6_919_161_856 / 1e9)
    # float32 weight, gradient and two moments
    assert memory["adapter_at_budget"] == pytest.approx(16 * 64 * numbers_a_rank / 1e9)
    assert memory["adapter_at_r_max_everywhere"] == 2 * memory["adapter_at_budget"]
    in_float32 = ask(capsys, olmoe, "--dtype", "float32")["memory_gb"]
    assert in_float32["weights"] == 2 * memory["weights"]


def test_olmoe_paper_v3_plan(olmoe, capsys):
    growth = ask(capsys, olmoe, "preset=paper-v3", "--steps", 38_000)["growth"]
    assert growth["warmup_steps"] == 1140
    assert growth["events"] == 183
    assert growth["quota_module_ranks"] == 23
    assert growth["cap_ranks"] == 9
    curve = growth["mean_ranks"]
    assert len(curve) == 183
    assert curve[0] == {"step": 1340, "mean_rank": 32 + 23 // 2 / 64}
    assert curve[-1] == {"step": 1340 + 182 * 200, "mean_rank": 64}
    assert growth["reached"]
    # 2 * 64 * 32 module ranks at 23 an event are spent after 178.1 events, so at the 179th
    assert growth["reached_at_step"] == 1340 + 178 * 200


def test_a_plan_out_of_reach_says_why(olmoe, capsys):
    growth = ask(capsys, olmoe, "preset=paper-v3", "--steps", 1000)["growth"]
    assert growth["reached"] is False
    assert "the budget cannot be reached: 64 experts" in growth["reason"]


def test_text_for_people(olmoe, capsys):
    path = olmoe / "config.json"
    assert main(["inspect", str(path), "preset=paper-v3", "--steps", "38000"]) == 0
    said = capsys.readouterr().out
    for part in (
        "6,919,161,856 parameters",
        "16 MoE blocks",
        "402,653,184 parameters",
        "13.84 GB (bfloat16)",
        "6.44 GB (r_max for every expert would be 12.88 GB)",
        "183 events, quota 23 module ranks",
        "cap 9 ranks",
        "the budget is reached at step 36,940",
    ):
        assert part in said
    assert len(said.splitlines()) < 30


def test_memory_is_what_a_real_adapter_takes(tmp_path):
    folder = save_model_folder(tmp_path / "model")
    config = DrLoraConfig(r_init=1, r_target=3, r_max=8, p_grow=0.5)
    found = inspect_model(str(folder), config)
    model = get_peft_model(make_model("olmoe"), config)
    adapter = [p for p in model.parameters() if p.requires_grad]
    assert found["adapter"]["r_target"]["parameters"] == sum(p.numel() for p in adapter)
    assert found["parameters"]["total"] == sum(p.numel() for p in make_model("olmoe").parameters())
    assert all(p.dtype == torch.float32 for p in adapter)


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
