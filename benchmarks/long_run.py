"""A long run: memory, step time and logs stay as they are: `python -m benchmarks.long_run`.

20,000 steps of the Trainer on the embedded model, with an event every 20 steps. Ranks grow in the
first 64 events; in the others they move between experts (`move_share`), so the first thousand
steps after growth and the last thousand have as many ranks. Every tenth step is followed by one of
a second adapter of the same size that never changes: what the machine's other work does to the
clock, it does to both, and step times are given as ratios to it too.

Writes benchmarks/results/long_run.json. Takes twenty-five minutes on a free core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import drlora
from benchmarks.harness import RESULTS, where
from drlora.embedded import model_folder
from drlora.io.jsonl import read_lines
from drlora.runs.environment import source_state
from drlora.runs.metrics_log import MetricsLog

STEPS, EVERY, WINDOW, REFERENCE_EVERY = 20_000, 20, 1000, 10
ROWS, LENGTH, VOCABULARY = 2, 24, 4096
SETTINGS: dict[str, Any] = dict(
    r_init=6, r_target=8, r_max=32, p_grow=0.1, grow_every=EVERY, warmup_steps=0, settle_steps=0,
    router="frozen",
)  # fmt: skip


def make_model(**changes: Any) -> PeftModel:
    """The embedded model in float32 with an adapter."""
    base = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    found = get_peft_model(base, drlora.DrLoraConfig(**{**SETTINGS, **changes}))
    assert isinstance(found, PeftModel)
    return found.train()


def make_data() -> Dataset:
    """Random tokens: what is learned does not matter here."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (512, LENGTH), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make_reference() -> Callable[[], None]:
    """A step of AdamW on an adapter of the same size whose ranks stay as they are."""
    model = make_model(r_init=SETTINGS["r_target"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.tensor(make_data()["input_ids"][:ROWS])

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Watch(TrainerCallback):
    """Clocks every step, and every tenth the reference beside it; notes the memory in use."""

    def __init__(self) -> None:
        self.reference = make_reference()
        self.steps: list[tuple[float, float]] = []  # wall and process seconds
        self.references: dict[int, tuple[float, float]] = {}
        self.resident: dict[int, int] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        self._started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop them."""
        self.steps.append(since(self._started))
        if state.global_step % REFERENCE_EVERY == 0:
            started = now()
            self.reference()
            self.references[state.global_step] = since(started)
        if state.global_step % 100 == 0:
            self.resident[state.global_step] = resident_bytes()


def now() -> tuple[float, float]:
    """Wall clock, and processor time of this process."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds of both since `start`."""
    wall, process = now()
    return wall - start[0], process - start[1]


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def window(watch: Watch, first: int) -> dict[str, Any]:
    """Medians of WINDOW steps from `first` (counted from 1), and their ratio to the reference."""
    span = range(first, first + WINDOW)
    found: dict[str, Any] = {"steps": [span.start, span.stop - 1]}
    for clock, name in enumerate(("wall", "process")):
        median = statistics.median(watch.steps[step - 1][clock] for step in span)
        beside = statistics.median(t[clock] for s, t in watch.references.items() if s in span)
        found[f"{name}_ms"] = round(median * 1e3, 3)
        found[f"reference_{name}_ms"] = round(beside * 1e3, 3)
        found[f"{name}_to_reference"] = round(median / beside, 4)
    found["resident_mb"] = round(
        statistics.median(b for s, b in watch.resident.items() if s in span) / 1e6, 2
    )
    return found


def run(steps: int, folder: Path) -> dict[str, Any]:
    """The whole run and what became of memory, time and logs."""
    torch.manual_seed(0)
    model = make_model(options={"move_share": 0.05})
    growth, watch = drlora.DrLoraCallback(), Watch()
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=1e-4,
        lr_scheduler_type="constant", logging_steps=20, save_steps=steps // 10, save_total_limit=2,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    trainer = Trainer(
        model, arguments, train_dataset=make_data(),
        callbacks=[growth, MetricsLog(metrics), watch],
    )  # fmt: skip
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    assert growth.dynamics is not None
    plan = growth.dynamics.growth.groups[0].plan
    spent, stored = growth.dynamics.budget()
    grown = next(s for n, s in enumerate(plan.event_steps, 1) if plan.due(n) == plan.budget)
    grants = list(read_lines(folder / "growth.jsonl"))
    first, last = window(watch, grown + 1), window(watch, steps - WINDOW + 1)
    return {
        "steps": steps,
        "events": len(plan.event_steps),
        "events_that_changed_ranks": len({grant["step"] for grant in grants}),
        "growth_over_at_step": grown,
        "ranks": {"spent": spent, "stored": stored},
        "first": first,
        "last": last,
        "last_over_first": {
            key: round(last[key] / first[key], 4)
            for key in ("wall_ms", "process_ms", "wall_to_reference", "process_to_reference",
                        "resident_mb")
        },
        "resident_mb": [[s, round(b / 1e6, 1)] for s, b in watch.resident.items()][:: 5],
        "logs": {
            name: {"bytes": (path := folder / name).stat().st_size,
                   "lines": sum(1 for _ in read_lines(path))}
            for name in ("growth.jsonl", "metrics.jsonl")
        },
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        "minutes": round(seconds / 60, 1),
        "settings": {**SETTINGS, "options": {"move_share": 0.05}, "batch": [ROWS, LENGTH]},
        **where(),
        "source": asdict(source_state()),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run, write the result, and say what falls short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dry", action="store_true", help="write no result")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments.steps, Path(folder))
    text = json.dumps(found, indent=1)
    print(text)
    if not arguments.dry:
        (RESULTS / "long_run.json").write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
