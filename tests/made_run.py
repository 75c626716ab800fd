"""A run directory as `drlora train` leaves it, made without training: for reports of any size.

python tests/made_run.py FOLDER [--layers 48] [--experts 128] [--events 200]

The ranks follow the real allocator; routing and importance are drawn from a fixed seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import yaml

from drlora.ranks.allocator import allocate
from drlora.trainer.event_log import MOST_EVENTS

EVERY = 20


def make_run(
    folder: Path, layers: int = 2, experts: int = 4, events: int = 5, seed: int = 0, **changes
) -> Path:
    """Write the files of a finished run; `changes` are entries of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    blocks = [f"model.layers.{layer}.mlp" for layer in range(layers)]
    popularity_LE = random.dirichlet(np.full(experts, 0.6), size=layers)
    ranks_LE = np.full((layers, experts), 8)
    growth, known = [], []
    stride = -(-events // MOST_EVENTS)
    for event in range(1, events + 2):
        step = EVERY * event
        f_LE = popularity_LE * random.uniform(0.8, 1.25, popularity_LE.shape)
        g_LE = 10 ** random.uniform(-8, -4, popularity_LE.shape)
        saliency_LE = f_LE * g_LE / (ranks_LE + 1) ** 1.2
        is_end = event == events + 1
        if is_end or (event - 1) % stride == 0:
            known += [
                {
                    "step": step,
                    "block": block,
                    "projection": "gate_up+down",
                    "ranks": ranks_LE[layer].tolist(),
                    "routing": _short(f_LE[layer]),
                    "importance": _short(g_LE[layer]),
                    "saliency": _short(saliency_LE[layer]),
                }
                for layer, block in enumerate(blocks)
            ]
        for layer, block in enumerate(blocks if not is_end else []):
            due = 8 * experts * event // events - int(ranks_LE[layer].sum() - 8 * experts)
            grants = allocate(
                saliency_LE[layer].tolist(), ranks=ranks_LE[layer].tolist(), quota=due, cap=5,
                r_max=64,
            )  # fmt: skip
            ranks_LE[layer] += grants
            growth += [
                {
                    "step": step,
                    "block": block,
                    "projection": "gate_up+down",
                    "expert": expert,
                    "granted": granted,
                    "rank": int(ranks_LE[layer, expert]),
                    "routing": float(f_LE[layer, expert]),
                    "importance": float(g_LE[layer, expert]),
                    "saliency": float(saliency_LE[layer, expert]),
                }
                for expert, granted in enumerate(grants)
                if granted
            ]
    steps = EVERY * (events + 1)
    _write(folder, blocks, ranks_LE, growth, known, steps, changes)
    return folder


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


def _write(folder, blocks, ranks_LE, growth, known, steps, changes) -> None:
    measured = {
        kind: {"loss": {"loss": loss, "perplexity": 0.0, "target_tokens": 9}, "match": None}
        for kind, loss in (("before", 4.0), ("after", 1.5))
    }
    logs = [
        {"step": s, "kind": "log", "loss": 1.5 + 2.5 * 0.99**s, "learning_rate": 1e-4,
         "epoch": s / 40,
         "tokens_per_second": 900.0, "dynamics_share": 0.02}
        for s in range(10, steps + 1, 10)
    ]  # fmt: skip
    metrics = [
        {"step": 0, "kind": "before", **measured["before"]},
        *logs,
        {"step": steps, "kind": "after", **measured["after"]},
    ]
    for name, entries in (("growth", growth), ("events", known), ("metrics", metrics)):
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / f"{name}.jsonl").write_text(text)
    adapter = dict(r_init=8, r_target=16, r_max=64, lora_alpha=32.0, gamma=1.2)
    recipe = {"model": "made", "data": {"train": "made.jsonl"}, "adapter": adapter, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    result = {
        **measured,
        "ranks": {
            block: {"gate_up": row.tolist(), "down": row.tolist()}
            for block, row in zip(blocks, ranks_LE, strict=True)
        },
        "steps": steps, "seconds": 12.5, "seed": 0, "peak_memory_bytes": 2**30,
        "versions": {"drlora": "0"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a run directory without training.")
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 48), ("experts", 128), ("events", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    made = parser.parse_args()
    print(make_run(made.folder, made.layers, made.experts, made.events))
