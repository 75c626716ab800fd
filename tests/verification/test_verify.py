"""Faults that public reports tell of are made on purpose, and each is named; sound ones pass."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import stored_checkpoints as files
import torch
from made_adapters import BATCHES, CONFIG, FAMILIES, by_peft, make_all, spoil, spoil_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_class, make_model
from tiny_adapter import make_settings, train
from transformers import AutoModelForCausalLM

import drlora
from drlora.cli.main import main
from drlora.errors import CheckpointError, ConfigError
from drlora.export.base_weights import Base
from drlora.export.plan import apply_plan, make_plan
from drlora.ops.merge import Rounding
from drlora.runs.export import export_adapter
from drlora.verification.findings import NAMES, WARNINGS

pytestmark = pytest.mark.filterwarnings("ignore")
LAYOUTS = ["ours", "peft", "per-expert", "stacked", "bare", "by-peft"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Family -> the folder of its adapters, made once."""
    known = {}

    def of(family):
        if family not in known:
            known[family] = make_all(family, tmp_path_factory.mktemp(family))
        return known[family]

    return of


def names(found):
    return {finding.name for finding in found.findings}


def faults(found):
    return {finding.name for finding in found.findings if finding.is_fault}


class TestSound:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_no_false_alarm(self, made, family, layout):
        """Alone, with the base, and with a merge: by ours, or by PEFT of what PEFT trained."""
        folder = made(family)
        merged = folder / ("by-peft/merged" if layout == "by-peft" else "merged")
        base = str(folder / "base")
        blocks = 1 if family in ("deepseek_v3", "glm4_moe") else 2
        for how in ({}, {"base": base}, {"base": base, "merged": merged}):
            found = drlora.verify(folder / layout, **how)
            assert found.is_sound, [str(finding) for finding in found.findings]
            assert found.blocks == blocks and found.experts == (4 if family == "mixtral" else 6)
            assert names(found) <= {"keys-of-transformers-4", "dead-experts"}
        assert len(found.merged) >= 2 * blocks
        assert all(one.share == pytest.approx(1, abs=1e-3) for one in found.merged)

    @pytest.mark.parametrize("class_name", ["GptOssForCausalLM", "GraniteMoeForCausalLM"])
    def test_other_layouts_of_experts(self, tmp_path, class_name):
        """Transposed, interleaved, together in the checkpoint: PEFT's own LoRA, merged by PEFT."""
        torch.manual_seed(1)
        make_class(class_name).save_pretrained(tmp_path / "base")
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=4, lora_alpha=8, target_parameters=parameters)
        try:
            model = get_peft_model(make_class(class_name), config)
        except ValueError:
            pytest.skip("its experts have other names")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        model.save_pretrained(tmp_path / "lora")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        found = drlora.verify(tmp_path / "lora", str(tmp_path / "base"), tmp_path / "merged")
        assert found.is_sound, [str(finding) for finding in found.findings]
        assert found.merged and all(m.share == pytest.approx(1, abs=1e-3) for m in found.merged)

    @pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"])
    def test_folders_of_mlx_lm(self, tmp_path, family):
        """Routers and attention too, and their merge."""
        out = beside_experts(family, tmp_path, "mlx", router="train")
        found = drlora.verify(out, str(tmp_path / "base"), tmp_path / "merged")
        assert found.is_sound, [str(finding) for finding in found.findings]
        assert found.type == "MLX" and found.layouts == ("stacked",)
        compared = {one.name for one in found.merged}
        assert sum(name.endswith(".gate") and "experts" not in name for name in compared) >= 2
        assert sum(name.endswith("q_proj") for name in compared) == 2
        assert all(one.share == pytest.approx(1, abs=1e-3) for one in found.merged)
        reads = {reading.engine: reading.reads for reading in found.engines}
        assert reads["mlx-lm"] and not reads["vLLM"]

    @pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "GptOssForCausalLM"])
    def test_stacked_tensors_as_sglang_reads_them(self, tmp_path, class_name):
        out = beside_experts(class_name, tmp_path, "sglang")
        found = drlora.verify(out, str(tmp_path / "base"), tmp_path / "merged")
        assert found.is_sound, [str(finding) for finding in found.findings]
        assert all(one.share == pytest.approx(1, abs=1e-3) for one in found.merged)
        assert {reading.engine: reading.reads for reading in found.engines}["SGLang"]

    @pytest.mark.parametrize("projections", [["gate_up", "down"], ["gate", "up", "down"]])
    def test_our_own_of_gate_and_up_in_turns(self, tmp_path, projections):
        beside_experts("GptOssForCausalLM", tmp_path, "peft", projections=projections)
        settings = make_settings(projections=projections)
        model = train(get_peft_model(make_class("GptOssForCausalLM"), settings))
        model.save_pretrained(tmp_path / "ours")
        plan = make_plan(model, "merged")
        apply_plan(plan, model, BATCHES, tmp_path / "own-merge")
        for adapter, merged in (("ours", "own-merge"), ("peft", "merged")):
            found = drlora.verify(tmp_path / adapter, str(tmp_path / "base"), tmp_path / merged)
            assert found.is_sound and len(found.merged) >= 2 * 2, [str(f) for f in found.findings]
            assert all(one.share == pytest.approx(1, abs=1e-3) for one in found.merged)
        found = drlora.verify(tmp_path / "ours", str(tmp_path / "base"), tmp_path / "base")
        assert faults(found) == {"dropped-in-merge"}

    @pytest.mark.parametrize(
        "changes", [{"target_rank": 2, "target_alpha": 1.0}, {"target_rank": 2, "use_rslora": True}]
    )
    def test_other_layers_have_a_scaling_of_their_own(self, tmp_path, changes):
        make_model().save_pretrained(tmp_path / "base")
        settings = make_settings(target_modules=["q_proj"], **changes)
        model = train(get_peft_model(make_model(), settings))
        model.save_pretrained(tmp_path / "ours")
        apply_plan(make_plan(model, "merged"), model, BATCHES, tmp_path / "merged")
        found = drlora.verify(tmp_path / "ours", str(tmp_path / "base"), tmp_path / "merged")
        assert found.is_sound, [str(finding) for finding in found.findings]

    @pytest.mark.parametrize("beside", [{}, {"target_modules": ["lm_head"], "target_rank": 2},
                                        {"modules_to_save": ["embed_tokens"]}])  # fmt: skip
    @pytest.mark.parametrize("format", ["ours", "peft", "per-expert"])
    def test_embeddings_that_were_resized(self, tmp_path, format, beside):
        make_model().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(base.config.vocab_size + 3)
        model = train(get_peft_model(base, make_settings(**beside)))
        model.save_pretrained(tmp_path / "ours")
        plans = {name: export_adapter(tmp_path / "ours", name, tmp_path / name).plan
                 for name in {format, "merged"} - {"ours"}}  # fmt: skip
        found = drlora.verify(tmp_path / format, str(tmp_path / "base"), tmp_path / "merged")
        assert found.is_sound, [str(finding) for finding in found.findings]
        assert "not-compared" not in names(found)
        assert {"lm_head", "lm_head.weight"} & {one.name for one in found.merged}
        if format == "per-expert":  # the plan says what the files say
            for readings in (plans[format].readings, found.engines):
                reads = {reading.engine: reading.reads for reading in readings}
                assert reads["vLLM"] is reads["llama.cpp"] is False

    def test_packing_is_told_by_what_training_leaves(self, made):
        found = drlora.verify(made("olmoe") / "by-peft")
        assert found.packing == "right"

    def test_who_reads_it(self, made):
        folder = made("olmoe")
        base = str(folder / "base")
        found = drlora.verify(folder / "per-expert", base)
        assert {r.engine: r.reads for r in found.engines}["llama.cpp"] is True
        found = drlora.verify(folder / "peft", base)  # routers in full
        assert {r.engine: r.reads for r in found.engines}["vLLM"] is False


def beside_experts(family, folder, format, **changes):
    """An adapter with LoRA on attention too, in a format, with its base and its merge."""
    made = {f: train(get_peft_model(
        make_class(family) if family.endswith("LM") else make_model(family),
        make_settings(target_modules=["q_proj"], target_rank=3, **changes),
    )) for f in (format, "merged")}  # fmt: skip
    base = make_class(family) if family.endswith("LM") else make_model(family)
    base.save_pretrained(folder / "base")
    for name, model in made.items():
        apply_plan(make_plan(model, name), model, BATCHES, folder / name)
    return folder / format


def repack(tensors, config):
    """B expert by expert, as several tools had it."""
    for key in tensors:
        if ".experts." in key and "lora_B" in key:
            tensors[key] = tensors[key].unflatten(1, (-1, 6)).transpose(1, 2).flatten(1)


def read_by_expert(tensors, config):
    """B such that PEFT reads in it what a reader by expert finds in the right one."""
    for key in tensors:
        if ".experts." in key and "lora_B" in key:
            tensors[key] = tensors[key].unflatten(1, (6, -1)).transpose(1, 2).flatten(1)


def zero_b(tensors, config):
    for key in tensors:
        if ".experts." in key and "lora_B" in key:
            tensors[key].zero_()


def drop(*parts):
    def change(tensors, config):
        for key in [key for key in tensors if all(part in key for part in parts)]:
            del tensors[key]

    return change


def drop_outer(tensors, config):
    for key in [key for key in tensors if ".experts.lora_" in key]:
        del tensors[key]


def not_a_number(tensors, config):
    tensors[next(key for key in tensors if "lora_B" in key and "experts" in key)][0, 0] = torch.nan


def other_rank(tensors, config):
    config["r"] *= 2


def copied(tensors, config):
    for key in tensors:
        head, _, rest = key.partition(".experts.")
        if rest and not rest.startswith("0."):
            tensors[key] = tensors[f"{head}.experts.0.{rest.partition('.')[2]}"].clone()


def renamed(tensors, config):
    for key in list(tensors):
        tensors[key.replace("model.layers", "language_model.layers")] = tensors.pop(key)


def attention_alone(tensors, config):
    tensors.clear()
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(32, 4)


def wide(tensors, config):
    config["r"] = config["lora_alpha"] = 640
    for key in tensors:
        axis = 0 if "lora_A" in key else 1
        padding = (
            [0, 0, 0, 640 - tensors[key].shape[0]]
            if axis == 0
            else [0, 640 - tensors[key].shape[1]]
        )
        tensors[key] = torch.nn.functional.pad(tensors[key], padding)


def one_of_less(tensors, config):
    for key in tensors:
        if ".experts.2.down_proj" in key:
            tensors[key] = tensors[key][:3] if "lora_A" in key else tensors[key][:, :3]


def larger(tensors, config):
    config["lora_alpha"] *= 1000


def dead(tensors, config):
    for key in tensors:
        if ".experts.3." in key and "lora_B" in key:
            tensors[key].zero_()


@pytest.mark.parametrize(
    ("layout", "change", "name", "is_fault"),
    [
        ("by-peft", repack, "packing", True),
        ("peft", repack, "packing", True),
        ("peft", zero_b, "inert-experts", True),
        ("ours", drop("nothing"), None, False),
        ("per-expert", zero_b, "inert-experts", True),
        ("peft", drop_outer, "dropped-projection", True),
        ("per-expert", drop("down_proj"), "dropped-projection", True),
        ("per-expert", drop("layers.1", "down_proj"), "dropped-projection", True),
        ("peft", drop("mlp.gate.weight"), "lost-routers", True),
        ("per-expert", drop("mlp.gate."), "lost-routers", True),
        ("peft", not_a_number, "not-finite", True),
        ("per-expert", not_a_number, "not-finite", True),
        ("per-expert", drop(".experts.4."), "missing-experts", True),
        ("stacked", drop("layers.0", "up_proj"), "dropped-projection", True),
        ("per-expert", drop(".experts.1.up_proj.lora_A"), "half-a-pair", True),
        ("per-expert", other_rank, "rank", True),
        ("by-peft", attention_alone, "no-expert-touched", True),
        ("per-expert", copied, "copied-experts", False),
        ("per-expert", dead, "dead-experts", False),
        ("per-expert", wide, "rank-beyond-engine", False),
        ("per-expert", one_of_less, "unequal-ranks", False),
        ("by-peft", renamed, "unread-keys", True),
        ("by-peft", larger, "larger-than-weights", False),
    ],
)
def test_faults_of_files(made, tmp_path, layout, change, name, is_fault):
    folder = made("olmoe")
    spoil(folder / layout, tmp_path / "spoilt", change)
    found = drlora.verify(tmp_path / "spoilt", str(folder / "base"))
    if name is None:
        assert found.is_sound
        return
    assert name in (faults(found) if is_fault else names(found)), [str(f) for f in found.findings]


def test_faults_that_need_no_base(made, tmp_path):
    for layout, change, name in (
        ("by-peft", repack, "packing"),
        ("peft", zero_b, "inert-experts"),
        ("per-expert", drop(".experts.4."), "missing-experts"),
        ("peft", drop("mlp.gate.weight"), "lost-routers"),
    ):
        out = spoil(made("olmoe") / layout, tmp_path / f"{layout}-{name}", change)
        assert name in faults(drlora.verify(out)), name


def test_keys_of_transformers_4_that_peft_does_not_translate(made):
    """Of Qwen2-MoE; engines read them."""
    folder = made("qwen2_moe")
    found = drlora.verify(folder / "per-expert", str(folder / "base"))
    assert found.is_sound and "keys-of-transformers-4" in names(found)
    reads = {reading.engine: reading.reads for reading in found.engines}
    assert reads["PEFT"] is False and reads["vLLM"] is True


@pytest.mark.parametrize("layout", ["ours", "peft", "per-expert", "by-peft"])
@pytest.mark.parametrize(
    "other", [{"hidden_size": 64}, {"num_experts": 4}, {"num_hidden_layers": 1}]
)
def test_another_base(made, tmp_path, layout, other):
    make_model(**other).save_pretrained(tmp_path / "other")
    found = drlora.verify(made("olmoe") / layout, str(tmp_path / "other"))
    assert faults(found) & {"wrong-base", "rank"}, [str(f) for f in found.findings]


@pytest.mark.parametrize(
    ("quantise", "settings"),
    [(files.fp8_blocks, files.FP8_SETTINGS), (files.int8_rows, files.compressed_settings())],
)
def test_beside_a_base_that_is_quantised(tmp_path, quantise, settings):
    """Its codes are no weights, so no norm of theirs and no merge is beside them."""
    sizes = dict(hidden_size=128, intermediate_size=128)
    make_model(**sizes).save_pretrained(tmp_path / "base")
    train(get_peft_model(make_model(**sizes), make_settings())).save_pretrained(tmp_path / "ours")
    files.rewrite(tmp_path / "base", quantise, settings)
    found = drlora.verify(tmp_path / "ours", str(tmp_path / "base"))
    assert found.is_sound and found.shares == {} and names(found) == {"not-compared"}
    with pytest.raises(ConfigError, match="is quantised .*name the 16-bit checkpoint"):
        drlora.verify(tmp_path / "ours", str(tmp_path / "base"), tmp_path / "base")


def _experts(tensors):
    return [key for key in tensors if ".experts." in key]


class TestMerges:
    """Of what PEFT trained, with the merge spoilt."""

    def verify(self, made, out, layout="by-peft"):
        folder = made("olmoe")
        return drlora.verify(folder / layout, str(folder / "base"), out)

    def spoilt(self, made, tmp_path, change):
        source = made("olmoe") / "by-peft" / "merged"
        return self.verify(made, spoil_model(source, tmp_path / "m", change))

    def test_the_update_is_not_there(self, made):
        found = self.verify(made, made("olmoe") / "base")
        assert faults(found) == {"dropped-in-merge"}

    def test_it_is_there_twice(self, made, tmp_path):
        before = load_file(made("olmoe") / "base" / "model.safetensors")

        def twice(tensors):
            for key in _experts(tensors):
                tensors[key] += tensors[key] - before[key]

        found = self.spoilt(made, tmp_path, twice)
        assert faults(found) == {"scale"} and "2 times" in str(found.findings[0])

    def test_experts_in_the_order_of_their_names_as_text(self, made, tmp_path):
        before = load_file(made("olmoe") / "base" / "model.safetensors")

        def rotate(tensors):
            moved = {key: tensors[key] - before[key] for key in _experts(tensors)}
            for key in moved:
                head, _, rest = key.partition(".experts.")
                expert, _, leaf = rest.partition(".")
                other = f"{head}.experts.{(int(expert) + 1) % 6}.{leaf}"
                tensors[key] = before[key] + moved[other]

        found = self.spoilt(made, tmp_path, rotate)
        assert faults(found) == {"expert-order"} and "0 has that of 1" in str(found.findings[0])

    def test_b_was_read_by_the_other_layout(self, made, tmp_path):
        """The adapter is right, and the tool that merged it was not."""
        spoil(made("olmoe") / "by-peft", tmp_path / "other", read_by_expert)
        model = PeftModel.from_pretrained(make_model(), tmp_path / "other")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert faults(self.verify(made, tmp_path / "merged")) == {"packing"}

    def test_one_projection_is_not_merged(self, made, tmp_path):
        before = load_file(made("olmoe") / "base" / "model.safetensors")

        def forget(tensors):
            for key in _experts(tensors):
                if "down_proj" in key:
                    tensors[key] = before[key]

        found = self.spoilt(made, tmp_path, forget)
        assert faults(found) == {"dropped-in-merge"}
        assert all("down" in f.where for f in found.findings if f.is_fault)

    @pytest.mark.parametrize("layout", ["ours", "peft", "per-expert"])
    @pytest.mark.parametrize(("part", "name"), [(0.0, "dropped-in-merge"), (2.0, "scale")])
    def test_a_router_is_not_merged_or_twice(self, made, tmp_path, layout, part, name):
        """Whether it was trained in full or left as LoRA."""
        before = load_file(made("olmoe") / "base" / "model.safetensors")

        def change(tensors):
            key = "model.layers.1.mlp.gate.weight"
            tensors[key] = before[key] + part * (tensors[key] - before[key])

        out = spoil_model(made("olmoe") / "merged", tmp_path / "m", change)
        found = self.verify(made, out, layout)
        assert faults(found) == {name}, [str(f) for f in found.findings]
        assert all("layers.1.mlp.gate" in f.where for f in found.findings if f.is_fault)

    def test_a_layer_of_attention_is_not_merged(self, tmp_path):
        out = beside_experts("olmoe", tmp_path, "per-expert")
        before = load_file(tmp_path / "base" / "model.safetensors")

        def forget(tensors):
            key = "model.layers.0.self_attn.q_proj.weight"
            tensors[key] = before[key]

        merged = spoil_model(tmp_path / "merged", tmp_path / "m", forget)
        found = drlora.verify(out, str(tmp_path / "base"), merged)
        assert faults(found) == {"dropped-in-merge"}
        assert [f.where for f in found.findings if f.is_fault] == [
            "model.layers.0.self_attn.q_proj"
        ]

    def test_rounding_to_the_nearest_swallowed_the_update(self, made, tmp_path):
        """In bfloat16, of an update that is small beside the weights."""
        base = make_model().to(torch.bfloat16)
        base.save_pretrained(tmp_path / "base")
        by_peft("olmoe", tmp_path / "lora", steps=1)

        def small(tensors, config):
            config["lora_alpha"] = 0.5

        spoil(tmp_path / "lora", tmp_path / "small", small)
        model = PeftModel.from_pretrained(base.float(), tmp_path / "small")
        model.merge_and_unload().to(torch.bfloat16).save_pretrained(tmp_path / "merged")
        found = drlora.verify(tmp_path / "small", str(tmp_path / "base"), tmp_path / "merged")
        assert faults(found) == {"lost-in-rounding"}
        assert "of its entries are as they were" in str(found.findings[0])

    def test_pefts_own_merge_into_16_bits(self, tmp_path):
        """It rounds the update before it adds it."""
        make_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
        by_peft("olmoe", tmp_path / "lora", steps=1)

        def small(tensors, config):
            config["lora_alpha"] = 0.5

        spoil(tmp_path / "lora", tmp_path / "small", small)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        merged = PeftModel.from_pretrained(base, tmp_path / "small").merge_and_unload()
        assert merged.dtype == torch.bfloat16
        merged.save_pretrained(tmp_path / "merged")
        found = drlora.verify(tmp_path / "small", str(tmp_path / "base"), tmp_path / "merged")
        assert faults(found) == {"lost-in-rounding"}, [str(f) for f in found.findings]

    @pytest.mark.parametrize("lr", [1e-4, 2e-2])
    def test_stochastic_rounding_is_no_fault(self, tmp_path, lr):
        """Of our own merge into bfloat16, however small the update is."""
        make_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = train(get_peft_model(base, make_settings()), lr=lr)
        model.save_pretrained(tmp_path / "ours")
        plan = make_plan(model, "merged")
        apply_plan(plan, model, BATCHES, tmp_path / "merged", rounding=Rounding("stochastic", 3))
        found = drlora.verify(tmp_path / "ours", str(tmp_path / "base"), tmp_path / "merged")
        assert found.is_sound, [str(finding) for finding in found.findings]

    def test_something_else_was_merged(self, made, tmp_path):
        def noise(tensors):
            torch.manual_seed(0)
            for key in _experts(tensors):
                tensors[key] += 0.05 * torch.randn_like(tensors[key])

        before = load_file(made("olmoe") / "base" / "model.safetensors")

        def other(tensors):
            for key in _experts(tensors):
                tensors[key] = before[key].clone()
            noise(tensors)

        assert faults(self.spoilt(made, tmp_path, other)) == {"differs-in-merge"}

    def test_another_base_was_merged_into(self, made, tmp_path):
        def other(tensors):
            for key in tensors:
                if key.endswith("norm.weight"):
                    tensors[key] += 0.1

        assert "wrong-base" in faults(self.spoilt(made, tmp_path, other))

    @pytest.mark.parametrize("layout", ["ours", "by-peft"])
    @pytest.mark.parametrize(
        ("family", "changes"),
        [("olmoe", {"hidden_size": 64}), ("olmoe", {"num_hidden_layers": 1}), ("mixtral", {})],
    )
    def test_a_merged_model_of_other_shapes(self, made, tmp_path, layout, family, changes):
        make_model(family, **changes).save_pretrained(tmp_path / "other")
        assert faults(self.verify(made, tmp_path / "other", layout)) == {"wrong-base"}

    @pytest.mark.parametrize("tied", [False, True])
    def test_single_tokens_are_not_merged(self, tmp_path, tied):
        make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        settings = make_settings(trainable_token_indices={"embed_tokens": [5, 7]})
        model = train(get_peft_model(base, settings))
        model.save_pretrained(tmp_path / "ours")
        apply_plan(make_plan(model, "merged"), model, BATCHES, tmp_path / "merged")
        found = drlora.verify(tmp_path / "ours", str(tmp_path / "base"), tmp_path / "merged")
        assert found.is_sound, [str(finding) for finding in found.findings]
        before = load_file(tmp_path / "base" / "model.safetensors")

        def forget(tensors):
            tensors["model.embed_tokens.weight"] = before["model.embed_tokens.weight"]

        merged = spoil_model(tmp_path / "merged", tmp_path / "m", forget)
        found = drlora.verify(tmp_path / "ours", str(tmp_path / "base"), merged)
        assert faults(found) == {"dropped-in-merge"}

    def test_where_nothing_could_be_compared(self, made, monkeypatch):
        """Of a base whose experts are under names that are not known."""
        monkeypatch.setattr(Base, "keys_of", lambda base, block: [])
        assert "not-compared" in faults(self.verify(made, made("olmoe") / "by-peft" / "merged"))


def test_the_page_says_what_is_a_warning():
    """docs/serving.md: names of findings, and which of them leave the exit code at 0."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    part = page.partition("## A check of anybody's adapter")[2].partition("\n## ")[0]
    table = [line for line in part.splitlines() if line.startswith("| `")]
    said = {name for line in table for name in re.findall(r"`([a-z0-9-]+)`", line.split("|")[1])}
    assert said == set(NAMES)
    listed = part.partition("Warnings, which leave the exit code at 0:")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z0-9-]+)`", listed)) == set(WARNINGS)


class TestCommandLine:
    def test_sound_and_not(self, made, tmp_path, capsys):
        folder = made("olmoe")
        words = ["--base", str(folder / "base")]
        assert main(["verify", str(folder / "by-peft"), *words]) == 0
        printed = capsys.readouterr().out
        assert ": sound" in printed and "expert fastest" in printed and "llama.cpp" in printed
        spoil(folder / "by-peft", tmp_path / "spoilt", repack)
        assert main(["verify", str(tmp_path / "spoilt"), *words]) == 1
        assert "FAULT    packing" in capsys.readouterr().out

    def test_json(self, made, capsys):
        folder = made("olmoe")
        words = ["--base", str(folder / "base"), "--merged", str(folder / "base"), "--json"]
        assert main(["verify", str(folder / "by-peft"), *words]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["is_sound"] is False and found["type"] == "LORA"
        assert {f["name"] for f in found["findings"]} == {"dropped-in-merge"}
        assert found["findings"][0]["meaning"] == NAMES["dropped-in-merge"]

    def test_bad_input(self, made, tmp_path, capsys):
        folder = made("olmoe")
        for words, said in (
            ([str(tmp_path)], CONFIG),
            ([str(folder / "peft"), "--base", str(tmp_path)], "there is no config.json"),
        ):
            assert main(["verify", *words]) == 2
            assert said in capsys.readouterr().err
        with pytest.raises(ConfigError, match="--base"):
            drlora.verify(folder / "by-peft", merged=folder / "merged")
        with pytest.raises(CheckpointError, match="holds no model.safetensors"):
            drlora.verify(folder / "peft", str(folder / "base"), tmp_path)
