"""Law 7 for exports: each loads in its target, without drlora, and gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from new_process import run_python
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_class, make_model
from tiny_adapter import logits, trained
from tiny_run import save_all
from transformers import AutoModelForCausalLM, AutoTokenizer

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.cli.main import main
from drlora.errors import CheckpointError, ConfigError
from drlora.export.factors import expert_factors, refactor
from drlora.export.formats import FORMATS
from drlora.export.plan import apply_plan, make_plan

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
SEPARATE = {"projections": ["gate", "up", "down"]}
PAPER = {"projections": ["up", "down"], "router": "train"}
ATTENTION = {"target_modules": ["q_proj", "o_proj"], "target_rank": 3}


def export(model, folder, format, rank="padded"):
    return apply_plan(make_plan(model, format, rank), model, BATCHES, folder).difference


def close(model, wanted):
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {}),
        ("olmoe", SEPARATE),
        ("olmoe", PAPER),
        ("olmoe", ATTENTION),
        ("olmoe", {"projections": ["down"]}),
        ("olmoe", {"experts": ["model.layers.1.mlp.experts"], "use_rslora": True}),
        ("qwen2_moe", {"target_modules": ["shared_expert.up_proj"]}),
        ("qwen2_moe", {"modules_to_save": ["lm_head"]}),
        ("qwen3_moe", {}),
        ("mixtral", PAPER),
        ("phimoe", {}),
        ("deepseek_v3", {}),
        ("granitemoe", {}),
    ],
)  # fmt: skip
def test_peft(tmp_path, family, changes):
    model = trained(family, **changes)
    wanted = logits(model)
    assert (wanted - logits(make_model(family))).abs().max() > 0.05
    export(model, tmp_path / "out", "peft")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("drlora" in key for key in keys)
    close(PeftModel.from_pretrained(make_model(family), tmp_path / "out"), wanted)


def randomised(base, **changes):
    """An adapter on `base` whose rows are random, as if trained; the same each time."""
    torch.manual_seed(1)
    config = drlora.DrLoraConfig(r_init=2, r_target=4, r_max=8, p_grow=0.5, **changes)
    model = get_peft_model(base, config)
    for layer in adapted_layers(model, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            pool.lora_B.data[pool.owner >= 0] = 0.2 * torch.randn(pool.lora_B.shape[1])
    return model.eval()


def uncached(model):
    """Logits without a cache, which not every class can make for a model this small."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("class_name", "changes"),
    [
        ("GptOssForCausalLM", {}),  # transposed, gate and up interleaved
        ("GptOssForCausalLM", SEPARATE),
        ("Llama4ForCausalLM", {}),  # transposed, without a flag that says so
        ("NemotronHForCausalLM", PAPER | {"router": "frozen"}),  # no gate
        ("AriaTextForCausalLM", {}),
        ("Step3p7ForConditionalGeneration", {}),
    ],
)
def test_other_layouts(tmp_path, class_name, changes):
    """PEFT, merged, back from PEFT; and per expert is refused, since no checkpoint has it."""
    wanted = uncached(randomised(make_class(class_name), **changes))
    assert (wanted - uncached(make_class(class_name))).abs().max() > 0.05
    for format in ("peft", "merged"):
        export(randomised(make_class(class_name), **changes), tmp_path / format, format)
    again = drlora.DrLoraConfig(r_init=6, r_target=6, r_max=8, p_grow=0.5)
    loaded = {
        "peft": PeftModel.from_pretrained(make_class(class_name), tmp_path / "peft"),
        "merged": type(make_class(class_name)).from_pretrained(tmp_path / "merged"),
        "import": drlora.load_peft_lora(make_class(class_name), tmp_path / "peft", again),
    }
    for model in loaded.values():
        torch.testing.assert_close(uncached(model), wanted, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="no per-expert layout|without a gate"):
        make_plan(randomised(make_class(class_name), **changes), "per-expert")


def test_peft_layout(tmp_path):
    """Row e * r + k of A and column k * E + e of B; gate_up under base_layer."""
    model = trained()
    adapter = next(iter(adapted_layers(model, "default").values())).adapter("default")
    factors = {matrix: expert_factors(adapter, matrix) for matrix in ("gate_up", "down")}
    export(model, tmp_path / "out", "peft")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.experts."
    rank = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"]
    for matrix, name in (("gate_up", "base_layer."), ("down", "")):
        a, b = (keys[f"{prefix}{name}lora_{x}.weight"] for x in "AB")
        for expert, (a_rI, b_Or) in enumerate(zip(*vars(factors[matrix]).values(), strict=True)):
            for k in range(rank):
                is_padding = k >= len(a_rI)
                row, column = a[expert * rank + k], b[:, k * 6 + expert]
                assert torch.equal(row, torch.zeros_like(row) if is_padding else a_rI[k])
                assert torch.equal(column, torch.zeros_like(column) if is_padding else b_Or[:, k])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {}),
        ("olmoe", SEPARATE),
        ("olmoe", {**PAPER, **ATTENTION}),
        ("olmoe", {"projections": ["up"]}),
        ("olmoe", {"projections": ["down"]}),
        ("qwen3_moe", {}),
        ("mixtral", {}),
        ("glm4_moe", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_per_expert_goes_through_pefts_converter(tmp_path, family, changes):
    model = trained(family, **changes)
    wanted = logits(model)
    export(model, tmp_path / "out", "per-expert")
    close(PeftModel.from_pretrained(make_model(family), tmp_path / "out"), wanted)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_per_expert_files(tmp_path):
    """Every projection of every expert, at one rank; also with more experts than one digit."""
    model = trained(base=make_model(num_experts=12))
    wanted = logits(model)
    export(model, tmp_path / "out", "per-expert")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["rank_pattern"] == {}
    assert set(config["target_modules"]) == {"gate_proj", "up_proj", "down_proj"}
    shapes = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
    wanted_shapes = {}
    for layer in range(2):
        for expert in range(12):
            for name, (outs, ins) in shapes.items():
                prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}."
                wanted_shapes[prefix + "lora_A.weight"] = (config["r"], ins)
                wanted_shapes[prefix + "lora_B.weight"] = (outs, config["r"])
    assert {key: tuple(x.shape) for key, x in keys.items()} == wanted_shapes
    close(PeftModel.from_pretrained(make_model(num_experts=12), tmp_path / "out"), wanted)


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe"])
def test_per_expert_for_engines_where_peft_does_not_load_it(tmp_path, family):
    """PEFT converts the tensors of these too, but not the configuration; the plan says so."""
    model = trained(family)
    plan = make_plan(model, "per-expert")
    assert any("PEFT does not load" in note for note in plan.notes)
    assert apply_plan(plan, model, BATCHES, tmp_path / "out").difference.largest < 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [("olmoe", PAPER), ("olmoe", ATTENTION), ("mixtral", {}), ("granitemoe", {})],
)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_in_several_files(tmp_path, family, changes, tied):
    base = make_model(family, tie_word_embeddings=tied)
    own, base_bytes = set(base.state_dict()), sum(4 * p.numel() for p in base.parameters())
    model = trained(base=base, **changes)
    wanted, plan = logits(model), make_plan(model, "merged")
    assert plan.weight_bytes == base_bytes  # tied weights once
    apply_plan(plan, model, BATCHES, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()) and set(loaded.state_dict()) == own
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    close(loaded, wanted)


def test_16_bit_models(tmp_path):
    for format in ("peft", "merged"):
        model = trained(base=make_model().to(torch.bfloat16))
        assert export(model, tmp_path / format, format).dtype == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16


class TestRankAuto:
    def test_keeps_the_product_at_its_rank(self):
        torch.manual_seed(1)
        a_rI, b_Or = torch.randn(9, 20), torch.randn(30, 9)
        a_rI[5] = a_rI[0] - 2 * a_rI[1]
        b_Or[:, 7] = 0
        small_a, small_b = refactor(a_rI, b_Or)
        assert small_a.shape == (7, 20) and small_b.shape == (30, 7)
        torch.testing.assert_close(small_b @ small_a, b_Or @ a_rI, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rank", [0, 1, 4])
    def test_leaves_full_rank_alone(self, rank):
        a_rI, b_Or = torch.randn(rank, 20), torch.randn(30, rank)
        assert refactor(a_rI, b_Or)[0] is a_rI

    def test_no_rank_is_left_of_nothing(self):
        assert refactor(torch.randn(4, 20), torch.zeros(30, 4))[0].shape == (0, 20)

    @pytest.mark.parametrize("format", ["peft", "per-expert"])
    @pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
    def test_shrinks_what_is_written(self, tmp_path, format):
        model = trained()
        for layer in adapted_layers(model, "default").values():
            for pool in layer.adapter("default").rank_pools.values():
                for rows in (pool.owner == e for e in range(6)):
                    pool.lora_A.data[rows] = pool.lora_A.data[rows][:1]  # rank 1 in many rows
        wanted = logits(model)
        padded, auto = (make_plan(model, format, rank) for rank in ("padded", "auto"))
        assert padded.rank > 3 and auto.rank == 1
        assert auto.weight_bytes * padded.rank == padded.weight_bytes
        apply_plan(auto, model, BATCHES, tmp_path / "out")
        close(PeftModel.from_pretrained(make_model(), tmp_path / "out"), wanted)


class TestRefusals:
    def test_a_checkpoint_that_does_not_keep_experts_apart(self):
        with pytest.raises(ConfigError, match="GraniteMoe.*no per-expert layout.*peft or merged"):
            make_plan(trained("granitemoe"), "per-expert")

    @pytest.mark.parametrize("class_name", ["DbrxForCausalLM", "LongcatFlashForCausalLM"])
    def test_experts_that_are_not_in_one_parameter_a_matrix(self, class_name):
        """PEFT has nothing to put a LoRA on; merged is what such a model can have."""
        model = randomised(make_class(class_name))
        for format in ("peft", "per-expert"):
            with pytest.raises(ConfigError, match=r"\(E, \., \.\).*use the format merged"):
                make_plan(model, format)
        assert make_plan(model, "merged").format == "merged"

    @pytest.mark.parametrize(
        ("format", "rank", "match"),
        [("ggml", "padded", "format='ggml'"), ("peft", "3", "rank='3'"),
         ("merged", "auto", "leave it out")],
    )  # fmt: skip
    def test_unknown_choices(self, format, rank, match):
        with pytest.raises(ConfigError, match=match):
            make_plan(trained(), format, rank)

    def test_weights_that_are_not_finite(self):
        model = trained()
        layer = next(iter(adapted_layers(model, "default").values()))
        layer.adapter("default").rank_pools["down"].lora_B.data[0] = float("nan")
        with pytest.raises(CheckpointError, match=r"NaN or infinite.*layers\.0\.mlp.*down\.lora_B"):
            make_plan(model, "merged")

    @pytest.mark.parametrize("format", ["peft", "per-expert", "merged"])
    def test_nothing_is_written_where_logits_differ(self, tmp_path, format, monkeypatch):
        model = trained()
        plan = make_plan(model, format)
        other = torch.randn(2 * 12, 31)
        monkeypatch.setattr(
            "drlora.export.make.logits_of", lambda m, *_: [other * (m is not model)]
        )
        with pytest.raises(CheckpointError, match="its logits are off by"):
            apply_plan(plan, model, BATCHES, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_crash_while_writing_leaves_nothing(self, tmp_path, monkeypatch):
        def crash(*_):
            raise OSError("disk full")

        monkeypatch.setattr("drlora.export.plan.readme", crash)
        with pytest.raises(OSError, match="disk full"):
            export(trained(), tmp_path / "out", "peft")
        assert not list(tmp_path.iterdir())
        (tmp_path / "empty").mkdir()
        with pytest.raises(OSError, match="disk full"):
            export(trained(), tmp_path / "empty", "peft")
        assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("named", [".", "link", "empty", "link/new"])
def test_an_empty_folder_stays_where_it_is(tmp_path, monkeypatch, named):
    """The working directory, and what a link leads to: no other can take their place."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty" if named == "." else tmp_path)
    export(trained(), Path(named), "peft")
    out = tmp_path / "empty" / ("new" if named == "link/new" else "")
    assert {path.name for path in out.iterdir()} == set(FORMATS["peft"].files)
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with a trained router and LoRA on attention."""
    folder = tmp_path_factory.mktemp("run")
    recipe = save_all(folder, adapter=dict(router="train", target_modules=["q_proj"]))
    assert main(["train", str(recipe)]) == 0
    return folder / "run"


# Loads an export in a process that refuses to import drlora, and saves the logits.
LOAD_ALONE = """
import sys
class NoDrlora:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "drlora":
            raise ImportError("drlora is not installed here")
sys.meta_path.insert(0, NoDrlora())
try:
    import drlora
except ImportError:
    pass
else:
    raise SystemExit("drlora could be imported")
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base, ids, *folders = sys.argv[1:]
for folder in folders:
    is_model = folder.endswith("merged")
    model = AutoModelForCausalLM.from_pretrained(folder if is_model else base)
    if not is_model:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        save_file({"logits": model.eval()(load_file(ids)["ids"]).logits}, folder + ".logits")
assert "drlora" not in sys.modules
"""


def test_a_run_is_exported_and_loads_where_drlora_is_not(run, tmp_path, capsys):
    base, folders = (
        run.parent / "model",
        [tmp_path / format for format in FORMATS if format not in ("mlx", "gguf", "sglang")],
    )
    for out in folders:
        check_export_of_run(run, out, capsys)
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
    save_file({"ids": IDS % 31}, tmp_path / "ids")
    arguments = map(str, [base, tmp_path / "ids", *folders])
    script = tmp_path / "load_alone.py"
    script.write_text(LOAD_ALONE)
    run_python([str(script), *arguments], tmp_path / "printed")
    with torch.no_grad():
        wanted_logits = wanted.eval()(IDS % 31).logits
    for out in folders:
        alone = load_file(f"{out}.logits")["logits"]
        torch.testing.assert_close(alone, wanted_logits, rtol=0, atol=1e-5)


def evaluated(capsys, folder, *more):
    """Loss, perplexity and correct answers as `drlora eval` prints them."""
    assert main(["eval", str(folder), "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    return [found["loss"]["loss"], found["loss"]["perplexity"], found["match"]["correct"]]


def check_export_of_run(run, out, capsys):
    """Export to `out`, whose name is the format; the dry run says the same and writes nothing."""
    command = ["export", str(run), "--format", out.name, "-o", str(out)]
    assert main([*command, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "dry run: nothing was written" in planned and not out.exists()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert planned.splitlines()[:4] == printed.splitlines()[:4]

    record = json.loads((out / "drlora_export.json").read_text())
    assert record["format"] == out.name and record["adapter"] == str(run)
    assert record["logits"]["largest"] < 1e-5 and record["logits"]["tokens"] > 20
    assert record["compared_on"] == f"{run.parent / 'eval.jsonl'}, split train"
    assert record["base_model"] == str(run.parent / "model")
    assert str(run.parent) not in (out / "README.md").read_text()  # it goes where the export goes
    # Measured like the run itself, on its data.
    assert evaluated(capsys, out) == pytest.approx(evaluated(capsys, run), rel=1e-5)
    weights = [f for f in out.iterdir() if f.suffix == ".safetensors"]
    tensors = [x for f in weights for x in load_file(f).values()]
    assert sum(x.numel() * x.element_size() for x in tensors) == record["weight_bytes"]


def test_evaluation_of_what_comes_from_no_run(run, tmp_path, capsys):
    """Base model, checkpoint and a moved export: --data says on what, --model what was moved."""
    data = ["--data", str(run.parent / "eval.jsonl")]
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][0]
    assert evaluated(capsys, run.parent / "model", *data)[0] == pytest.approx(
        before["loss"]["loss"]
    )
    wanted = evaluated(capsys, run)
    last = run / "checkpoints" / "checkpoint-12"
    model = ["--model", str(run.parent / "model")]
    assert evaluated(capsys, last, *data, *model) == pytest.approx(wanted)
    assert main(["eval", str(last)]) == 2
    assert "of no run whose data could be used; name some with --data" in capsys.readouterr().err
    assert main(["export", str(run.parent / "model"), "--format", "peft", "-o", "x"]) == 2
    assert "holds a whole model; only DR-LoRA adapters" in capsys.readouterr().err
    out = str(tmp_path / "out")
    assert main(["export", str(last), "--format", "peft", "-o", out, *data, *model]) == 0
    record = json.loads((tmp_path / "out" / "drlora_export.json").read_text())
    assert record["compared_on"].startswith(data[1])


def test_a_merged_model_has_its_tokenizer_and_generation_config(run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(run), "--format", "merged", "-o", str(out)]) == 0
    assert AutoTokenizer.from_pretrained(out).encode("ab") == [3, 4]
    assert (out / "generation_config.json").is_file()


def test_an_adapter_without_a_run(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    trained(base=AutoModelForCausalLM.from_pretrained(tmp_path / "model")).save_pretrained(
        tmp_path / "adapter"
    )
    command = ["export", str(tmp_path / "adapter"), "--format", "peft", "-o"]
    assert main([*command, str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "drlora_export.json").read_text())
    assert record["compared_on"] == "random tokens"
    assert record["base_model"] == str(tmp_path / "model")
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "other")
    for more in ([], ["--dry-run"]):
        capsys.readouterr()
        other = ["--model", str(tmp_path / "other"), *more]
        assert main([*command, str(tmp_path / "new"), *other]) == 2
        assert "Was the adapter made for another model?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("full folder", ["is not an empty folder"]),
        ("a file", ["is not an empty folder"]),
        ("no adapter", ["neither a run directory nor a saved adapter"]),
        ("unfinished", ["the run is not finished", "--resume"]),
        ("another type", ["of type 'LORA'", "only DR-LoRA"]),
        ("truncated", ["is no whole safetensors file"]),
        ("no json", ["adapter_config.json is not valid JSON"]),
        ("bad data", ["missing.jsonl"]),
    ],
)
def test_bad_input(run, tmp_path, capsys, change, parts):
    folder, out = tmp_path / "adapter", tmp_path / "out"
    trained().save_pretrained(folder)
    command = ["export", str(folder), "--format", "peft", "-o", str(out)]
    command += ["--model", str(run.parent / "model")]
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    if change == "full folder":
        out.mkdir()
        (out / "x").write_text("")
    elif change == "a file":
        out.write_text("")
    elif change == "no adapter":
        weights.unlink()
    elif change == "unfinished":
        (folder / "config.yaml").write_text((run / "config.yaml").read_text())
        weights.unlink()
    elif change == "another type":
        config.write_text(config.read_text().replace("DRLORA", "LORA"))
    elif change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "no json":
        config.write_text("{")
    elif change == "bad data":
        command += ["--data", str(tmp_path / "missing.jsonl")]
    modes = [[]] if change == "bad data" else [[], ["--dry-run"]]
    for mode in modes:
        assert main([*command, *mode]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "Traceback" not in message
        assert all(part in message for part in parts), message
