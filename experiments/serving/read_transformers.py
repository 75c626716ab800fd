"""transformers' and PEFT's logits, without drlora: python read_transformers.py JOB.json; see
compare.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

sys.modules["drlora"] = None  # type: ignore[assignment]  # whoever imports it fails

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


@torch.no_grad()
def main() -> None:
    """Read the job, run the model, write logits and greedy tokens."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"])
    model.eval()
    logits = torch.cat([model(torch.tensor([ids])).logits[0] for ids in job["ids"]])
    greedy = []
    for ids in job["ids"]:
        tokens = list(ids)
        for _ in range(job["new_tokens"]):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        greedy.append(tokens[len(ids) :])
    np.savez(job["out"], logits=logits.numpy(), greedy=np.array(greedy))


if __name__ == "__main__":
    main()
