"""Broken and hostile files, and settings at random: each loads, or ends in an error of drlora's.

    python -m benchmarks.fuzz --files 2000 --settings 2000      writes results/fuzz.json

Each case is made from the seed and its number alone. It runs in a process of its own kind, which is
started again where it dies. A case fails with an exception that is none of drlora.errors, when it
takes more than `SECONDS`, or more memory than twice the file and `SLACK_BYTES`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.fuzz_targets import TARGETS, make_settings, make_world, read_settings_case
from benchmarks.harness import RESULTS
from benchmarks.mutate import mutate
from drlora.errors import DrLoraError
from drlora.runs.environment import source_state

SECONDS = 30
LONGEST_SILENCE_SECONDS = 300  # of a process that also has to start
SLACK_BYTES = 48 << 20  # caches of libraries, what the allocator keeps, a model of its own
SETTINGS = "settings"
RESULT = RESULTS / "fuzz.json"


class Hang(BaseException):
    """A case takes too long."""


def _stop(*_: Any) -> None:
    raise Hang


def run_case(world: Path, name: str, seed: int, number: int) -> dict[str, Any]:
    """One case: what became of it."""
    rng = random.Random(f"{seed} {name} {number}")
    case: dict[str, Any] = {"target": name, "number": number}
    with tempfile.TemporaryDirectory(dir=world) as scratch:
        folder, size = Path(scratch), 0
        if name == SETTINGS:
            tree = make_settings(rng)
        else:
            target = TARGETS[name]
            shutil.copytree(world / target.folder, folder / "files", symlinks=True)
            file = folder / "files" / rng.choice(target.files)
            broken, case["mutation"] = mutate(rng, file.name, file.read_bytes())
            file.write_bytes(broken)
            case["file"], size = file.name, len(broken)
        before = _resident_bytes(reset=True)
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with _quiet():
                if name == SETTINGS:
                    read_settings_case(tree, folder)
                else:
                    target.read(world, folder / "files")
            case["outcome"] = "loaded"
        except DrLoraError as error:
            case["outcome"] = type(error).__name__
            if not str(error).strip():
                case |= {"outcome": "no message", "is_fault": True}
        except (Exception, Hang) as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            tail = "".join(traceback.format_exception(error)[-3:])[-1500:]
            case |= {"outcome": type(error).__name__, "is_fault": True, "trace": tail}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        case["seconds"] = round(time.monotonic() - started, 3)
        case["grown_bytes"] = max(0, _resident_bytes() - before)
        if case["grown_bytes"] > 2 * size + SLACK_BYTES:
            case |= {"outcome": "too much memory", "is_fault": True, "size": size}
    return case


def _resident_bytes(reset: bool = False) -> int:
    """The most memory this process has held since the last reset; 0 where Linux is not there."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def numbered(names: list[str], files: int, settings: int) -> list[tuple[str, int]]:
    """(target, number) of every case; files are shared out evenly."""
    targets = [name for name in names if name != SETTINGS]
    cases = [(targets[i % len(targets)], i // len(targets)) for i in range(files if targets else 0)]
    return cases + [(SETTINGS, i) for i in range(settings if SETTINGS in names else 0)]


def _work(world: Path, seed: int, cases: list[tuple[str, int]], log: Path) -> None:
    """Run cases in this process, a line of `log` each."""
    signal.signal(signal.SIGALRM, _stop)
    used = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), used + (4 << 30)))
    with log.open("a", encoding="utf-8") as file:
        for name, number in cases:
            file.write(json.dumps(run_case(world, name, seed, number)) + "\n")
            file.flush()


def run_all(seed: int, cases: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """All cases in child processes; one that kills its process is a fault, and the rest goes on."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        world, log = Path(scratch) / "world", Path(scratch) / "log.jsonl"
        todo = Path(scratch) / "todo.json"
        make_world(world)
        while len(found) < len(cases):
            todo.write_text(json.dumps(cases[len(found) :]))
            log.write_text("")
            command = [sys.executable, "-m", __spec__.name, "--child", str(world), str(todo)]
            died = _wait(subprocess.Popen([*command, str(log), "--seed", str(seed)]), log)
            found += [json.loads(line) for line in log.read_text().splitlines()]
            if len(found) < len(cases):
                name, number = cases[len(found)]
                found.append(
                    {"target": name, "number": number, "outcome": died, "is_fault": True,
                     "seconds": 0.0, "grown_bytes": 0}
                )  # fmt: skip
    return found


def _wait(child: subprocess.Popen, log: Path) -> str:
    """How the child ended; one that hangs where no signal reaches it is killed."""
    while True:
        try:
            return f"process ended with {child.wait(timeout=SECONDS)}"
        except subprocess.TimeoutExpired:
            if time.time() - log.stat().st_mtime > LONGEST_SILENCE_SECONDS:
                child.kill()
                child.wait()
                return "hang"


def summary(seed: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, figures and faults."""
    outcomes: dict[str, Counter] = {}
    for case in found:
        outcomes.setdefault(case["target"], Counter())[case["outcome"]] += 1
    packages = ("torch", "transformers", "peft", "datasets", "pyarrow", "safetensors", "PyYAML")
    return {
        "seed": seed,
        "mutated_files": sum(case["target"] != SETTINGS for case in found),
        "generated_settings": sum(case["target"] == SETTINGS for case in found),
        "faults": sum(bool(case.get("is_fault")) for case in found),
        "outcomes": {name: dict(sorted(counts.items())) for name, counts in outcomes.items()},
        "mutations": dict(Counter(c["mutation"] for c in found if "mutation" in c).most_common()),
        "longest_case_seconds": max(case["seconds"] for case in found),
        "most_memory_grown_bytes": max(case["grown_bytes"] for case in found),
        "limits": {"seconds": SECONDS, "bytes": f"2 * file + {SLACK_BYTES}"},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "source": asdict(source_state()),
        "date": time.strftime("%Y-%m-%d"),
        "fault_list": [case for case in found if case.get("is_fault")],
    }


def main(argv: list[str] | None = None) -> int:
    """Run and write the result; exit code 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--settings", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--only", nargs="*", choices=[*TARGETS, SETTINGS])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if arguments.child:
        world, todo, log = arguments.child
        _work(world, arguments.seed, json.loads(todo.read_text()), log)
        return 0
    names = arguments.only or [*TARGETS, SETTINGS]
    found = run_all(arguments.seed, numbered(names, arguments.files, arguments.settings))
    result = summary(arguments.seed, found)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "fault_list"}, indent=1))
    for case in result["fault_list"]:
        print(case["target"], case["number"], case.get("file"), case["outcome"])
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
