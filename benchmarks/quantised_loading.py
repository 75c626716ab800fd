"""A checkpoint packed while it is loaded: `python -m benchmarks.quantised_loading`.

A Qwen3-MoE of random bfloat16 weights is written to a folder and loaded in a process of its own:
as it is, and with each storage. Reports the anonymous memory that loading adds at its peak and at
its end, the largest stack of one matrix of one block, and the CPU time of packing a number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import drlora
from benchmarks.harness import Row, add_names, append, where
from benchmarks.models import random_model
from drlora.ops.storage.packed import FORMATS, Packed, packed_format

CONFIG = {
    "vocab_size": 8192, "hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 48,
    "num_experts_per_tok": 4,
}  # fmt: skip
PLAIN = "bfloat16"
MB = 1e6
EVERY = 0.002  # seconds between looks at the memory
PACKED_ROWS = (2048, 2048)  # of the matrix that is packed for the time of a number


class Peak:
    """The largest anonymous memory of this process while the block lasts."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous_bytes()
        self._is_over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._is_over.wait(EVERY):
            self.most = max(self.most, anonymous_bytes())


def anonymous_bytes() -> int:
    """Of this process; what is mapped from files is not in it."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (line,) = (one for one in lines if one.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(folder: str, storage: str) -> Row:
    """Load it in this process."""
    packs = storage != PLAIN
    settings: dict[str, Any] = {}
    if packs:
        settings["quantization_config"] = drlora.QuantisedExperts(storage)
    with Peak() as peak:
        started = time.process_time()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings)
        seconds = time.process_time() - started
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    row: Row = {
        "peak_mb": (peak.most - peak.before) / MB,
        "end_mb": (anonymous_bytes() - peak.before) / MB,
        "tensors_mb": held / MB,
        "largest_stack_mb": max(_stacks()) / MB,
        "cpu_seconds": seconds,
    }
    packed = [m for m in model.modules() if isinstance(m, Packed)]
    if packed:
        numbers = sum(m.shape.numel() for m in packed)
        size = sum(p.numel() * p.element_size() for m in packed for p in m.parameters())
        row["of_bfloat16_experts"] = size / (2 * numbers)
        row["ns_a_number"] = _ns_a_number(storage)
    return row


def _stacks() -> list[int]:
    """Bytes of gate_up and of down of one block in bfloat16."""
    config = Qwen3MoeConfig(**CONFIG)
    one = config.num_experts * config.moe_intermediate_size * config.hidden_size * 2
    return [2 * one, one]


def _ns_a_number(storage: str) -> float:
    """CPU time of packing one number, the best of five."""
    w_OI = torch.randn(PACKED_ROWS)
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        packed_format(storage).encode(w_OI)
        best = min(best, time.process_time() - started)
    return best / w_OI.numel() * 1e9


def main(argv: list[str] | None = None) -> int:
    """Load with what is asked for and append rows to benchmarks/results/quantised_loading.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_names(parser, [PLAIN, *FORMATS])
    parser.add_argument("--dry", action="store_true", help="append no row")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "STORAGE"))
    arguments = parser.parse_args(argv)
    if arguments.measure:
        torch.set_num_threads(1)
        print(json.dumps(measure(*arguments.measure)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(**CONFIG)
        model = random_model(Qwen3MoeForCausalLM, config, torch.bfloat16, "cpu")
        model.save_pretrained(folder)
        numbers = sum(p.numel() for p in model.parameters())
        del model
        for storage in arguments.names:
            command = [sys.executable, "-m", "benchmarks.quantised_loading"]
            done = subprocess.run(
                [*command, "--measure", folder, storage],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            case = f"loading Qwen3-MoE {numbers / 1e6:.0f}M E{config.num_experts}"
            found = json.loads(done.stdout.splitlines()[-1])
            row: Row = {"case": case, "implementation": storage, **found, **where()}
            print(json.dumps(row), flush=True)
            if not arguments.dry:
                append("quantised_loading", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
