"""Who reads an export: the table, the plan, the README."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import make_batch
from tiny_adapter import trained

from drlora.export.engines import ENGINES, LAYOUTS, TRIED, Facts, readings, vllm_rank
from drlora.export.plan import apply_plan, make_plan

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


def verdicts(**facts):
    return {reading.engine: reading for reading in readings(Facts(**facts))}


def test_what_was_seen_is_what_is_said():
    """The cells of the table of runs, engine by engine."""
    wanted = {
        ("per-expert", "olmoe"): "PEFT llama.cpp vLLM SGLang",
        ("per-expert", "qwen3_moe"): "PEFT llama.cpp vLLM SGLang mistral.rs",
        ("per-expert", "mixtral"): "PEFT llama.cpp vLLM mistral.rs",
        ("peft", "olmoe"): "PEFT vLLM",
        ("peft", "qwen3_moe"): "PEFT vLLM",
        ("peft", "mixtral"): "PEFT",
        ("peft", "gpt_oss"): "PEFT vLLM",
        ("merged", "olmoe"): "PEFT llama.cpp vLLM mlx-lm transformers serve",
        ("sglang", "mixtral"): "SGLang",
        ("sglang", "gpt_oss"): "SGLang",
        ("gguf", "qwen3_moe"): "llama.cpp",
        ("mlx", "qwen3_moe"): "mlx-lm",
    }
    for (layout, family), names in wanted.items():
        found = verdicts(layout=layout, model_type=family, rank=16)
        reading = " ".join(name for name, reading in found.items() if reading.reads)
        assert reading == names, (layout, family)


@pytest.mark.parametrize(
    ("facts", "engine", "said"),
    [
        (dict(layout="peft", model_type="mixtral"), "vLLM", "leaves the experts"),
        (dict(layout="per-expert", model_type="olmoe", has_modules=True), "vLLM", "in full"),
        (dict(layout="per-expert", model_type="olmoe", has_modules=True), "llama.cpp", "in full"),
        (dict(layout="per-expert", model_type="olmoe", rank=513), "vLLM", "largest rank is 512"),
        (dict(layout="per-expert", model_type="mixtral", rank=8), "SGLang", "use sglang"),
        (dict(layout="per-expert", model_type="olmoe", has_router_lora=True), "SGLang", "routers"),
        (dict(layout="per-expert", model_type="qwen2_moe", peft_loads=False), "PEFT", "not load"),
        (
            dict(layout="per-expert", model_type="qwen3_moe", has_router_lora=True),
            "vLLM",
            "routers",
        ),
    ],
)
def test_refusals_say_why(facts, engine, said):
    found = verdicts(**facts)[engine]
    assert found.reads is False and said in found.why


def test_other_families_are_not_claimed():
    for layout in LAYOUTS:
        for name, reading in verdicts(layout=layout, model_type="glm4_moe", rank=8).items():
            assert name == "PEFT" or not reading.reads
            assert name == "PEFT" or "not tried on this one" in reading.why
    assert len({name for name, *_ in ENGINES}) == len(ENGINES) and "mixtral" in TRIED


def test_ranks_of_vllm():
    assert [vllm_rank(rank) for rank in (1, 2, 16, 65, 512, 513)] == [1, 8, 16, 128, 512, None]


# What converts to gguf is not here; test_gguf.py has one.
@pytest.mark.parametrize("format", [name for name in LAYOUTS if name != "gguf"])
def test_the_plan_and_the_readme_say_it(tmp_path, format):
    model = trained()
    plan = make_plan(model, format)
    assert [reading.engine for reading in plan.readings] == [name for name, *_ in ENGINES]
    apply_plan(plan, model, BATCHES, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Engines" in text and "llama.cpp 11434" in text
    if format == "per-expert":
        rank = vllm_rank(plan.rank)
        assert f"--enable-lora --max-lora-rank {rank} --lora-modules a=THIS_FOLDER" in text
        assert "convert_lora_to_gguf.py --base BASE_MODEL" in text
    record = json.loads((tmp_path / "out" / "drlora_export.json").read_text())
    assert [row["engine"] for row in record["engines"]] == [name for name, *_ in ENGINES]
