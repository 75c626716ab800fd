"""Peak memory of a merge, whole and by shard, of a random model in bfloat16.

    python experiments/serving/memory.py

The model has 16 layers of 32 experts, 1.6 GB; its adapter has LoRA of rank 8 on every expert. Each
merge runs in a process of its own; memory.json has the peak of each, and the seconds. `own` is
memory that nothing but the process can give back; `with files` is with what is mapped of files,
which the system takes back when somebody else needs it. Both are looked at 20 times a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, OlmoeConfig

import drlora

HERE = Path(__file__).parent
CONFIG = OlmoeConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=512, num_hidden_layers=16,
    num_attention_heads=8, num_key_value_heads=8, num_experts=32, num_experts_per_tok=2,
    max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
WAYS = {
    "whole": {},
    "by shard, 500 MB": {"by_shard": True, "max_shard_size": "500MB"},
    "by shard, 100 MB": {"by_shard": True, "max_shard_size": "100MB"},
}
ONE = "--one"


class Peak(threading.Thread):
    """Looks at this process's memory until it is over."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.is_over, self.before = False, self.now()
        self.found = dict(self.before)

    @staticmethod
    def now() -> dict[str, int]:
        """Bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        said = {line.split(":")[0]: line.split() for line in lines}
        own, files = (int(said[name][1]) * 1024 for name in ("RssAnon", "RssFile"))
        return {"own": own, "with files": own + files}

    def run(self) -> None:
        """Twenty times a second."""
        while not self.is_over:
            for name, size in self.now().items():
                self.found[name] = max(self.found[name], size)
            time.sleep(0.05)


def make(work: Path) -> None:
    """The model and an adapter whose every expert has an update."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    model.save_pretrained(work / "base", max_shard_size="500MB")
    model.config._name_or_path = str(work / "base")
    model.name_or_path = str(work / "base")
    settings = drlora.DrLoraConfig(r_init=8, r_target=8, r_max=8, lora_alpha=8.0)
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(work / "adapter")


def one(work: Path, way: str) -> None:
    """Merge, and print the peak."""
    out = work / "merged"
    shutil.rmtree(out, ignore_errors=True)
    peak = Peak()
    peak.start()
    started = time.process_time()
    drlora.export_adapter(work / "adapter", "merged", out, model=str(work / "base"), **WAYS[way])
    peak.is_over = True
    peak.join()
    seconds = round(time.process_time() - started, 1)
    print(json.dumps({"before": peak.before, **peak.found, "cpu_seconds": seconds}))


def main() -> None:
    """Make the model, and merge in each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".cache/serving/memory"))
    parser.add_argument("--out", type=Path, default=HERE / "memory.json")
    parser.add_argument(ONE, choices=WAYS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.work, asked.one)
        return
    if not (asked.work / "adapter").is_dir():
        make(asked.work)
    size = sum(p.stat().st_size for p in (asked.work / "base").glob("*.safetensors"))
    found = {"weights_bytes": size, "adapter_rank": 8, "torch": torch.__version__}
    for way in WAYS:
        command = [sys.executable, __file__, "--work", str(asked.work), ONE, way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        print(way, found[way], flush=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
