"""Train, resume, export, evaluate and break the realistic model in bfloat16, by the command line.

    python experiments/realistic/build.py                                   # see there
    .cache/gym/bin/python experiments/realistic/problems.py                 # see there
    python experiments/realistic/check.py

About half an hour on one core, 7 GB of memory; works in .cache/realistic and writes
experiments/realistic/results.json, part by part. What it does:

1. a run of 12 steps; the same run again, interrupted after a checkpoint and resumed: its adapter
   must be equal to the bit
2. the run exported as peft, as per-expert, and merged with both kinds of rounding, all accepted
3. the run (as it is, and in float32) and the exports evaluated by `drlora eval` on the same 48
   examples
4. defects planted into exports in bfloat16 (an expert of one layer dropped, the down projections
   dropped, the scale twice, nothing merged), all to be refused
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

import drlora.adapter.layer
from drlora.errors import CheckpointError
from drlora.export import peft_lora
from drlora.export.formats import per_expert
from drlora.runs.environment import peak_memory, versions
from drlora.runs.export import export_adapter

HERE = Path(__file__).parent
WORK = Path(".cache/realistic")
RUN = WORK / "run"
LAYER, EXPERT = 17, 3
EXPORTS = {
    "peft": ["peft"],
    "per-expert": ["per-expert"],
    "merged-stochastic": ["merged", "--rounding", "stochastic"],
    "merged-nearest": ["merged", "--rounding", "nearest"],
}


def drlora_cli(*words: str) -> tuple[str, float]:
    """Standard output of a drlora command, and its seconds; its errors are ours."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "drlora", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout, round(time.monotonic() - started, 1)


def train(output: Path, *words: str) -> float:
    """Run the recipe into `output`; the seconds."""
    recipe = str(HERE / "recipe.yaml")
    return drlora_cli("train", recipe, f"output_dir={output}", *words)[1]


def train_interrupted(output: Path, step: int) -> None:
    """Begin the same run, and press Ctrl-C when the checkpoint of `step` is there."""
    command = [sys.executable, "-m", "drlora", "train", str(HERE / "recipe.yaml")]
    process = subprocess.Popen([*command, f"output_dir={output}"], stdout=subprocess.DEVNULL)
    manifest = output / "checkpoints" / f"checkpoint-{step}" / "manifest.json"
    while not manifest.is_file():
        if process.poll() is not None:
            raise SystemExit(f"the run into {output} ended with {process.returncode} too early")
        time.sleep(1)
    process.send_signal(signal.SIGINT)
    if process.wait() != 130:
        raise SystemExit(f"Ctrl-C ended with {process.returncode}, not 130")


def trained_and_resumed() -> dict[str, Any]:
    """The whole run and the resumed one."""
    other = WORK / "resumed"
    for folder in (RUN, other):
        shutil.rmtree(folder, ignore_errors=True)
    seconds = train(RUN)
    train_interrupted(other, step=4)
    train(other, "--resume")
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (RUN, other))
    result = json.loads((RUN / "result.json").read_text())
    shutil.rmtree(other)
    return {
        "seconds": seconds,
        "steps": result["steps"],
        "before": result["before"]["loss"],
        "after": result["after"]["loss"],
        "budget": result["budget"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "resumed_is_equal_to_the_bit": one.keys() == two.keys()
        and all(torch.equal(value, two[key]) for key, value in one.items()),
    }


def exported() -> dict[str, Any]:
    """Every export, with what its record says."""
    found = {}
    for name, (format, *more) in EXPORTS.items():
        out = WORK / name
        shutil.rmtree(out, ignore_errors=True)
        _, seconds = drlora_cli("export", str(RUN), "--format", format, "-o", str(out), *more)
        record = json.loads((out / "drlora_export.json").read_text())
        kept = ("logits", "rounding", "notes", "rank", "weight_bytes", "dtype")
        found[name] = {"seconds": seconds, **{key: record[key] for key in kept}}
    return found


def copy_in_float32() -> None:
    """The same adapter on the same base, computed in float32: what rounding is compared with."""
    copy = WORK / "run-float32"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(RUN, copy, ignore=shutil.ignore_patterns("checkpoints"))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("dtype: auto", "dtype: float32"))


def evaluated() -> dict[str, Any]:
    """Held-out loss of the run and of every export, as `drlora eval` gives it."""
    copy_in_float32()
    found = {}
    for name in ("run", "run-float32", *EXPORTS):
        text, seconds = drlora_cli("eval", str(WORK / name), "--json")
        values = json.loads(text)
        kept = ("model", "adapter", "dtype", "notes")
        found[name] = {"loss": values["loss"], "seconds": seconds} | {k: values[k] for k in kept}
        found[name]["model"] = os.path.relpath(found[name]["model"])
    return found


def _dropped_expert(piece: Any, name: str) -> Any:
    if name != f"model.layers.{LAYER}.mlp.experts":
        return piece
    b_RO = piece.b_RO.clone()
    b_RO[piece.offsets[EXPERT] : piece.offsets[EXPERT + 1]] = 0
    return piece._replace(b_RO=b_RO)


MERGES: dict[str, Callable[[Any, str], Any]] = {
    "a dropped expert": _dropped_expert,
    "dropped down projections": lambda piece, _: None if piece.matrix == "down" else piece,
    "the scale twice": lambda piece, _: piece._replace(scaling=2 * piece.scaling),
    "nothing merged": lambda *_: None,
}


CASES = [
    *(("peft", "nearest", defect) for defect in list(MERGES)[:3]),
    ("per-expert", "nearest", "a dropped expert"),
    ("merged", "nearest", "a dropped expert"),
    ("merged", "nearest", "nothing merged"),
    *(("merged", "stochastic", defect) for defect in MERGES),
]


@contextmanager
def broken_merge(defect: str) -> Iterator[None]:
    """Merges go through a function with the defect."""
    add = drlora.adapter.layer.add_update

    def broken(base: Any, piece: Any, rounding: Any, name: str) -> None:
        left = MERGES[defect](piece, name)
        if left is not None:
            add(base, left, rounding, name)

    with mock.patch.object(drlora.adapter.layer, "add_update", broken):
        yield


def _changed(updates: Any, defect: str) -> Any:
    experts = {}
    for name, factors in updates.experts.items():
        b = list(factors.b)
        is_down = name.endswith("down_proj")
        if defect == "a dropped expert" and name.startswith(f"model.layers.{LAYER}.") and is_down:
            b[EXPERT] = torch.zeros_like(b[EXPERT])
        elif defect == "dropped down projections" and is_down:
            b = [torch.zeros_like(b_Or) for b_Or in b]
        elif defect == "the scale twice":
            b = [2 * b_Or for b_Or in b]
        experts[name] = dataclasses.replace(factors, b=tuple(b))
    return dataclasses.replace(updates, experts=experts)


@contextmanager
def broken_lora(defect: str) -> Iterator[None]:
    """Exports as LoRA are made from factors with the defect."""
    attach, read_back = peft_lora.attach, per_expert.read_back
    with (
        mock.patch.object(peft_lora, "attach", lambda b, u: attach(b, _changed(u, defect))),
        mock.patch.object(per_expert, "read_back", lambda b, u: read_back(b, _changed(u, defect))),
    ):
        yield


def defects() -> list[dict[str, Any]]:
    """What the check of an export says to each defect."""
    found = []
    for format, rounding, defect in CASES:
        said = None
        with (broken_merge if format == "merged" else broken_lora)(defect):
            try:
                export_adapter(RUN, format, WORK / "broken", rounding=rounding)
            except CheckpointError as error:
                said = str(error)
        shutil.rmtree(WORK / "broken", ignore_errors=True)
        case = {"format": format, "defect": defect, "refused": said is not None, "said": said}
        found.append(case | ({"rounding": rounding} if format == "merged" else {}))
        print(f"{format}, {defect}: {'refused' if said else 'ACCEPTED'}", flush=True)
    return found


def main() -> None:
    """Run every part, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    out = parser.parse_args().out
    started = time.monotonic()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seed": 42,
    }
    parts = {
        "training": trained_and_resumed,
        "exports": exported,
        "evaluations": evaluated,
        "defects": defects,
    }
    for name, part in parts.items():
        found[name] = part()
        found |= {**peak_memory(), "seconds": round(time.monotonic() - started)}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: done", flush=True)
    accepted = [case for case in found["defects"] if not case["refused"]]
    if accepted or not found["training"]["resumed_is_equal_to_the_bit"]:
        raise SystemExit(f"see {out}: a defect was accepted, or the resumed run differs")
    print(f"all is as it must be; written to {out}")


if __name__ == "__main__":
    main()
