"""Runs that are killed again and again: `python tests/kills.py [--kills 300]`.

Small runs, of a plain loop, the Trainer and `drlora train`, get SIGKILL at random moments, while
they write a checkpoint or the final adapter, and between a growth event and the next checkpoint.
Each is started again until it ends, and must then have left, to the bit, the files that a run never
killed leaves. After every kill all that is in the run directory must be readable. Writes
benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model, plain_loop, trainable
from tiny_run import save_examples, save_model_folder, save_recipe
from transformers import Trainer, TrainingArguments

import drlora
from drlora.io.checkpoint import checkpoint_step
from drlora.io.jsonl import read_lines
from drlora.io.writing import write_at_once
from drlora.runs.environment import source_state, versions
from drlora.runs.recipe import load_recipe
from drlora.runs.rundir import RunDir
from drlora.runs.train import train
from drlora.trainer.callback import DrLoraCallback

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "kills.json"
TOTAL, EVERY = 12, 3  # steps, and steps between checkpoints; ranks grow after 4, 6, 8 and 10
ADAPTER = dict(r_init=1, r_target=3, r_max=8, p_grow=0.5, grow_every=2, warmup_steps=2,
               settle_steps=2, lora_dropout=0.1)  # fmt: skip
KILLS_A_RUN = 6
WEIGHTS = "adapter_model.safetensors"


def plain(folder: Path, tell: Connection) -> None:
    """A loop of one's own, as docs/training.md shows it, continued where it can be."""
    newest = drlora.newest_checkpoint(folder, on_skip=lambda reason: None)
    torch.manual_seed(0)
    base = make_model(num_hidden_layers=1)
    if newest is None:
        model = get_peft_model(base, drlora.DrLoraConfig(**ADAPTER))
    else:
        model = PeftModel.from_pretrained(base, newest, is_trainable=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    dynamics = drlora.RankDynamics(model, TOTAL)
    if newest is not None:
        optimizer.load_state_dict(torch.load(newest / "optimizer.pt", weights_only=True))
        dynamics.load_state_dict(load_file(newest / "dynamics.safetensors"))
        torch.set_rng_state(load_file(newest / "rng.safetensors")["cpu"])
    for step in range(dynamics.step, TOTAL):
        plain_loop(model, dynamics, optimizer, range(step, step + 1))
        tell.send(("step", step + 1))
        if (step + 1) % EVERY == 0:
            tell.send(("write", step + 1))
            with drlora.write_checkpoint(folder / f"checkpoint-{step + 1}") as new:
                model.save_pretrained(new)
                torch.save(optimizer.state_dict(), new / "optimizer.pt")
                save_file(dynamics.state_dict(), new / "dynamics.safetensors")
                save_file({"cpu": torch.get_rng_state()}, new / "rng.safetensors")
            tell.send(("written", step + 1))


def trainer(folder: Path, tell: Connection) -> None:
    """transformers' Trainer with the callback, then the final adapter."""
    _tell_of_trainer(tell)
    torch.manual_seed(0)
    model = get_peft_model(make_model(num_hidden_layers=1), drlora.DrLoraConfig(**ADAPTER))
    arguments = TrainingArguments(
        str(folder), max_steps=TOTAL, save_steps=EVERY, per_device_train_batch_size=2,
        learning_rate=1e-2, warmup_steps=2, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=5,
    )  # fmt: skip
    rows = [{k: v[0] for k, v in make_batch(seed, rows=1).items()} for seed in range(24)]
    job = Trainer(model, arguments, train_dataset=Dataset.from_list(rows),
                  callbacks=[DrLoraCallback()])  # fmt: skip
    newest = drlora.newest_checkpoint(folder, on_skip=lambda reason: None)
    if newest is None or checkpoint_step(newest) < TOTAL:
        job.train(resume_from_checkpoint=str(newest) if newest else None)


def command(folder: Path, tell: Connection) -> None:
    """`drlora train`, with `--resume` if there is a run."""
    if RunDir(folder).result.is_file():
        return
    _tell_of_trainer(tell)
    _tell_around(RunDir, "write_adapter", tell, before="write", after="written")
    recipe = load_recipe(folder.parent / "recipe.yaml", [f"output_dir={folder}"])
    train(recipe, resume=RunDir(folder).config.is_file())


KINDS = {"plain": plain, "trainer": trainer, "command": command}
TURNS = ("plain", "trainer", "plain", "trainer", "command")


def _tell_of_growth(tell: Connection) -> None:
    real = drlora.RankDynamics.after_optimizer_step

    def told(dynamics, *args, **kwargs):
        grants = real(dynamics, *args, **kwargs)
        if grants:
            tell.send(("grown", dynamics.run_step))
        return grants

    drlora.RankDynamics.after_optimizer_step = told  # type: ignore[method-assign]


def _tell_of_trainer(tell: Connection) -> None:
    _tell_around(Trainer, "_save_checkpoint", tell, before="write")
    _tell_around(DrLoraCallback, "on_save", tell, after="written")
    _tell_around(DrLoraCallback, "on_step_end", tell, after="step")


def _tell_around(
    owner: type, name: str, tell: Connection, before: str = "", after: str = ""
) -> None:
    real = getattr(owner, name)

    def told(*args, **kwargs):
        step = next((a.global_step for a in args if hasattr(a, "global_step")), None)
        if before:
            tell.send((before, step))
        found = real(*args, **kwargs)
        if after:
            tell.send((after, step))
        return found

    setattr(owner, name, told)


def _child(kind: str, folder: Path, tell: Connection) -> None:
    torch.set_num_threads(1)
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _tell_of_growth(tell)
    tell.send(("begun", 0))
    KINDS[kind](folder, tell)
    if os.environ.get("KILLS_DEBUG"):
        print(kind, "cpu", time.process_time())
    tell.send(("ended", TOTAL))


@dataclass
class Kill:
    """One SIGKILL: of which run, how late in it, and what the run had told last before it."""

    kind: str
    run: int
    during: str
    step: int | None  # unknown where the Trainer or the run directory had begun to write
    seconds: float
    grown: bool  # whether ranks have grown since the last checkpoint that was written
    whole: int | None = None  # step of the newest whole checkpoint after it


@dataclass
class Killer:
    """Starts runs and kills them; `seconds` are how long each kind and its writes take here."""

    folder: Path
    seed: int
    kinds: tuple[str, ...] = TURNS  # in turn
    kills: list[Kill] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    runs: Counter = field(default_factory=Counter)
    wanted: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.context = multiprocessing.get_context("forkserver")
        save_model_folder(self.folder / "model", num_hidden_layers=1)
        save_examples(self.folder / "train.jsonl")
        save_examples(self.folder / "eval.jsonl", count=28, start=24)
        save_recipe(self.folder, adapter=ADAPTER, training={"save_steps": EVERY})
        for kind in dict.fromkeys(self.kinds):
            self.run(kind, self.folder / f"never-killed-{kind}")
            self.wanted[kind] = left_by(self.folder / f"never-killed-{kind}")

    def run(self, kind: str, folder: Path, when: tuple[str, float] | None = None) -> Kill | None:
        """Run to the end, or to a kill.

        Args:
            kind: of run.
            folder: where it is.
            when: ("moment", share of the run), ("write", share of a write), or ("grown", share of
                a write after an event).
        """
        here, there = self.context.Pipe()
        child = self.context.Process(target=_child, args=(kind, folder, there))
        child.start()
        there.close()
        begun = write = time.monotonic()
        last, killed, skip = ("begun", 0), None, self.chance.randrange(4)
        has_grown = False
        try:
            while True:
                if when and when[0] == "moment" and killed is None:
                    due = begun + when[1] * self.seconds[kind]
                    if not here.poll(max(0.0, due - time.monotonic())):
                        killed = self._kill(child, begun)
                        continue
                last = here.recv()
                has_grown = last[0] == "grown" or (has_grown and last[0] != "written")
                if last[0] == "begun":
                    begun = time.monotonic()
                elif last[0] == "grown":
                    if when and when[0] == "grown" and killed is None:
                        if skip <= 0:
                            time.sleep(when[1] * self.seconds[kind, "write"])
                            killed = self._kill(child, begun)
                        skip -= 1
                elif last[0] == "write":
                    write = time.monotonic()
                    if when and when[0] == "write" and killed is None:
                        if skip == 0 and not here.poll(when[1] * self.seconds[kind, "write"]):
                            killed = self._kill(child, begun)
                        skip -= 1
                elif last[0] == "written" and killed is None:
                    self._learn((kind, "write"), time.monotonic() - write)
                elif last[0] == "ended" and killed is None:
                    self._learn(kind, time.monotonic() - begun)
        except EOFError:
            pass
        child.join()
        if child.exitcode == 0:
            return None
        if killed is None or child.exitcode != -9:
            raise RuntimeError(f"{kind} failed by itself:\n{Path(f'{folder}.log').read_text()}")
        during = "write" if last[0] == "write" else "elsewhere"
        return Kill(kind, self.runs[kind], during, last[1], round(killed, 4), has_grown)

    def _kill(self, child: multiprocessing.process.BaseProcess, begun: float) -> float:
        child.kill()
        return time.monotonic() - begun

    def _learn(self, key: object, seconds: float) -> None:
        """Other work on the machine makes runs slower and faster as they go."""
        self.seconds[key] = statistics.fmean([self.seconds.get(key, seconds), seconds])

    def torture(self, kind: str, during: str, kills: int) -> None:
        """One run that is killed up to so many times, and then ends."""
        self.runs[kind] += 1
        folder = self.folder / f"{kind}-{self.runs[kind]}"
        for _ in range(kills):
            kill = self.run(kind, folder, (during, self.chance.random()))
            if kill is None:
                break
            kill.whole = whole_step(kind, folder)
            self.kills.append(kill)
        else:
            self.run(kind, folder)
        if left_by(folder) != self.wanted[kind]:
            self.failures.append(f"{folder.name} is not what a run never killed leaves")
        shutil.rmtree(folder)

    def count(self, during: str | None = None) -> int:
        """Kills so far, of those that fell into a write, elsewhere, or after growth."""
        return sum(during in (None, k.during, k.grown and "grown") for k in self.kills)


def whole_step(kind: str, folder: Path) -> int | None:
    """Read all that a kill has left; the step of the newest whole checkpoint, None without one."""
    run = RunDir(folder)
    if run.config.exists():
        run.read_config()
    for log in (run.metrics, folder / "growth.jsonl"):
        list(read_lines(log))
    if kind == "command" and run.adapter.exists():
        load_file(run.adapter)
    inside = run.checkpoints if kind == "command" else folder
    newest = drlora.newest_checkpoint(inside, on_skip=lambda reason: None)
    if newest is None:
        return None
    load_file(newest / WEIGHTS)
    return int(newest.name.rpartition("-")[2])


def left_by(folder: Path) -> dict[str, str]:
    """What must be equal to the bit: checksums of the final adapter, and of the log of growth."""
    plain_end = folder / f"checkpoint-{TOTAL}"
    if plain_end.is_dir():
        log = folder / "growth.jsonl"
        return {path.name: _sha(path) for path in (plain_end / WEIGHTS, log) if path.exists()}
    assert RunDir(folder).result.is_file() and not list(folder.glob("*.tmp"))
    losses = [e["loss"] for e in read_lines(RunDir(folder).metrics) if "grad_norm" in e]
    return {name: _sha(folder / name) for name in (WEIGHTS, "growth.jsonl")} | {
        "losses": str(losses)
    }


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kill_runs(
    killer: Killer, kills: int, writes: int, after_each: Callable[[], object], grown: int = 0
) -> None:
    """At least so many kills, in turn on all kinds of run.

    Args:
        killer: does it.
        kills: in all.
        writes: of them into writes.
        after_each: called after each run.
        grown: of them between an event and the next checkpoint.
    """
    wanted = {"write": writes, "grown": grown}
    while True:
        left = {during: count - killer.count(during) for during, count in wanted.items()}
        left["moment"] = kills - killer.count()
        during = next((during for during, count in left.items() if count > 0), None)
        if during is None:
            return
        kind = killer.kinds[sum(killer.runs.values()) % len(killer.kinds)]
        killer.torture(kind, during, min(KILLS_A_RUN, left[during]))
        after_each()


def summary(killer: Killer, minutes: float) -> dict:
    """What the result file says, first of all in numbers."""
    return {
        "kills": killer.count(),
        "into_writes": killer.count("write"),
        "by_kind": {k: Counter(x.during for x in killer.kills if x.kind == k) for k in KINDS},
        "runs": dict(killer.runs),
        "after_growth_before_its_checkpoint": killer.count("grown"),
        "ended_otherwise_than_never_killed": killer.failures,
        "seed": killer.seed,
        "steps": TOTAL,
        "checkpoint_every": EVERY,
        "minutes": round(minutes, 1),
        "versions": versions(),
        "source": asdict(source_state()),
        "moments": [asdict(kill) for kill in killer.kills],
    }


def main() -> int:
    """Kill, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--writes", type=int, default=100)
    parser.add_argument("--grown", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--dry", action="store_true", help="write no result")
    options = parser.parse_args()
    started = time.monotonic()
    multiprocessing.set_forkserver_preload(["kills"])  # one import for all runs
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), options.seed)

        def write() -> None:
            found = summary(killer, (time.monotonic() - started) / 60)
            rows = ",\n".join("  " + json.dumps(row) for row in found.pop("moments"))
            text = json.dumps(found, indent=1)[:-2] + ',\n "moments": [\n' + rows + "\n ]\n}\n"
            if not options.dry:
                write_at_once(options.result, text)
            print(f"{killer.count()} kills, {killer.count('write')} into writes", flush=True)

        kill_runs(killer, options.kills, options.writes, write, options.grown)
    return len(killer.failures)


if __name__ == "__main__":
    import kills

    sys.exit(kills.main())
