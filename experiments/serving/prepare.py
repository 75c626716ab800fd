"""Models, runs, exports and reference logits for compare.py: what engines are asked for.

    python experiments/serving/prepare.py --work .cache/serving

Every base is float32 and carries the embedded tokenizer. The one of OLMoE is the embedded model;
the others are random and tiny. Their config.json has the form of the hub (`rope_theta`,
`num_experts`, `torch_dtype`), which transformers 5 reads and no longer writes.

A case is a base with an adapter whose ranks grew. `embedded` is the run of `make train`, whose
routers are trained; names that end in `-routers` train them too, and the others have LoRA on
attention beside their experts. What is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import drlora
from drlora.embedded import resolve_model

NEW_TOKENS = 16
PROMPTS = (
    "noun: a stiff fiber (coarse hair or filament); natural or synthetic\nkind:",
    "noun: a commercial enterprise that provides scheduled flights for passengers\nkind:",
    "noun: in need of repairs\nkind:",
    "The lighthouse keeper counted 27 ships before the fog rolled in from the east.",
    "for row in table:\n    print(row[0], sum(row[1:]))\n",
    "verb: to walk without aim; to wander\nkind:",
)
FORMATS = ("per-expert", "peft", "mlx", "sglang", "merged")
_SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
}
BASES: dict[str, PreTrainedConfig | None] = {
    "olmoe": None,
    "qwen3_moe": Qwen3MoeConfig(
        **_SMALL, head_dim=64, intermediate_size=256, moe_intermediate_size=128, num_experts=8,
        num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "mixtral": MixtralConfig(
        **_SMALL, head_dim=64, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=None,
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **_SMALL, intermediate_size=256, moe_intermediate_size=128, num_experts=8,
        num_experts_per_tok=2, shared_expert_intermediate_size=128, decoder_sparse_step=1,
    ),
    # As long as its scaled positions say: else readers disagree on their scale.
    "gpt_oss": GptOssConfig(
        **{**_SMALL, "max_position_embeddings": 131072}, head_dim=64, intermediate_size=128,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=128,
    ),
}  # fmt: skip
_ATTENTION = {
    "router": "frozen",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_rank": 8,
}
_ROUTERS = {"router": "train"}


@dataclass(frozen=True)
class Case:
    """A base with an adapter.

    Attributes:
        base: a name of `BASES`.
        settings: of the adapter, beside the common ones; None: the run of `make train`.
    """

    base: str
    settings: dict[str, Any] | None


CASES = {
    "embedded": Case("olmoe", None),
    **{name: Case(name, _ATTENTION) for name in BASES},
    **{f"{n}-routers": Case(n, _ROUTERS) for n in ("qwen3_moe", "mixtral", "qwen2_moe")},
}


def make_base(name: str, folder: Path) -> None:
    """Write a base model in float32, with its tokenizer."""
    source, config = Path(resolve_model("embedded")), BASES[name]
    torch.manual_seed(0)
    if config is None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder / file)
    written = folder / "config.json"
    settings = json.loads(written.read_text("utf-8"))
    if config is not None:
        written.write_text(json.dumps(in_form_of_the_hub(settings), indent=2), "utf-8")
    read, wanted = AutoConfig.from_pretrained(folder).to_dict(), model.config.to_dict()
    assert all(read[name] == wanted[name] for name in wanted if name != "_name_or_path")


def in_form_of_the_hub(settings: dict[str, Any]) -> dict[str, Any]:
    """A config.json as models on the hub have it, from the one that transformers 5 writes."""
    found = dict(settings)
    found["torch_dtype"] = found.pop("dtype")
    rope = dict(found.pop("rope_parameters"))
    found["rope_theta"] = rope.pop("rope_theta")
    found["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if found["model_type"] == "qwen3_moe":
        if "num_local_experts" in found:
            found["num_experts"] = found.pop("num_local_experts")
        found["max_window_layers"] = found["num_hidden_layers"]  # which readers ask for
    return found


def train(case: Case, work: Path, folder: Path) -> None:
    """Train the case's adapter into `folder`."""
    output = f"output_dir={folder}"
    if case.settings is None:
        drlora.train(drlora.load_recipe("embedded", [output]))
        return
    adapter = {
        "r_init": 4, "r_target": 8, "r_max": 16, "projections": ["gate_up", "down"],
        "grow_every": 10, "settle_steps": 10, "p_grow": 0.5, **case.settings,
    }  # fmt: skip
    overrides = [
        f"model={work / 'bases' / case.base}",
        output,
        *(f"adapter.{key}={json.dumps(value)}" for key, value in adapter.items()),
        "training.max_steps=60",
        "training.per_device_train_batch_size=8",
        "training.learning_rate=1.0e-2",
        "training.warmup_steps=5",
        "training.logging_steps=30",
        "training.save_steps=1000",
        "evaluation.exact_match_examples=4",
        "evaluation.batch_size=50",
    ]
    drlora.train(drlora.load_recipe("embedded", overrides))


def export(run: Path, base: Path, format: str, folder: Path) -> str:
    """What the export says of itself, or why there is none."""
    if (folder / "drlora_export.json").is_file():
        return "made"
    try:
        drlora.export_adapter(run, format, folder, model=str(base))
    except drlora.DrLoraError as error:
        return str(error)
    return "made"


@torch.no_grad()
def reference(base: Path, run: Path | None, ids: list[list[int]], file: Path) -> None:
    """Logits of every position (N, V) and greedy tokens (P, T), in float32, by drlora itself."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if run is not None:
        model = PeftModel.from_pretrained(model, run)
    model.eval()
    logits = torch.cat([model(torch.tensor([prompt])).logits[0] for prompt in ids])
    greedy = []
    for prompt in ids:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        greedy.append(tokens[len(prompt) :])
    np.savez(file, logits=logits.numpy(), greedy=np.array(greedy))


def prepare(work: Path) -> dict[str, dict[str, str]]:
    """Make all that is missing; case -> format -> `made`, or why it is refused."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    for name in ("bases", "runs", "out", "reference"):
        (work / name).mkdir(parents=True, exist_ok=True)
    asked = {"texts": PROMPTS, "ids": ids, "new_tokens": NEW_TOKENS}
    (work / "prompts.json").write_text(json.dumps(asked), "utf-8")
    for name in BASES:
        if not (work / "bases" / name / "config.json").is_file():
            make_base(name, work / "bases" / name)
        if not (file := work / "reference" / f"{name}-base.npz").is_file():
            reference(work / "bases" / name, None, ids, file)
    found = {}
    for name, case in CASES.items():
        base, run = work / "bases" / case.base, work / "runs" / name
        if not (run / "result.json").is_file():
            train(case, work, run)
        if not (file := work / "reference" / f"{name}.npz").is_file():
            reference(base, run, ids, file)
        found[name] = {f: export(run, base, f, work / "out" / f"{name}-{f}") for f in FORMATS}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    """Read the command line and make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".cache/serving"))
    prepare(parser.parse_args().work)


if __name__ == "__main__":
    main()
