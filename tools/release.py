"""Build the wheel and the source archive, and try both as a new user would.

    python tools/release.py [--out dist] [--try pip|uv|none ...] [--index URL]
    python tools/release.py --whole --record FILE

Each way of installing gets an environment of its own, outside of the repository: every package
comes from the index, drlora from the file that was just built. There, away from the sources, the
first commands of the README are run, the embedded recipe for a few steps, with --whole as it is.
--record appends to a file of JSON lines what each step took. Nothing is published: that is one
`twine upload dist/*` by somebody who may.

Needs `pip install build twine hatchling uv`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
LARGEST_BYTES = 20_000_000
WANTED = (
    "drlora/py.typed",
    "drlora/embedded/olmoe-tiny/model.safetensors",
    "drlora/recipes/embedded.yaml",
    "drlora/report/report.js",
)
# What a new user does first, in a folder without the repository; a few steps show that it runs.
SHORT = ["training.max_steps=4", "adapter.grow_every=auto", "adapter.settle_steps=auto",
         "training.warmup_steps=1", "training.save_steps=4",
         "evaluation.exact_match_examples=8"]  # fmt: skip
EMBEDDED = ["train", "embedded", "output_dir=run"]
TRIED = (
    ["--version"],
    ["--help"],
    ["env"],
    ["doctor"],
    ["init", "--list"],
    EMBEDDED,
    ["generate", "run", "--prompts", "prompts.txt", "max_new_tokens=4"],
    ["init", "model=embedded", "data.train=own.jsonl", "-o", "other.yaml"],
    ["plan", "embedded", "own.jsonl", "-o", "mine.yaml"],
    ["data", "mine.yaml"],
    ["train", "mine.yaml"],
    ["chat", "runs/mine", "max_new_tokens=4"],
    ["eval", "runs/mine"],
    ["export", "runs/mine", "--format", "per-expert", "-o", "out"],
    ["report", "run", "runs/mine", "-o", "report.html"],
)
T = TypeVar("T")
SAID = "seven plus two is\n/exit\n"


@dataclass(frozen=True)
class Taken:
    """What a command took: by the clock, and of processors."""

    name: str
    seconds: float
    cpu_seconds: float


def build(out: Path) -> list[Path]:
    """The two files, checked by twine and for what must be in them."""
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    files = sorted(out.iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    for file in files:
        names = contents(file)
        missing = [wanted for wanted in WANTED if not any(n.endswith(wanted) for n in names)]
        strays = [n for n in names if "__pycache__" in n or n.endswith((".pyc", ".pt", ".bin"))]
        if missing or strays or file.stat().st_size > LARGEST_BYTES:
            raise SystemExit(f"{file.name}: missing {missing}, strays {strays}, or too large")
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, {len(names)} files", flush=True)
    return files


def contents(file: Path) -> list[str]:
    """Names of the files inside."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    with tarfile.open(file) as archive:
        return archive.getnames()


def install(by: str, file: Path, folder: Path, torch: str, index: list[str]) -> Path:
    """An environment with it; returns its folder of programs."""
    place = folder / f"env-{by}"
    run(sys.executable, "-m", "venv", place)
    programs = place / "bin"
    pip: list[object] = [programs / "python", "-m", "pip", "install", "--quiet", *index]
    if by == "uv":
        pip = ["uv", "pip", "install", "--quiet", "--python", programs / "python", *index]
    # torch first, as the machine has it: a plain install takes gigabytes of CUDA.
    run(*pip, torch)
    run(*pip, file)
    return programs


def try_it(programs: Path, folder: Path, whole: bool) -> list[Taken]:
    """The first commands, away from the repository."""
    place = folder / f"work-{programs.parent.name}"
    place.mkdir()
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"{a} plus {b} is", "completion": f" {i + j}"}
        for i, a in enumerate(names, 1)
        for j, b in enumerate(names, 1)
    ]
    random.Random(0).shuffle(rows)
    (place / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (place / "prompts.txt").write_text("A dog is a\n", "utf-8")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    taken = []
    for arguments in TRIED:
        more = [] if whole or arguments is not EMBEDDED else SHORT
        words = ["drlora", *arguments]
        _, one = timed(" ".join(words), run, programs / words[0], *arguments, *more, cwd=place,
                       env=clean, quiet=True)  # fmt: skip
        print(f"  {one.seconds:6.1f} s  {one.name}", flush=True)
        taken.append(one)
    return taken


def timed(name: str, does: Callable[..., T], *words: Any, **settings: Any) -> tuple[T, Taken]:
    """What a call of `does` returns, and what the processes that it started took."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = does(*words, **settings)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found, Taken(name, round(time.monotonic() - start, 1), round(cpu, 1))


def record(file: Path, by: str, taken: list[Taken], whole: bool, busy: bool) -> None:
    """A line more of what was tried, with what it took."""
    version = (ROOT / "src/drlora/version.py").read_text("utf-8").split('"')[-2]
    row = {
        "installed_by": by,
        "whole": whole,
        "beside_other_work": busy,
        "taken": [asdict(one) for one in taken],
        "drlora": version,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None,
        quiet: bool = False) -> None:  # fmt: skip
    """One command, which must end well."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=env, capture_output=quiet, input=SAID, text=True, errors="replace"
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout or ''}"
                         f"\n{done.stderr or ''}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--try", dest="ways", nargs="*", default=["pip", "uv"],
                        choices=["pip", "uv", "none"])  # fmt: skip
    parser.add_argument("--torch", help="what is installed for torch; default: the pinned one")
    parser.add_argument("--index", action="append", default=[], help="further options of pip")
    parser.add_argument("--whole", action="store_true", help="train the embedded recipe as it is")
    parser.add_argument("--record", type=Path, help="append what it took to this file")
    parser.add_argument("--beside", action="store_true", help="say that the machine was busy")
    options = parser.parse_args()
    files = build(options.out)
    pinned = (ROOT / "requirements/torch.txt").read_text("utf-8").splitlines()
    torch = options.torch or next(line for line in pinned if line.startswith("torch"))
    with tempfile.TemporaryDirectory() as temporary:
        for by, file in zip(options.ways, reversed(files), strict=False):
            if by != "none":
                # pip gets the source archive, uv the wheel: both are tried.
                programs, installed = timed("install torch and drlora", install, by, file,
                                            Path(temporary), torch, options.index)  # fmt: skip
                print(f"{by} of {file.name}: installed in {installed.seconds:.0f} s", flush=True)
                taken = [installed, *try_it(programs, Path(temporary), options.whole)]
                if options.record:
                    record(options.record, by, taken, options.whole, options.beside)


if __name__ == "__main__":
    main()
