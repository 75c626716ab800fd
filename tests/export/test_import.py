"""Starts from elsewhere: a LoRA of PEFT's, a rank map, or how tokens are routed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_batch, make_class, make_model, plain_loop, trainable
from tiny_adapter import SETTINGS, logits, trained
from tiny_run import save_all, save_model_folder
from transformers import AutoModelForCausalLM

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.cli.main import main
from drlora.errors import CheckpointError, ConfigError
from drlora.export.plan import apply_plan, make_plan
from drlora.ranks.placement import proportional_ranks

GROWTH = dict(p_grow=0.5, grow_every=2, warmup_steps=1, settle_steps=1)


def save_lora(folder, family="olmoe", base=None, **changes):
    """A PEFT LoRA on experts with random weights, in a folder; returns its logits."""
    settings = dict(r=3, lora_alpha=5, target_modules=[],
                    target_parameters=["experts.gate_up_proj", "experts.down_proj"])  # fmt: skip
    model = get_peft_model(base or make_model(family), LoraConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return logits(model) if base is None else uncached(model)


def uncached(model):
    """Logits without a cache, which not every class can make for a model this small."""
    with torch.no_grad():
        return model.eval()(input_ids=make_batch(7)["input_ids"], use_cache=False).logits


def grow(model, steps=8):
    dynamics = drlora.RankDynamics(model, total_steps=steps)
    plain_loop(model, dynamics, torch.optim.AdamW(trainable(model), lr=1e-2), range(steps))
    return dynamics


class TestPeftLora:
    @pytest.mark.parametrize(
        ("family", "changes", "config"),
        [
            ("olmoe", {}, {}),
            ("olmoe", {"use_rslora": True, "lora_alpha": 2}, {}),
            ("olmoe", {"target_modules": ["q_proj", "v_proj"]}, {}),
            ("olmoe", {"target_modules": ["q_proj"]}, {"use_rslora": True}),
            ("olmoe", {"modules_to_save": ["lm_head", "mlp.gate"]}, {}),
            ("olmoe", {}, {"projections": ["gate", "up", "down"]}),
            ("olmoe", {"target_parameters": ["experts.down_proj"]}, {"projections": ["down"]}),
            ("olmoe", {"target_parameters": ["experts.down_proj"]}, {}),
            ("olmoe", {"target_parameters": ["layers.1.mlp.experts.down_proj"]}, {}),
            ("olmoe", {"rank_pattern": {r".*\.gate_up_proj": 6}}, {"r_init": 7, "r_target": 8}),
            ("mixtral", {}, {"lora_alpha": 1.0}),
            ("granitemoe", {}, {}),
        ],
    )
    @pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
    def test_computes_the_same(self, tmp_path, family, changes, config):
        wanted = save_lora(tmp_path, family, **changes)
        assert (wanted - logits(make_model(family))).abs().max() > 0.05
        settings = drlora.DrLoraConfig(
            **{"r_init": 3, "r_target": 6, "r_max": 12, "p_grow": 0.5, **config}
        )
        model = drlora.load_peft_lora(make_model(family), tmp_path, settings)
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("class_name", "projections"),
        [
            ("GptOssForCausalLM", ["gate_up", "down"]),  # transposed, interleaved
            ("GptOssForCausalLM", ["gate", "up", "down"]),
            ("Llama4ForCausalLM", ["gate_up", "down"]),  # transposed, without a flag
            ("NemotronHForCausalLM", ["up", "down"]),  # no gate
            ("Step3p7ForConditionalGeneration", ["gate_up", "down"]),
        ],
    )
    def test_other_layouts(self, tmp_path, class_name, projections):
        name = "experts.up_proj" if "NemotronH" in class_name else "experts.gate_up_proj"
        wanted = save_lora(
            tmp_path, base=make_class(class_name), target_parameters=[name, "experts.down_proj"]
        )
        assert (wanted - uncached(make_class(class_name))).abs().max() > 0.05
        settings = drlora.DrLoraConfig(
            r_init=3, r_target=6, r_max=12, p_grow=0.5, projections=projections
        )
        model = drlora.load_peft_lora(make_class(class_name), tmp_path, settings)
        torch.testing.assert_close(uncached(model), wanted, rtol=0, atol=1e-5)

    def test_grows_from_there(self, tmp_path):
        wanted = save_lora(tmp_path)
        config = drlora.DrLoraConfig(r_init=3, r_target=5, r_max=9, **GROWTH)
        model = drlora.load_peft_lora(make_model(), tmp_path, config)
        assert config.experts is None  # the user's object is as it was
        ranks = drlora.rank_map(model)
        assert all(r == [3] * 6 for block in ranks.values() for r in block.values())
        dynamics = grow(model)
        assert dynamics.budget() == (4 * 6 * 5, 4 * 6 * 5)
        assert len({*drlora.rank_map(model)["model.layers.0.mlp"]["down"]}) > 1
        assert not torch.allclose(logits(model), wanted, atol=1e-3)

    def test_default_settings(self, tmp_path):
        save_lora(tmp_path)
        config = drlora.load_peft_lora(make_model(), tmp_path).peft_config["default"]
        assert (config.r_init, config.r_target, config.r_max) == (3, 6, 12)

    @pytest.mark.parametrize("format", ["peft", "per-expert"])
    def test_reads_an_export_back(self, tmp_path, format):
        model = trained(target_modules=["q_proj"], target_rank=2)
        wanted, ids = logits(model), make_batch(7)["input_ids"]
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
        plan = make_plan(model, format)
        apply_plan(plan, model, batches, tmp_path / "out")
        settings = drlora.DrLoraConfig(r_init=2 * plan.rank, r_target=16, r_max=32)
        again = drlora.load_peft_lora(make_model(), tmp_path / "out", settings)
        torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("changes", "config", "error", "match"),
        [
            ({}, {"r_init": 2}, ConfigError, r"r_init=2 is less than the rank.*r_init=3"),
            ({}, {"projections": ["up", "down"]}, ConfigError, "leave out a part of gate_up"),
            ({}, {"projections": ["gate_up"]}, ConfigError, "leave out a part of down"),
            ({}, {"target_modules": ["q_proj"]}, ConfigError, "no other layers than experts"),
            ({}, {"start": "routing"}, ConfigError, "start='routing'.*leave these settings out"),
            ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}, ConfigError,
             "decided by the LoRA"),
            ({"target_modules": ["q_proj"], "target_parameters": None}, {}, ConfigError,
             "on no expert.*q_proj"),
        ],
    )  # fmt: skip
    def test_settings_that_do_not_fit(self, tmp_path, changes, config, error, match):
        save_lora(tmp_path, **changes)
        settings = drlora.DrLoraConfig(
            **{"r_init": 3, "r_target": 6, "r_max": 12, "p_grow": 0.5, **config}
        )
        with pytest.raises(error, match=match):
            drlora.load_peft_lora(make_model(), tmp_path, settings)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"trainable_token_indices": [5, 6]}, "trainable_token_indices=.*single tokens"),
            ({"bias": "all"}, "bias='all', which trains biases.*merge_and_unload"),
            ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias='lora_only'"),
        ],
    )
    def test_what_else_a_lora_changes_is_refused(self, tmp_path, changes, match):
        save_lora(tmp_path, "qwen2_moe", **changes)
        base = make_model("qwen2_moe")
        before = {key: value.clone() for key, value in base.state_dict().items()}
        with pytest.raises(ConfigError, match=match):
            drlora.load_peft_lora(base, tmp_path)
        assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())

    @pytest.mark.parametrize("damage", ["other size", "truncated", "missing", "type", "no json"])
    def test_folders_that_do_not_fit(self, tmp_path, damage):
        save_lora(tmp_path)
        weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
        base, match = make_model(), {
            "other size": "cannot be loaded into Olmoe.*another model",
            "truncated": "no whole safetensors file",
            "missing": "no adapter_model.safetensors",
            "type": "of type 'DRLORA'",
            "no json": "one JSON object",
        }[damage]  # fmt: skip
        if damage == "other size":
            base = make_model(num_experts=5)
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif damage == "missing":
            weights.unlink()
        elif damage == "type":
            config.write_text(config.read_text().replace('"LORA"', '"DRLORA"'))
        else:
            config.write_text("[]")
        with pytest.raises(CheckpointError, match=match):
            drlora.load_peft_lora(base, tmp_path)


class TestRecipe:
    """`start_from` and `start_ranks` of a recipe; a resumed run does not begin again."""

    def start(self, folder, **changes):
        """A recipe that continues a LoRA of rank 2 on experts and q_proj; and the LoRA."""
        recipe = save_all(folder, start_from=str(folder / "lora"), **changes)
        adapter = dict(r=2, target_modules=["q_proj"])
        save_lora(folder / "lora", base=AutoModelForCausalLM.from_pretrained(folder / "model"),
                  **adapter)  # fmt: skip
        return recipe, folder / "lora"

    @staticmethod
    def losses(run):
        entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return {e["step"]: e["loss"] for e in entries if e.get("kind") == "log" and "loss" in e}

    def test_a_run_continues_a_lora_and_resumes_without_it(self, tmp_path, capsys):
        recipe, lora = self.start(tmp_path, adapter=dict(r_init=2, r_target=3, r_max=8, p_grow=0.5))
        straight = tmp_path / "straight"
        assert main(["train", str(recipe), f"output_dir={straight}"]) == 0
        capsys.readouterr()
        of_lora = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "eval.jsonl")]
        assert main(["eval", str(lora), "--json", *of_lora]) == 0
        before = json.loads((straight / "result.json").read_text())["before"]
        found = json.loads(capsys.readouterr().out)
        assert before["loss"]["loss"] == pytest.approx(found["loss"]["loss"], rel=1e-5)

        cut = tmp_path / "cut"
        shutil.copytree(straight, cut)
        for name in ("result.json", "adapter_model.safetensors", "checkpoints/checkpoint-12"):
            path = cut / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        config = cut / "config.yaml"
        config.write_text(config.read_text().replace(str(straight), str(cut)))
        shutil.rmtree(lora)
        assert main(["train", str(config), "--resume"]) == 0
        for name in ("adapter_model.safetensors", "growth.jsonl"):
            assert (cut / name).read_bytes() == (straight / name).read_bytes(), name
        assert self.losses(cut) == self.losses(straight) and len(self.losses(cut)) == 12

    def test_a_run_starts_at_the_ranks_of_a_file(self, tmp_path):
        """And is refused where they do not fit, before a step is taken."""
        recipe = save_all(tmp_path, training=dict(max_steps=8))
        model = get_peft_model(
            make_model(), drlora.DrLoraConfig(r_init=1, r_target=3, r_max=8, p_grow=0.5)
        )
        ranks = uneven(model)
        path = tmp_path / "ranks.json"
        path.write_text(json.dumps(ranks))
        assert main(["train", str(recipe), f"start_ranks={path}"]) == 0
        found = json.loads((tmp_path / "run" / "result.json").read_text())
        for block, inner in found["ranks"].items():
            for projection, row in inner.items():
                grown = np.array(row) - ranks[block][projection]
                assert (grown >= 0).all() and grown.sum() == 18 - 12

    def test_rows_of_a_are_laid_in_the_ranks_of_a_file(self, tmp_path, capsys):
        """A rule for rows goes with a map; one that would place ranks contradicts it."""
        adapter = dict(r_init=2, r_target=2, r_max=8)
        training = dict(max_steps=2, learning_rate=1e-9)
        recipe = save_all(tmp_path, adapter=adapter, training=training)
        ranks = uneven(
            get_peft_model(make_model(), drlora.DrLoraConfig(**adapter)), (3, 1, 2, 1, 4, 1)
        )
        path = tmp_path / "ranks.json"
        path.write_text(json.dumps(ranks))
        beginnings = []
        for rule in ("gradient", "random"):
            out = tmp_path / rule
            how = [f"start_ranks={path}", f"adapter.options.start_a={rule}", f"output_dir={out}"]
            assert main(["train", str(recipe), *how]) == 0
            assert json.loads((out / "result.json").read_text())["ranks"] == ranks
            tensors = load_file(out / "adapter_model.safetensors")
            beginnings.append({key: value for key, value in tensors.items() if "lora_A" in key})
        laid, drawn = beginnings
        assert laid.keys() == drawn.keys()
        assert not any(torch.allclose(laid[key], drawn[key], atol=1e-4) for key in laid)
        assert main(["train", str(recipe), f"start_ranks={path}", "adapter.start=routing"]) == 2
        assert "contradict each other" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("overrides", "part"),
        [(["adapter.r_init=1"], "r_init=1 is less than the rank of the LoRA"),
         (["adapter.target_modules=[q_proj]"], "is decided by the LoRA; leave it out"),
         (["model=OTHER"], "Was it made for another model?")],
    )  # fmt: skip
    def test_what_does_not_fit(self, tmp_path, capsys, monkeypatch, overrides, part):
        recipe, _ = self.start(tmp_path, adapter=dict(r_init=2))
        save_model_folder(tmp_path / "other", num_experts=5)
        monkeypatch.delattr("drlora.runs.training.make_trainer")
        named = [word.replace("OTHER", str(tmp_path / "other")) for word in overrides]
        assert main(["train", str(recipe), *named]) == 2
        assert part in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def fresh(**changes):
    return get_peft_model(make_model(), drlora.DrLoraConfig(**{**SETTINGS, **changes}))


def uneven(model, first=(1, 2, 3, 1, 4, 1)):
    """A rank map with `first` in each pool."""
    return {
        block: {projection: list(first) for projection in inner}
        for block, inner in drlora.rank_map(model).items()
    }


class TestStartRanks:
    @pytest.mark.parametrize("as_file", [False, True])
    def test_sets_the_ranks_and_saves_them(self, tmp_path, as_file):
        model = fresh()
        before, ranks = logits(model), uneven(model)
        path = tmp_path / "ranks.json"
        path.write_text(json.dumps(ranks))
        drlora.start_ranks(model, path if as_file else ranks)
        assert drlora.rank_map(model) == ranks
        assert torch.equal(logits(model), before)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_model(), tmp_path)
        assert drlora.rank_map(loaded) == ranks

    def test_a_run_from_there_ends_at_the_budget(self):
        model = fresh()
        drlora.start_ranks(model, uneven(model))
        dynamics = grow(model)
        assert dynamics.budget() == (4 * 24, 4 * 24)
        for block in drlora.rank_map(model).values():
            for ranks in block.values():
                assert all(
                    now >= start for now, start in zip(ranks, (1, 2, 3, 1, 4, 1), strict=True)
                )
                assert max(ranks) <= 8

    def test_a_start_from_which_the_budget_is_out_of_reach_is_refused(self):
        """One event of at most 2 an expert: 12 ranks from the same for all, 8 from two full."""
        settings = dict(r_init=2, r_target=4, r_max=6, p_grow=0.5, grow_every=4)
        model = fresh(**settings)
        drlora.RankDynamics(model, total_steps=4)
        drlora.start_ranks(model, uneven(model, (6, 2, 1, 1, 1, 1)))
        with pytest.raises(ConfigError, match="the budget cannot be reached.*only 10 are certain"):
            drlora.RankDynamics(model, total_steps=4)

    def test_a_trained_adapter_grows_and_keeps_its_function(self):
        model = trained()
        before, ranks = logits(model), drlora.rank_map(model)
        drlora.start_ranks(model, ranks)
        assert torch.equal(logits(model), before) and drlora.rank_map(model) == ranks
        smaller = {b: {p: [max(1, x - 1) for x in r] for p, r in i.items()}
                   for b, i in ranks.items()}  # fmt: skip
        with pytest.raises(ConfigError, match="would lose rank"):
            drlora.start_ranks(model, smaller)

    @pytest.mark.parametrize(
        ("ranks", "error", "match"),
        [
            ((0, 2, 2, 2, 2, 2), ConfigError, "expert 0 is to have rank 0.*1 and r_max=8"),
            ((9, 1, 1, 1, 1, 1), ConfigError, "expert 0 is to have rank 9"),
            ((8, 8, 5, 2, 1, 1), ConfigError, r"add up to 25.*E \* r_target = 24"),
            ((1, 1, 1), CheckpointError, "3 ranks for 6 experts"),
        ],
    )
    def test_the_laws_of_the_budget(self, ranks, error, match):
        model = fresh()
        before = drlora.rank_map(model)
        with pytest.raises(error, match=match):
            drlora.start_ranks(model, uneven(model, ranks))
        assert drlora.rank_map(model) == before

    def test_projections_that_share_a_rank(self):
        for rank_per in ("expert", "projection"):
            model = fresh(options={"rank_per": rank_per})
            ranks = uneven(model)
            ranks["model.layers.1.mlp"]["down"] = [2] * 6
            if rank_per == "projection":
                drlora.start_ranks(model, ranks)
                assert drlora.rank_map(model) == ranks
            else:
                with pytest.raises(ConfigError, match="layers.1.mlp: the projections.*differ"):
                    drlora.start_ranks(model, ranks)

    def test_a_map_of_another_model(self):
        model = fresh()
        ranks = uneven(model)
        ranks["model.layers.7.mlp"] = ranks.pop("model.layers.0.mlp")
        with pytest.raises(CheckpointError, match=r"missing.*layers\.0.*not in.*layers\.7"):
            drlora.start_ranks(model, ranks)

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "{}", '{"a": 3}', '{"a": {"b": 3}}', '{"a": {"b": [1.5]}}',
         '{"a": {"b": [true]}}', '{"a": {"b": ["1"]}}', '{"a": {}}', "[" * 100000, "\x00"],
        ids=range(11),
    )  # fmt: skip
    def test_files_that_are_no_rank_map(self, tmp_path, text):
        (tmp_path / "ranks.json").write_text(text)
        with pytest.raises(CheckpointError, match="rank map"):
            drlora.start_ranks(fresh(), tmp_path / "ranks.json")

    def test_a_file_that_is_not_there_or_too_large(self, tmp_path, monkeypatch):
        with pytest.raises(CheckpointError, match="no rank map"):
            drlora.start_ranks(fresh(), tmp_path / "ranks.json")
        monkeypatch.setattr("drlora.io.files.LARGEST_JSON_BYTES", 3)
        (tmp_path / "ranks.json").write_text("{   }")
        with pytest.raises(CheckpointError, match="5 bytes"):
            drlora.start_ranks(fresh(), tmp_path / "ranks.json")


class TestRanksFromRouting:
    @pytest.mark.parametrize("signal", ["topk_weight", "count", "probability"])
    def test_follow_what_training_counts(self, signal):
        """The shares are f of one step over the same batch: beta = 0 makes f the share."""
        settings = dict(options={"routing_signal": signal}, beta=0.0)
        model = fresh(**settings)
        batch = make_batch(3, rows=4)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][2:, 7:] = 0
        found = drlora.ranks_from_routing(model, [batch], mean_rank=4)
        twin = fresh(**settings)
        dynamics = drlora.RankDynamics(twin, total_steps=8)
        twin.train()(**batch).loss.backward()
        dynamics.before_optimizer_step()
        for name, adapter in dynamics.adapters.items():
            wanted = proportional_ranks(adapter.frequency.tolist(), 24, 8)
            assert found[name] == {"gate_up": wanted, "down": wanted}
            assert len(set(wanted)) > 1

    def test_changes_nothing_and_several_batches_count_together(self):
        model = fresh()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.get_base_model().lm_head.train()
        modes = {module: module.training for module in model.modules()}
        one, two = make_batch(1, rows=2), make_batch(2, rows=2)
        both = {key: torch.cat([one[key], two[key]]) for key in one}
        ranks = drlora.ranks_from_routing(model, [one, two])
        assert ranks == drlora.ranks_from_routing(model, [both])
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert {module: module.training for module in model.modules()} == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        for layer in adapted_layers(model, "default").values():
            assert not layer.adapter("default").meter.num_tokens
        drlora.start_ranks(model, ranks)
        assert drlora.rank_map(model) == ranks
        grow(model)

    @pytest.mark.parametrize(
        ("batches", "mean_rank", "match"),
        [([], None, "no batch"), ([make_batch()], 5, "mean_rank=5.*r_target=4"),
         ([make_batch()], 0, "mean_rank=0"), ([make_batch()], 1.5, "mean_rank=1.5")],
    )  # fmt: skip
    def test_bad_input(self, batches, mean_rank, match):
        with pytest.raises(ConfigError, match=match):
            drlora.ranks_from_routing(fresh(), batches, mean_rank)

    def test_a_model_without_dr_lora(self):
        model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ConfigError, match="no DR-LoRA adapter"):
            drlora.rank_map(model)

    @given(
        st.lists(st.floats(0, 1), min_size=1, max_size=12),
        st.integers(1, 9),
        st.floats(0, 1),
    )
    def test_proportional_ranks(self, share_E, r_max, fullness):
        total = len(share_E) + int(fullness * len(share_E) * (r_max - 1))
        ranks = proportional_ranks(share_E, total, r_max)
        assert sum(ranks) == total and min(ranks) >= 1 and max(ranks) <= r_max
        order = np.argsort(share_E, kind="stable")
        for low, high in zip(order, order[1:], strict=False):
            if share_E[low] < share_E[high]:
                assert ranks[low] <= ranks[high]
        assert ranks == proportional_ranks(share_E, total, r_max)
