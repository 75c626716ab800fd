"""Recipes with a section `quantise`: trained, resumed, evaluated, talked to, exported."""

from __future__ import annotations

import json

import pytest
import stored_checkpoints as files
import torch
from peft import PeftModel
from run_checks import assert_same_run, interrupt_at, losses
from tiny_run import save_all, save_model_folder
from transformers import AutoModelForCausalLM

import drlora
from drlora.cli.main import main
from drlora.errors import ConfigError
from drlora.export.check import logits_of
from drlora.ops.storage.packed import Packed
from drlora.runs.dry_run import dry_run
from drlora.runs.export import export_adapter
from drlora.runs.inspect import inspect
from drlora.runs.loading import load_adapter, load_base_model
from drlora.runs.quantise import QuantiseSection
from drlora.runs.recipe import load_recipe, recipe_from
from drlora.runs.sources import find_source

WIDE = dict(hidden_size=64, intermediate_size=64)
BATCH = [{k: torch.ones(1, 6, dtype=torch.long) for k in ("input_ids", "attention_mask")}]
NESTED = {"experts": "nf4", "nested": True}


def save(folder, quantise=NESTED, **changes):
    path = save_all(folder, quantise=quantise, **changes)
    save_model_folder(folder / "model", **WIDE)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    drlora.train(load_recipe(save(folder)))
    return folder / "run"


def test_the_base_is_packed_and_ranks_grow(run):
    base = load_base_model(find_source(run))
    kinds = {m.kind.name for m in base.modules() if isinstance(m, Packed)}
    assert kinds == {"nf4-nested"}
    found = losses(run)
    assert found[12] < found[1]
    record = json.loads((run / "adapter_config.json").read_text())["record"]
    assert record["storage"] == "nf4-nested"


def test_a_resumed_run_packs_again_and_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    path = save(tmp_path)
    interrupt_at(8, monkeypatch)
    assert main(["train", str(path)]) == 130
    monkeypatch.undo()
    assert main(["train", str(path), "--resume"]) == 0
    assert_same_run(run, tmp_path / "run")


def test_another_storage_is_another_run(run):
    other = ["quantise.experts=int8", "quantise.nested=false", "training.max_steps=14"]
    recipe = load_recipe(run / "config.yaml", other)
    with pytest.raises(ConfigError, match=r"quantise.experts was 'nf4', now 'int8'"):
        drlora.train(recipe, resume=True)


def test_eval_and_generate_use_what_was_trained_on(run, recwarn):
    found = drlora.evaluate(run)
    wanted = json.loads((run / "result.json").read_text())
    assert found.loss.loss == pytest.approx(wanted["after"]["loss"]["loss"], abs=1e-6)
    assert drlora.generate(run, ["abc:"])
    assert not [w for w in recwarn if "stored as" in str(w.message)]


@pytest.mark.parametrize("format", ["peft", "per-expert"])
def test_exports_of_lora_are_those_of_a_plain_base(run, tmp_path, format):
    result = export_adapter(run, format, tmp_path / "out")
    assert result.difference.is_rounding
    if format == "peft":
        again, other = (
            AutoModelForCausalLM.from_pretrained(run.parent / "model") for _ in range(2)
        )
        loaded = PeftModel.from_pretrained(again, tmp_path / "out")
        with pytest.warns(UserWarning, match="trained on experts stored as nf4-nested"):
            own = load_adapter(other, str(run))
        for got, wanted in zip(logits_of(loaded, BATCH), logits_of(own, BATCH), strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("into", ["trained", "original"])
def test_merged_into_what_was_trained_or_into_the_original(run, tmp_path, into, capsys):
    argv = ["export", str(run), "--format", "merged", "-o", str(tmp_path / "out")]
    assert main([*argv, "--merge-into", into]) == 0
    said = capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    source = find_source(run)
    own = load_adapter(load_base_model(source), str(run))
    got, wanted = logits_of(merged, BATCH)[0], logits_of(own, BATCH)[0]
    off = float((got - wanted).norm() / wanted.norm())
    record = json.loads((tmp_path / "out" / "drlora_export.json").read_text())
    if into == "trained":
        assert off < 1e-4 and "merged into the numbers that the base stood for" in said
    else:
        assert 1e-3 < off < 0.5 and "merged into the original base" in said
    assert record["merged_into"].startswith("merged into")


def test_what_is_for_a_quantised_base_is_refused_elsewhere(run, tmp_path):
    with pytest.raises(ConfigError, match="merge_into='original' is for the format merged"):
        export_adapter(run, "peft", tmp_path / "out", merge_into="original")
    with pytest.raises(ConfigError, match="merge_into='theirs' is not known"):
        export_adapter(run, "merged", tmp_path / "out", merge_into="theirs")


@pytest.mark.parametrize(
    ("quantise", "message"),
    [
        ({"experts": "nf5"}, "storage 'nf5' is not known; choose one of"),
        ({"expert": "nf4"}, "quantise.expert is not a setting; did you mean quantise.experts"),
        ({"nested": True}, "quantise.nested=True has no effect without quantise.experts"),
        ({"experts": "int8", "nested": True}, "nested=True has no effect on 'int8'"),
        ({"experts": "nf4", "rest": "int4"}, "rest='int4' is not known"),
        ({"experts": "nf4", "shared": True}, "shared=True has no effect without rest"),
        ({"experts": 4}, "quantise.experts=4"),
    ],
)
def test_what_cannot_be_meant_is_refused(quantise, message):
    with pytest.raises(ConfigError, match=message):
        recipe_from({"model": "m", "output_dir": "o", "data": {"train": "t"}, "quantise": quantise})


def test_rows_that_do_not_fit_are_refused_before_data_is_read(tmp_path):
    path = save_all(tmp_path, quantise={"experts": "nf4"})
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match="cannot be packed as nf4: .* no multiple of 64"):
        dry_run(load_recipe(path))


def test_inspect_counts_what_is_packed():
    plain = inspect("embedded", dtype="bfloat16")
    found = inspect("embedded", dtype="bfloat16", quantise=QuantiseSection("nf4"))
    saved = plain.parameters.experts * (2 - 4.5 / 8) / 1e9
    assert found.memory_gb.weights == pytest.approx(plain.memory_gb.weights - saved)
    assert found.memory_gb.quantised == "nf4 experts"
    both = inspect("embedded", dtype="bfloat16", quantise=QuantiseSection("nf4", rest="nf4"))
    attention = 4 * 4 * 128 * 128 * (2 - 4.5 / 8) / 1e9
    assert both.memory_gb.weights == pytest.approx(found.memory_gb.weights - attention)


def test_the_command_shows_it(capsys):
    assert main(["inspect", "embedded", "--quantise", "nf4", "quantise.rest=nf4"]) == 0
    assert "(nf4 experts, nf4 rest, the others bfloat16)" in capsys.readouterr().out


def test_the_rest_by_bitsandbytes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    path = save(tmp_path, {"experts": "nf4", "nested": True, "rest": "nf4"})
    drlora.train(load_recipe(path))
    base = load_base_model(find_source(tmp_path / "run"))
    kinds = {n.rpartition(".")[2] for n, m in base.named_modules()
             if isinstance(m, bnb.nn.Linear4bit)}  # fmt: skip
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}
    result = export_adapter(tmp_path / "run", "merged", tmp_path / "out")
    assert result.difference.is_rounding


def test_the_rest_without_bitsandbytes_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr("drlora.moe.rest.find_spec", lambda _: None)
    path = save(tmp_path, {"experts": "nf4", "rest": "nf4"})
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is not installed"):
        dry_run(load_recipe(path))


# Checkpoints that are quantised already.


def save_quantised(folder, quantise=None, settings=files.FP8_SETTINGS):
    path = save_all(folder, **({"quantise": quantise} if quantise else {}))
    save_model_folder(folder / "model", **WIDE)
    files.rewrite(folder / "model", files.fp8_blocks, settings)
    return path


def test_a_quantised_checkpoint_is_trained_as_it_is(tmp_path):
    drlora.train(load_recipe(save_quantised(tmp_path)))
    base = load_base_model(find_source(tmp_path / "run"))
    assert {m.kind.name for m in base.modules() if isinstance(m, Packed)} == {"fp8"}
    record = json.loads((tmp_path / "run/adapter_config.json").read_text())["record"]
    assert record["storage"] == "fp8" and len(record["fingerprint"]) == 64
    assert drlora.generate(tmp_path / "run", ["abc:"])


def test_a_quantised_checkpoint_is_packed_again_where_the_recipe_says_so(tmp_path):
    with pytest.warns(UserWarning, match="rounded twice: .* in fp8, .* as nf4"):
        base = load_base_model(load_recipe(save_quantised(tmp_path, {"experts": "nf4"})))
    assert {m.kind.name for m in base.modules() if isinstance(m, Packed)} == {"nf4"}
    recipe = load_recipe(save_quantised(tmp_path / "own", {"experts": "fp8"}))
    assert "fp8" in str(load_base_model(recipe))


def test_a_checkpoint_of_another_method_is_refused_before_it_is_read(tmp_path):
    path = save_quantised(tmp_path, settings={"quant_method": "gptq", "bits": 4})
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ConfigError, match="quantised with GPTQ .*QuantisedExperts"):
        drlora.train(load_recipe(path))


def with_quantisation(folder, settings):
    """The config of a checkpoint that is quantised already."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


def test_inspect_counts_a_checkpoint_as_it_is(tmp_path):
    save_model_folder(tmp_path / "model", **WIDE)
    plain = inspect(str(tmp_path / "model"), dtype="bfloat16")
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with_quantisation(tmp_path / "model", settings)
    found = inspect(str(tmp_path / "model"), dtype="bfloat16")
    assert found.memory_gb.quantised == "fp8 experts"
    assert found.memory_gb.weights == pytest.approx(
        plain.memory_gb.weights - plain.parameters.experts / 1e9
    )


def test_a_checkpoint_that_cannot_be_kept_is_refused_before_data_is_read(tmp_path):
    path = save(tmp_path, {})
    with_quantisation(tmp_path / "model", {"quant_method": "gptq", "bits": 4})
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match="GPTQ|gptq"):
        dry_run(load_recipe(path))
