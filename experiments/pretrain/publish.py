"""Publish a checkpoint as the embedded model, with a card made from the result files.

    python experiments/pretrain/publish.py .cache/pretrain/checkpoints/checkpoint-4389

Weights are written in bfloat16, and what is written is then measured: the card states the results
of `evaluate.py` and `specialise.py` on the published folder. A checkpoint whose learning rate had
not decayed yet is called a preview.
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
from pretrain import BALANCE_COEFFICIENT
from transformers import AutoTokenizer, GenerationConfig, OlmoeForCausalLM

CACHE = Path(".cache/pretrain")
HERE = Path(__file__).parent
RESULTS = HERE / "results"
TARGET = Path("src/drlora/embedded/olmoe-tiny")
LARGEST_BYTES = 12 * 2**20
DECAYED_BELOW = 0.05


def write_model(checkpoint: Path, tokenizer_folder: Path, target: Path) -> None:
    """The checkpoint in bfloat16 with its tokenizer, as `from_pretrained` reads it."""
    model = OlmoeForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
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


def measure(target: Path, cache: Path) -> None:
    """Run both measurements on the published folder."""
    for script in ("evaluate.py", "specialise.py"):
        subprocess.run(
            [sys.executable, HERE / script, target, "--cache", cache],
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


def card(model: OlmoeForCausalLM, results: dict[str, Any]) -> str:
    """The model card; every figure comes from the model or a result file."""
    run, config = results["loss-curve"]["run"], model.config
    values = {
        "state": state(results["loss-curve"]),
        "parameters": f"{model.num_parameters() / 1e6:.2f}",
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "width": config.intermediate_size,
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


def publish(checkpoint: Path, cache: Path, target: Path) -> None:
    """Write, measure and describe the model; refuse a folder too large for the package."""
    # The Trainer writes the curve at every save; the card must tell of this checkpoint's tokens.
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    write_model(checkpoint, cache / "tokenizer", target)
    measure(target, cache)
    names = ("corpus", "loss-curve", "heldout", "routing")
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}
    run = results["loss-curve"]["run"]
    run["tokens"] = step * run["step_tokens"]
    model = OlmoeForCausalLM.from_pretrained(target)
    (target / "README.md").write_text(card(model, results))
    size = sum(path.stat().st_size for path in target.iterdir())
    if size > LARGEST_BYTES:
        raise SystemExit(f"{target} has {size:,} bytes, more than {LARGEST_BYTES:,}")
    print(f"{target}: {size:,} bytes after {run['tokens']:,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    publish(options.checkpoint, options.cache, options.target)


if __name__ == "__main__":
    main()
