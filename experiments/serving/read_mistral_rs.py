"""Greedy text of mistral.rs on a CPU: python read_mistral_rs.py JOB.json; see compare.py.

It gives no logits, so texts are compared. An answer ends where the model says so.
"""

from __future__ import annotations

import json
import sys

from mistralrs import Architecture, CompletionRequest, LoraAdapter, ModelDType, Runner, Which

ARCHITECTURES = {"qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"}


def main() -> None:
    """Read the job, run the engine, write the texts."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    if job["family"] not in ARCHITECTURES:
        sys.exit(f"mistral.rs has no {job['family']}")
    arch = getattr(Architecture, ARCHITECTURES[job["family"]])
    common = {"model_id": job["model"], "arch": arch, "dtype": ModelDType.F32}
    if job["adapter"]:
        adapters = [LoraAdapter("a", job["adapter"])]
        which = Which.Lora(adapters=adapters, max_rank=max(64, job["rank"]), **common)
    else:
        which = Which.Plain(**common)
    runner = Runner(which=which, no_kv_cache=False, prefix_cache_n=0)
    named = {"adapter": "a"} if job["adapter"] else {}
    texts = []
    for text in job["texts"]:
        asked = CompletionRequest(
            prompt=text, max_tokens=job["new_tokens"], temperature=0.0, top_k=1,
            model="default", **named,
        )  # fmt: skip
        texts.append(runner.send_completion_request(asked).choices[0].text)
    with open(job["out"], "w", encoding="utf-8") as file:
        json.dump(texts, file)


if __name__ == "__main__":
    main()
