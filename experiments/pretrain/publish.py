"""Publish a pretrained model, with a card made from the result files.

    python experiments/pretrain/publish.py qwen2_moe

Takes the newest checkpoint unless `--checkpoint` names another. Weights are written in bfloat16,
and what is written is then measured: the card states the results of `evaluate.py` and
`specialise.py` on the published folder. A checkpoint whose learning rate had not decayed yet is
called a preview.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from models import SPLIT
from pretrain import BALANCE_COEFFICIENT, output_folder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.trainer_utils import get_last_checkpoint

CACHE = Path(".cache/pretrain")
HERE = Path(__file__).parent
RESULTS = HERE / "results"
TARGETS = {
    "olmoe": Path("src/drlora/embedded/olmoe-tiny"),
    "olmoe_fine": Path("experiments/models/olmoe-fine-tiny"),
    "qwen2_moe": Path("experiments/models/qwen2-moe-tiny"),
    "llama_moe": Path("experiments/models/llama-moe-tiny"),
}
ORIGINS = {
    "olmoe": "It was trained from random weights.",
    "olmoe_fine": "It was trained from random weights.",
    "qwen2_moe": "It was trained from random weights.",
    "llama_moe": (
        "It was made as LLaMA-MoE was. First a dense `LlamaForCausalLM` was trained from random "
        "weights ({dense_tokens} million tokens, mean held-out loss {dense_loss} nats over the "
        "domains). Then the {intermediate} neurons of each FFN were split at random into "
        "{experts} slices, one an expert, under a new router; the experts' outputs are scaled by "
        "{scale:g} (their number over top-k), which is folded into their down projections. Then "
        "it was trained on, as below, on the same corpus."
    ),
}
LARGEST_BYTES = 16_000_000
DECAYED_BELOW = 0.05


def write_model(checkpoint: Path, tokenizer_folder: Path, target: Path) -> None:
    """The checkpoint in bfloat16 with its tokenizer, as `from_pretrained` reads it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    # Pretraining balanced each layer outside the model; fine-tuning has only the model's own loss.
    model.config.router_aux_loss_coef = BALANCE_COEFFICIENT
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target, save_jinja_files=False)


def measure(target: Path, cache: Path, results: Path) -> None:
    """Run both measurements on the published folder."""
    for script, output in (("evaluate.py", "heldout.json"), ("specialise.py", "routing.json")):
        subprocess.run(
            [sys.executable, HERE / script, target, "--cache", cache, "--output", results / output],
            check=True,
            stdout=subprocess.DEVNULL,
        )


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def corpus_table(corpus: dict[str, Any]) -> str:
    """Sources with licences and sizes."""
    columns = ("source", "domain", "licence", "documents", "characters")
    rows = []
    for source in corpus["sources"]:
        cells = [source[column] for column in columns]
        rows.append([f"{cell:,}" if isinstance(cell, int) else cell for cell in cells])
    return table(list(columns), rows)


def loss_table(heldout: dict[str, Any]) -> str:
    """Held-out losses by domain."""
    rows = [
        [name, f"{row['tokens']:,}", f"{row['loss']:.3f}", f"{row['bits_per_byte']:.3f}"]
        for name, row in heldout["domains"].items()
    ]
    return table(["domain", "held-out tokens", "nats a token", "bits a byte"], rows)


def routing_table(routing: dict[str, Any]) -> str:
    """Distances and load by layer."""
    names = ("between_domains", "closest_pair", "within_domain", "ratio")
    loads = ("entropy", "smallest_load", "largest_load", "dead_experts")
    header = ["layer", *(name.replace("_", " ") for name in names + loads)]
    rows = [
        [index, *(layer[name] for name in names + loads)]
        for index, layer in enumerate(routing["layers"])
    ]
    return table(header, rows)


def state(loss_curve: dict[str, Any]) -> str:
    """Whether the published checkpoint is the decayed end of its run."""
    run = loss_curve["run"]
    rates = [row["learning_rate"] for row in loss_curve["train"] if row["tokens"] <= run["tokens"]]
    share = rates[-1] / run["peak_learning_rate"]
    if share > DECAYED_BELOW:
        return "**Preview: an early checkpoint of an unfinished run.**"
    return f"The run was finished: its learning rate had decayed to {share:.1%} of the peak."


def origin(name: str, config: PreTrainedConfig, results: dict[str, Any]) -> str:
    """What the weights were before the run that the card describes."""
    if name != "llama_moe":
        return ORIGINS[name]
    dense = results["dense-loss-curve"]
    losses = [loss for key, loss in dense["heldout"][-1].items() if key != "tokens"]
    return ORIGINS[name].format(
        dense_tokens=f"{dense['run']['tokens'] / 1e6:.1f}",
        dense_loss=f"{sum(losses) / len(losses):.2f}",
        intermediate=config.intermediate_size * SPLIT["experts"],
        **SPLIT,
    )


def experts_text(config: PreTrainedConfig) -> str:
    """How many experts of which width, and how many a token uses."""
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    text = f"{config.num_experts} experts of width {width} with top-{config.num_experts_per_tok}"
    return f"{text} routing" + (f" and a shared expert of width {shared}" if shared else "")


def card(name: str, model: PreTrainedModel, results: dict[str, Any]) -> str:
    """The model card; every figure comes from the model or a result file."""
    run, config = results["loss-curve"]["run"], model.config
    values = {
        "title": TARGETS[name].name,
        "folder": TARGETS[name],
        "model_type": config.model_type,
        "class_name": type(model).__name__,
        "origin": origin(name, config, results),
        "state": state(results["loss-curve"]),
        "parameters": f"{model.num_parameters() / 1e6:.2f}",
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "experts": experts_text(config),
        "vocabulary": config.vocab_size,
        "uniform": f"{math.log(config.vocab_size):.2f}",
        "tokens": f"{run['tokens'] / 1e6:.1f}",
        "corpus_tokens": f"{run['corpus_tokens'] / 1e6:.1f}",
        "passes": f"{run['tokens'] / run['corpus_tokens']:.2f}",
        "batch": run["step_tokens"] // run["row_tokens"],
        "row": run["row_tokens"],
        "rate": run["peak_learning_rate"],
        "balance": run["balance_coefficient"],
        "seed": run["seed"],
        "corpus": corpus_table(results["corpus"]),
        "losses": loss_table(results["heldout"]),
        "routing": routing_table(results["routing"]),
        "resamples": results["routing"]["resamples"],
    }
    return (HERE / "card.md").read_text().format(**values)


def publish(name: str, checkpoint: Path, cache: Path, target: Path) -> None:
    """Write, measure and describe the model; refuse a folder that is too large."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint.parent / "loss-curve.json", folder)
    if name == "llama_moe":
        curve = output_folder(cache, "llama") / "loss-curve.json"
        shutil.copy(curve, folder / "dense-loss-curve.json")
    write_model(checkpoint, cache / "tokenizer", target)
    measure(target, cache, folder)
    files = [RESULTS / "corpus.json", *folder.glob("*.json")]
    results = {file.stem: json.loads(file.read_text()) for file in files}
    # The Trainer writes the curve at every save; the card must tell of this checkpoint's tokens.
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    run = results["loss-curve"]["run"]
    run["tokens"] = step * run["step_tokens"]
    model = AutoModelForCausalLM.from_pretrained(target)
    (target / "README.md").write_text(card(name, model, results))
    size = sum(path.stat().st_size for path in target.iterdir())
    if size > LARGEST_BYTES:
        raise SystemExit(f"{target} has {size:,} bytes, more than {LARGEST_BYTES:,}")
    print(f"{target}: {size:,} bytes after {run['tokens']:,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=TARGETS)
    parser.add_argument("--checkpoint", type=Path, help="other than the newest one")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--target", type=Path, help="other folder than the model's own")
    options = parser.parse_args()
    newest = get_last_checkpoint(str(output_folder(options.cache, options.model)))
    if not (options.checkpoint or newest):
        raise SystemExit(f"{options.model} has no checkpoint: run pretrain.py first")
    checkpoint = options.checkpoint or Path(newest)
    publish(options.model, checkpoint, options.cache, options.target or TARGETS[options.model])


if __name__ == "__main__":
    main()
