"""A merge file by file is the merge of the whole model, to the bit; and so is not what it refuses.

Run: make test ARGS=tests/export/test_by_shard.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stored_checkpoints as files
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_class, make_model
from tiny_adapter import make_settings, train
from tiny_run import make_tokenizer, save_all, save_model_folder
from transformers import AutoModelForCausalLM

from drlora.cli.main import main
from drlora.errors import CheckpointError, ConfigError, DrLoraError
from drlora.export.base_weights import find_base
from drlora.export.by_shard import FromFiles
from drlora.export.shards import bytes_of
from drlora.runs import export_by_shard as by_shard
from drlora.runs.export import export_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
)
BESIDE = {"router": "train", "target_modules": ["q_proj"], "target_rank": 3}


def save(folder: Path, model, dtype=torch.bfloat16, **changes) -> Path:
    """A base and an adapter on it, as files; changes of the adapter."""
    model.to(dtype).save_pretrained(folder / "base", max_shard_size="20KB")
    make_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    adapted = train(get_peft_model(base, make_settings(**changes)))
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def both_ways(adapter: Path, out: Path, **how) -> None:
    """Merged whole and by shard: the same tensors under the same names, the same settings."""
    export_adapter(adapter, "merged", out / "whole", **how)
    found = export_adapter(adapter, "merged", out / "shards", by_shard=True, **how)
    one, two = tensors_in(out / "whole"), tensors_in(out / "shards")
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]), key
    texts = [(out / name / "config.json").read_text() for name in ("whole", "shards")]
    assert texts[0] == texts[1]
    assert (out / "shards" / "tokenizer.json").read_bytes() == (
        out / "whole" / "tokenizer.json"
    ).read_bytes()
    assert found.output == out / "shards" and found.difference is None


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_it_is_the_merge_of_the_whole_model(tmp_path, family, rounding):
    beside = BESIDE if family != "deepseek_v3" else {}
    adapter = save(tmp_path, make_model(family), **beside)
    both_ways(adapter, tmp_path, rounding=rounding, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("class_name", ["GptOssForCausalLM", "GraniteMoeForCausalLM"])
def test_experts_that_lie_together_in_the_checkpoint(tmp_path, class_name):
    both_ways(save(tmp_path, make_class(class_name)), tmp_path)


def test_float32_and_one_file(tmp_path):
    both_ways(save(tmp_path, make_model(), torch.float32), tmp_path)
    assert (tmp_path / "shards" / "model.safetensors").is_file()
    record = json.loads((tmp_path / "shards" / "drlora_export.json").read_text())
    assert record["rounding"] is None and record["logits"] is None
    assert "read again beside base and adapter" in record["checked"]


def test_a_run_in_another_dtype_than_its_checkpoint(tmp_path):
    """`dtype: float32` in a recipe, weights in bfloat16."""
    recipe = save_all(tmp_path, dtype="float32", quantise={})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").bfloat16()
    model.save_pretrained(tmp_path / "model")
    assert main(["train", str(recipe)]) == 0
    both_ways(tmp_path / "run", tmp_path)


def test_experts_packed_in_training(tmp_path, capsys):
    recipe = save_all(tmp_path, quantise={"experts": "nf4", "nested": True})
    save_model_folder(tmp_path / "model", hidden_size=64, intermediate_size=64)
    assert main(["train", str(recipe)]) == 0
    both_ways(tmp_path / "run", tmp_path)
    capsys.readouterr()
    words = ["export", str(tmp_path / "run"), "--format", "merged", "--by-shard", "-o"]
    assert main([*words, str(tmp_path / "again")]) == 0
    assert "nf4-nested experts" in capsys.readouterr().out


def test_a_checkpoint_that_is_quantised_already(tmp_path):
    """FP8 experts, kept packed in memory and made wide one after the other."""
    recipe = save_all(tmp_path)
    save_model_folder(tmp_path / "model", hidden_size=128, intermediate_size=128)
    files.rewrite(tmp_path / "model", files.fp8_blocks, files.FP8_SETTINGS)
    assert main(["train", str(recipe)]) == 0
    both_ways(tmp_path / "run", tmp_path)


def test_what_was_written_is_read_again(tmp_path, monkeypatch):
    """A merge that loses an expert on the way is told, and nothing is left of it."""
    adapter = save(tmp_path, make_model(), torch.float32)
    merge = by_shard.merge_by_shard

    def broken(model, source, rounding, writer):
        add = writer.add

        def without_one(key, tensor):
            if key.endswith("layers.1.mlp.experts.2.down_proj.weight"):
                tensor = source.files.read(key)
            add(key, tensor)

        writer.add = without_one
        return merge(model, source, rounding, writer)

    monkeypatch.setattr(by_shard, "merge_by_shard", broken)
    with pytest.raises(CheckpointError, match=r"not what they must be: .*layers.1.mlp"):
        export_adapter(adapter, "merged", tmp_path / "out", by_shard=True)
    assert not (tmp_path / "out").exists()


def refused_dry_or_not(adapter, said, out, **how):
    how = {"format": "merged", "by_shard": True, **how}
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=said):
            export_adapter(adapter, output=out, dry_run=dry_run, **how)
    assert not out.exists()


def test_what_needs_the_whole_model_is_refused(tmp_path):
    adapter = save(tmp_path, make_model(), torch.float32)
    for how, said in (
        ({"format": "peft"}, "is for the format merged"),
        ({"format": "merged", "data": "a.jsonl"}, "data needs the whole model"),
        ({"format": "merged", "merge_into": "original"}, "merge_into needs the whole model"),
        ({"format": "merged", "max_shard_size": "many"}, "max_shard_size='many' is no size"),
    ):
        refused_dry_or_not(adapter, said, tmp_path / "out", **how)
    head = make_settings(target_modules=["lm_head"], target_rank=2)
    tied = make_model(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "other")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    train(get_peft_model(base, head)).save_pretrained(tmp_path / "tied")
    refused_dry_or_not(tmp_path / "tied", "tied to the embeddings", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "lm_head.weight is tied to model.embed_tokens"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices.*leave --by-shard out"),
    ],
)
def test_what_would_change_the_head_too_or_be_left_out_is_refused(tmp_path, changes, said):
    adapter = save(tmp_path, make_model(tie_word_embeddings=True), torch.float32, **changes)
    refused_dry_or_not(adapter, said, tmp_path / "out")
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match=said):
        export_adapter(adapter, "merged", tmp_path / "out", by_shard=True, dry_run=True)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_transformers_keeps_in_float32(tmp_path, dtype):
    """A router's bias, where a last bit chooses other experts; the file has it in float32."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model = make_model("deepseek_v3").to(torch.bfloat16)
    bias_E = 5 + torch.arange(6) * 1e-3
    model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = torch.nn.Buffer(bias_E)
    model.save_pretrained(tmp_path)
    wanted = None if dtype == "auto" else torch.bfloat16
    source = FromFiles(find_base(str(tmp_path)), wanted, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert torch.equal(source.read(name), bias_E)
    for key in source.names():
        found = source.read(key)
        assert found.dtype == loaded[key].dtype and torch.equal(found, loaded[key]), key


def test_what_is_of_no_part_of_the_model_is_told(tmp_path):
    """Such as layers that predict further tokens."""
    adapter = save(tmp_path, make_model(), torch.float32)
    tensors = tensors_in(tmp_path / "base")
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    more = {"model.mtp.weight": torch.ones(2), **tensors}
    save_file(more, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    found = export_adapter(adapter, "merged", tmp_path / "out", by_shard=True)
    assert any("1 tensor of no part" in note and "model.mtp.weight" in note for note in found.notes)
    assert tensors_in(tmp_path / "out").keys() == tensors.keys()


def test_a_dry_run_reads_no_weights(tmp_path):
    adapter = save(tmp_path, make_model())
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.unlink()
    found = export_adapter(adapter, "merged", tmp_path / "out", by_shard=True, dry_run=True)
    assert found.output is None and not (tmp_path / "out").exists()


def test_a_size_of_files_is_for_merged_weights(tmp_path):
    adapter = save(tmp_path, make_model(), torch.float32)
    for format, size, said in (
        ("merged", "5GX", "is no size"),
        ("peft", "5GB", "is of merged weights, and the format peft has one file"),
    ):
        with pytest.raises(ConfigError, match=said):
            export_adapter(adapter, format, tmp_path / "out", max_shard_size=size, dry_run=True)


def test_a_dry_run_looks_for_the_data_too(tmp_path):
    adapter = save(tmp_path, make_model(), torch.float32)
    for dry_run in (True, False):
        with pytest.raises(DrLoraError, match="nowhere.jsonl"):
            export_adapter(
                adapter, "merged", tmp_path / "out", data="nowhere.jsonl", dry_run=dry_run
            )


def test_units_are_the_same_for_a_merge_of_the_whole_model(tmp_path):
    """transformers has no KiB."""
    adapter = save(tmp_path, make_model(), torch.float32)
    export_adapter(adapter, "merged", tmp_path / "out", max_shard_size="20KiB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_sizes():
    assert [bytes_of(s) for s in ("5GB", "1.5 kb", "2MiB", "7")] == [5 * 10**9, 1500, 2 << 20, 7]
    assert bytes_of(".5MB") == bytes_of("500KB")
    for size in ("many", ".GB", "0GB", "1.5.2GB", "-1GB", "5 G B", 5):
        with pytest.raises(ConfigError, match="write 5GB"):
            bytes_of(size)
