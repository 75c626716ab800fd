"""mlx-lm's logits on a CPU: python read_mlx.py JOB.json, in its environment; see compare.py."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load


def main() -> None:
    """Read the job, run the model, write logits and greedy tokens."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    mx.set_default_device(mx.cpu)
    model, _ = load(job["model"], adapter_path=job["adapter"])
    logits = [np.array(model(mx.array([ids]))[0].astype(mx.float32)) for ids in job["ids"]]
    greedy = []
    for ids in job["ids"]:
        tokens = list(ids)
        for _ in range(job["new_tokens"]):
            tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
        greedy.append(tokens[len(ids) :])
    np.savez(job["out"], logits=np.concatenate(logits), greedy=np.array(greedy))


if __name__ == "__main__":
    main()
