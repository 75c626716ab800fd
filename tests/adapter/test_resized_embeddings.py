"""Tokens added, embeddings resized: the saved adapter always loads, wherever it is loaded."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import plain_loop, trainable
from tiny_run import make_tokenizer, save_model_folder
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import drlora
from drlora.adapter.state import adapter_state
from drlora.errors import CheckpointError
from drlora.runs.export import export_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    # Of a head with LoRA PEFT saves the base's rows, but not those of the input embedding.
    pytest.mark.filterwarnings(r"ignore:.*has none of \['model.embed_tokens'\]"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
ADDED = ["<think>", "</think>", "<call>"]
TOKENS = 31
IDS = torch.tensor([[1, 5, 9, 31, 32, 7], [33, 4, 31, 20, 6, 33]])
BOTH = ["embed_tokens", "lm_head"]


def tokenizer():
    found = make_tokenizer()
    found.add_special_tokens({"additional_special_tokens": ADDED})
    return found


def batch(step: int = 0):
    return {"input_ids": IDS, "labels": IDS}


def resized(folder, seed=77, rows=TOKENS + 3, dtype=None):
    """The base model, resized once more: its new rows are others each time."""
    base = AutoModelForCausalLM.from_pretrained(folder, **({"dtype": dtype} if dtype else {}))
    torch.manual_seed(seed)
    base.resize_token_embeddings(rows)
    return base


def trained(folder, rows=TOKENS + 3, **settings):
    """A trained adapter on the resized model."""
    config = drlora.DrLoraConfig(r_init=2, r_target=4, r_max=8, p_grow=0.5, **settings)
    model = get_peft_model(resized(folder, 0, rows), config)
    dynamics = drlora.RankDynamics(model, total_steps=600)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    plain_loop(model, dynamics, optimizer, range(4), batch)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def close(model, wanted):
    torch.testing.assert_close(logits(model)[..., : wanted.shape[-1]], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": BOTH},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head", "q_proj"], "target_rank": 2},
    ],
    ids=["nothing", "both", "input", "head", "LoRA on the head"],
)
def test_a_saved_adapter_loads_and_exports(tmp_path, tied, settings):
    base, folder = save_model_folder(tmp_path / "base", vocab_size=TOKENS), tmp_path / "adapter"
    if tied:
        save_model_folder(base, vocab_size=TOKENS, tie_word_embeddings=True)
    model = trained(base, **settings)
    wanted = logits(model)
    everything = {"save_embedding_layers": True} if "target_modules" not in settings else {}
    model.save_pretrained(folder, **everything)
    tokenizer().save_pretrained(folder)
    close(PeftModel.from_pretrained(resized(base), folder), wanted)
    close(PeftModel.from_pretrained(resized(base), folder, low_cpu_mem_usage=True), wanted)
    close(AutoPeftModelForCausalLM.from_pretrained(folder), wanted)
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(34\) before"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    for format in ("peft", "per-expert", "merged"):
        planned = export_adapter(folder, format, tmp_path / "none", dry_run=True).plan
        out = tmp_path / format
        export_adapter(folder, format, out)
        kind = AutoModelForCausalLM if format == "merged" else AutoPeftModelForCausalLM
        close(kind.from_pretrained(out), wanted)
        written = [x for path in out.glob("*.safetensors") for x in load_file(path).values()]
        if "target_modules" not in settings:
            assert sum(x.numel() * x.element_size() for x in written) == planned.weight_bytes


def test_rows_beyond_the_tokens(tmp_path):
    """Embeddings padded to a multiple: the file says how many rows there are."""
    base = save_model_folder(tmp_path / "base", vocab_size=TOKENS)
    model = trained(base, rows=40, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    close(PeftModel.from_pretrained(resized(base, rows=40), tmp_path / "adapter"), logits(model))
    export_adapter(tmp_path / "adapter", "merged", tmp_path / "merged")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), logits(model))


def test_tied_embeddings_stay_tied_and_keep_the_models_dtype(tmp_path):
    base = save_model_folder(tmp_path / "base", vocab_size=TOKENS, tie_word_embeddings=True)
    trained(base).save_pretrained(tmp_path / "adapter")
    model = resized(base, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter", low_cpu_mem_usage=True)
    inner = loaded.get_base_model()
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    assert inner.lm_head.weight.dtype == torch.bfloat16


def test_new_rows_that_are_in_no_file_are_told(tmp_path):
    base = save_model_folder(tmp_path / "base", vocab_size=TOKENS)
    trained(base).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for load, wanted in ((resized, 1), (AutoModelForCausalLM.from_pretrained, 0)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(load(base), tmp_path / "adapter")
        found = [str(w.message) for w in told if "had 31 rows" in str(w.message)]
        assert len(found) == wanted and all("save_embedding_layers=True" in f for f in found)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("base_model.model.lm_head.weight", None),
        ("base_model.model.model.norm.weight", "no place for it"),
        ("base_model.model.lm_head.other", "no place for it"),
    ],
)
def test_nothing_but_embeddings_gets_into_the_base(tmp_path, key, part):
    base = save_model_folder(tmp_path / "base", vocab_size=TOKENS)
    trained(base).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    like = tensors["base_model.model.lm_head.weight"]
    save_file({**tensors, key: torch.ones_like(like if part is None else like[0])}, path)
    if part is None:
        loaded = PeftModel.from_pretrained(resized(base), tmp_path / "adapter")
        assert loaded.get_base_model().lm_head.weight.eq(1).all()
        return
    with pytest.raises(CheckpointError, match=part):
        PeftModel.from_pretrained(resized(base), tmp_path / "adapter")


def test_saving_with_adapter_state_keeps_them(tmp_path):
    """As in loops over sharded models, and in `drlora train`."""
    base = save_model_folder(tmp_path / "base", vocab_size=TOKENS)
    model = trained(base)
    model.save_pretrained(tmp_path / "adapter", state_dict=adapter_state(model))
    close(PeftModel.from_pretrained(resized(base), tmp_path / "adapter"), logits(model))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": BOTH}], ids=["nothing", "both"])
def test_resume_and_best_model(tmp_path, settings):
    """The Trainer loads what it saved: at a resume into a model resized anew, and at the end."""
    base = save_model_folder(tmp_path / "base", vocab_size=TOKENS)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}, {"input_ids": IDS[1], "labels": IDS[1]}] * 4

    def trainer(steps, seed, **more):
        config = drlora.DrLoraConfig(
            r_init=2, r_target=4, r_max=8, p_grow=1.0, grow_every=1, warmup_steps=1,
            settle_steps=1, **settings,
        )  # fmt: skip
        model = get_peft_model(resized(base, seed), config)
        arguments = TrainingArguments(
            tmp_path / "out", max_steps=steps, save_steps=4, learning_rate=1e-2, use_cpu=True,
            dataloader_pin_memory=False, report_to="none", disable_tqdm=True, **more,
        )  # fmt: skip
        return Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows,
            callbacks=[drlora.DrLoraCallback()],
        )  # fmt: skip

    whole = trainer(8, 0)
    whole.train()
    again = trainer(8, 5)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    close(again.model, logits(whole.model))
    best = trainer(
        8, 0, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4,
        metric_for_best_model="loss",
    )  # fmt: skip
    best.train()
    close(PeftModel.from_pretrained(resized(base), best.state.best_model_checkpoint),
          logits(best.model))  # fmt: skip
