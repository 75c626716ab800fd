"""CPU time of a step of `drlora train`, of this checkout and of others, side by side.

    git worktree add ../before be9a52f
    PYTHONPATH=src python -m benchmarks.run_step --other ../before [--layers 30] [--rounds 3]

The model is random and has all sizes of experiments/realistic (30 layers, 692M parameters in
bfloat16, 8 experts of width 1,536, top 2, vocabulary 49,152). Each run is a process of its own on
one thread, from one recipe to its end; checkouts take turns, and each round gives one ratio. A step
is one of 8 x 160 tokens; the first, which makes the optimizer's state, does not count. Rows go to
benchmarks/results/run_step.jsonl, with the commit of each checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from benchmarks.harness import Row, Timing, append, where
from drlora.embedded import model_folder

HERE = Path(__file__).resolve().parents[1]
VOCABULARY, BATCH, LENGTH = 49_152, 8, 160
RUN = """
import json, sys, time
import torch
from transformers.trainer_callback import CallbackHandler
torch.set_num_threads(1)
marks, ended = [], CallbackHandler.on_step_end
def note(self, *args, **kwargs):
    marks.append(time.process_time())
    return ended(self, *args, **kwargs)
CallbackHandler.on_step_end = note
from drlora.runs.recipe import load_recipe
from drlora.runs.train import train
train(load_recipe(sys.argv[1], ["output_dir=" + sys.argv[2]]))
print("MARKS", json.dumps(marks))
"""


def make_model(folder: Path, layers: int) -> None:
    """The model and a tokenizer that knows fewer tokens."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=2048, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        MixtralForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(default)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)


def make_recipe(folder: Path, steps: int) -> Path:
    """Texts that fill their length, and a recipe that every version reads."""
    draw = random.Random(0)
    for name, count in (("train", BATCH * 8), ("eval", 1)):
        texts = (" ".join(str(draw.randrange(10**6)) for _ in range(LENGTH)) for _ in range(count))
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    recipe = {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": LENGTH,
        },
        "adapter": dict(r_init=4, r_target=8, r_max=16, grow_every=1, settle_steps=1, p_grow=0.5),
        "training": dict(
            max_steps=steps, warmup_steps=1, learning_rate=2e-4, logging_steps=1,
            save_strategy="no", per_device_train_batch_size=BATCH,
        ),
        "evaluation": dict(loss_examples=1, before=False),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def seconds_a_step(checkout: Path, recipe: Path, output: Path) -> float:
    """CPU seconds of a step of one run."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1",
                   "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, "-c", RUN, str(recipe), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    marks = json.loads(done.stdout.rpartition("MARKS")[2])
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def commit_of(checkout: Path) -> str:
    """The commit that is checked out there."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--other", action="append", default=[], type=Path, help="a checkout")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args()
    checkouts = {commit_of(path): path.resolve() for path in (HERE, *options.other)}
    first = next(iter(checkouts))
    taken: dict[str, list[float]] = {commit: [] for commit in checkouts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options.layers)
        recipe = make_recipe(folder, options.steps + 1)
        for number in range(options.rounds):
            for commit, checkout in checkouts.items():
                output = folder / f"{commit}-{number}"
                taken[commit].append(seconds_a_step(checkout, recipe, output))
                print(f"  {commit} {taken[commit][-1]:7.3f} CPU s a step", flush=True)
    timings = {commit: Timing(seconds) for commit, seconds in taken.items()}
    case = f"drlora train, {options.layers} layers, {BATCH} x {LENGTH} tokens, bfloat16"
    rows: list[Row] = []
    for commit, timing in timings.items():
        ratio, low, high = timings[first].ratio_to(timing)
        rows.append(
            {"case": case, "commit": commit, "cpu_s_a_step": timing.median,
             "all_cpu_s": timing.seconds, "first_over_this": ratio, "p20": low, "p80": high,
             "steps": options.steps, **where()}
        )  # fmt: skip
        print(f"{commit}: {timing.median:.3f} CPU s a step; {first} takes {ratio:.3f} x of it")
    if not options.dry:
        append("run_step", rows)


if __name__ == "__main__":
    main()
