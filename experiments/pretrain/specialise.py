"""Measure how far routing differs between domains, against chance, and how even the load is.

    python experiments/pretrain/specialise.py .cache/pretrain/checkpoints/checkpoint-400

A domain's expert frequencies are the shares of its routed slots that each expert of a layer gets.
Two domains are compared by the total variation distance of their frequencies: the share of slots
that would have to move to another expert. Chance is the same distance between two random halves of
one domain. Both sides of every comparison have equally many rows; a domain with too few held-out
rows for that is left out. Prints the figures and writes them to `--output`.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from evaluate import BATCH_ROWS, domain_rows
from transformers import AutoModelForCausalLM, PreTrainedModel

CACHE = Path(".cache/pretrain")
RESAMPLES = 20
# An expert with less than this share of an even load is counted as dead.
DEAD_BELOW = 0.05
# Halves of fewer rows than this make a floor that is mostly noise.
LEAST_HALF_ROWS = 24


@torch.inference_mode()
def expert_shares(model: PreTrainedModel, rows: list[list[int]]) -> np.ndarray:
    """Each row's shares of routed slots by layer and expert, [rows, layers, experts]."""
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    batches = []
    for start in range(0, len(rows), BATCH_ROWS):
        input_ids = torch.tensor(rows[start : start + BATCH_ROWS])
        logits = model(input_ids=input_ids, output_router_logits=True).router_logits
        layers = []
        for logits_XE in logits:
            chosen_XK = logits_XE.topk(top_k, dim=-1).indices
            chosen_RX = chosen_XK.reshape(len(input_ids), -1)
            counts_RE = torch.zeros(len(input_ids), experts)
            counts_RE.scatter_add_(1, chosen_RX, torch.ones_like(chosen_RX, dtype=torch.float))
            layers.append(counts_RE / chosen_RX.shape[1])
        batches.append(torch.stack(layers, dim=1).numpy())
    return np.concatenate(batches)


def distance(first_LE: np.ndarray, second_LE: np.ndarray) -> np.ndarray:
    """Total variation distance of two frequency tables, for each layer."""
    return np.abs(first_LE - second_LE).sum(axis=-1) / 2


def resample(shares: dict[str, np.ndarray], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Distances between domains and within them, [pairs, layers], on random halves."""
    rows = min(len(of_rows) for of_rows in shares.values()) // 2
    halves = {}
    for domain, of_rows in shares.items():
        order = random.permutation(len(of_rows))
        halves[domain] = (of_rows[order[:rows]].mean(0), of_rows[order[rows : 2 * rows]].mean(0))
    return {
        "between": np.stack(
            [distance(halves[a][0], halves[b][1]) for a, b in itertools.combinations(halves, 2)]
        ),
        "within": np.stack([distance(*pair) for pair in halves.values()]),
    }


def layer_distances(shares: dict[str, np.ndarray], seed: int) -> list[dict[str, float]]:
    """For each layer: mean distance between and within domains, and spread over resamples."""
    random = np.random.default_rng(seed)
    drawn = [resample(shares, random) for _ in range(RESAMPLES)]
    between_SL = np.stack([one["between"].mean(0) for one in drawn])
    within_SL = np.stack([one["within"].mean(0) for one in drawn])
    lowest_SL = np.stack([one["between"].min(0) for one in drawn])
    return [
        {
            "between_domains": round(float(between_SL[:, layer].mean()), 4),
            "between_domains_sd": round(float(between_SL[:, layer].std()), 4),
            "closest_pair": round(float(lowest_SL[:, layer].mean()), 4),
            "within_domain": round(float(within_SL[:, layer].mean()), 4),
            "within_domain_sd": round(float(within_SL[:, layer].std()), 4),
            "ratio": round(float(between_SL[:, layer].mean() / within_SL[:, layer].mean()), 2),
        }
        for layer in range(between_SL.shape[1])
    ]


def layer_loads(shares: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """For each layer: how even the load is over an equal mixture of the domains."""
    load_LE = np.mean([of_rows.mean(0) for of_rows in shares.values()], axis=0)
    experts = load_LE.shape[1]
    return [
        {
            "entropy": round(float(-(load * np.log(load + 1e-12)).sum() / math.log(experts)), 4),
            "largest_load": round(float(load.max() * experts), 3),
            "smallest_load": round(float(load.min() * experts), 3),
            "dead_experts": int((load * experts < DEAD_BELOW).sum()),
        }
        for load in load_LE
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows a domain, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=CACHE / "routing.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more of them wait for each other where the cores are shared
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    heldout = DatasetDict.load_from_disk(options.cache / "packed")["heldout"]
    shares = {
        domain: expert_shares(model, rows[: options.rows])
        for domain, rows in domain_rows(heldout).items()
        if len(rows) >= 2 * LEAST_HALF_ROWS
    }
    pairs = zip(layer_distances(shares, options.seed), layer_loads(shares), strict=True)
    result = {
        "model": options.model.name,
        "rows": {domain: len(of_rows) for domain, of_rows in shares.items()},
        "resamples": RESAMPLES,
        "seed": options.seed,
        "layers": [{**distances, **load} for distances, load in pairs],
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["layers"], indent=1))


if __name__ == "__main__":
    main()
