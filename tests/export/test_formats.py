"""A format of an export is one file: this one has one of its own, which goes all the way.

Run: make test ARGS=tests/export/test_formats.py
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_batch
from tiny_adapter import trained
from tiny_run import save_all

from drlora.cli.main import main
from drlora.errors import CheckpointError, ConfigError
from drlora.export import formats, peft_lora
from drlora.export.format import LoraFormat
from drlora.export.formats import FORMATS, register_format
from drlora.export.plan import apply_plan, make_plan
from drlora.io.run_files import EXPORT_RECORD, README
from drlora.runs.export import export_adapter

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
OWN = ["gguf", "merged", "mlx", "peft", "per-expert", "sglang"]


class Deltas(LoraFormat):
    """What is added to each stacked parameter of the experts, whole: (E, O, I) float32."""

    name = "deltas"
    summary = "What a DR-LoRA adapter of rank {rank} adds to each weight of the experts."
    files = ("deltas.safetensors", EXPORT_RECORD, README)

    def size_bytes(self, base, updates):
        if updates.linears or updates.modules:
            raise ConfigError("the format deltas is of experts alone; use another one.")
        return sum(4 * len(f.a) * f.in_features * f.out_features for f in updates.experts.values())

    def attach(self, base, updates):
        return peft_lora.attach(base, updates)

    def write(self, made, updates, folder, tokenizer, max_shard_size):
        deltas = {}
        for name, factors in updates.experts.items():
            pairs = zip(factors.a, factors.b, strict=True)
            deltas[name] = torch.stack([b_Or @ a_rI for a_rI, b_Or in pairs])
        save_file(deltas, folder / "deltas.safetensors")


@pytest.fixture
def deltas(monkeypatch):
    """The format, for the time of a test."""
    monkeypatch.setattr(FORMATS, "_added", {})
    register_format(Deltas())
    return Deltas


def test_plan_and_apply(tmp_path, deltas):
    model = trained("olmoe")
    plan = make_plan(model, "deltas")
    assert plan.files == deltas.files and plan.rank == plan.owned[2]
    made = apply_plan(plan, model, BATCHES, tmp_path / "out")
    assert made.difference.is_rounding and made.difference.effect > 0.01
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(deltas.files)
    written = load_file(tmp_path / "out" / "deltas.safetensors")
    assert sum(x.numel() * x.element_size() for x in written.values()) == plan.weight_bytes
    module = made.result.get_base_model().get_submodule("model.layers.0.mlp.experts")
    while hasattr(module, "base_layer"):
        delta_EOI = module.get_delta_weight("default").detach()
        name = f"model.layers.0.mlp.experts.{module.parameter_name}"
        torch.testing.assert_close(written[name], delta_EOI, rtol=1e-5, atol=1e-7)
        module = module.base_layer
    said = (tmp_path / "out" / README).read_text()
    assert said.startswith("# drlora export: deltas")
    assert f"of rank {plan.rank} adds to each weight" in said


def test_what_it_refuses_is_refused(deltas):
    model = trained("olmoe", target_modules=["q_proj"], target_rank=2)
    with pytest.raises(ConfigError, match="of experts alone"):
        make_plan(model, "deltas")


def test_a_defect_of_it_is_found(tmp_path, deltas, monkeypatch):
    """What is compared is not the format's business."""

    def attach(self, base, updates):
        experts = dict(updates.experts)
        name, factors = next(iter(experts.items()))
        experts[name] = dataclasses.replace(factors, b=tuple(2 * b_Or for b_Or in factors.b))
        return peft_lora.attach(base, dataclasses.replace(updates, experts=experts))

    monkeypatch.setattr(deltas, "attach", attach)
    model = trained("olmoe")
    with pytest.raises(CheckpointError, match="the export as deltas does not do"):
        apply_plan(make_plan(model, "deltas"), model, BATCHES, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_line_and_python_know_it(tmp_path, deltas, capsys):
    save_all(tmp_path)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    result = export_adapter(tmp_path / "run", "deltas", tmp_path / "one", "auto")
    assert result.difference.is_rounding
    words = ["export", str(tmp_path / "run"), "--format", "deltas", "-o"]
    assert main([*words, str(tmp_path / "two"), "--rank", "auto"]) == 0
    assert "format   deltas" in capsys.readouterr().out
    record = json.loads((tmp_path / "two" / EXPORT_RECORD).read_text())
    assert record["format"] == "deltas" and record["files"] == list(deltas.files)
    one, two = (load_file(tmp_path / name / "deltas.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_names(deltas, tmp_path, monkeypatch):
    """A file in the folder of formats is one; a name is there once, and an unknown one is refused.

    Of what comes with drlora each file gives the format of its name, with all that is asked of it.
    """
    assert list(FORMATS) == [*OWN, "deltas"] and len(FORMATS) == len(OWN) + 1
    for name in FORMATS:
        format = FORMATS[name]
        assert format.name == name
        assert format.files[-2:] == (EXPORT_RECORD, README) and format.summary.endswith(".")
    for format in (Deltas(), type("Peft", (Deltas,), {"name": "peft"})()):
        with pytest.raises(ConfigError, match="is there already"):
            register_format(format)
    with pytest.raises(ConfigError, match=r"format='pfet' is not known; choose one of .*deltas"):
        FORMATS["pfet"]
    (tmp_path / "of_mine.py").write_text("from test_formats import Deltas\nFORMAT = Deltas()\n")
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    monkeypatch.setattr(formats, "FORMATS", found := formats._Formats())
    assert list(found) == [*OWN, "of-mine"]
    assert found["of-mine"].name == "deltas"
