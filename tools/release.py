"""Build the wheel and the source archive, and try both as a new user would.

    python tools/release.py [--out dist] [--try pip|uv|none ...] [--index URL]

Each way of installing gets an environment of its own, outside of the repository: every package
comes from the index, drlora from the file that was just built. There, away from the sources, the
first commands of the README are run. Nothing is published: that is one `twine upload dist/*` by
somebody who may.

Needs `pip install build twine hatchling uv`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST_BYTES = 20_000_000
WANTED = (
    "drlora/py.typed",
    "drlora/embedded/olmoe-tiny/model.safetensors",
    "drlora/recipes/embedded.yaml",
    "drlora/report/report.js",
)
# What a new user does first, in a folder without the repository; one step is enough to see it run.
SHORT = ["training.max_steps=4", "adapter.grow_every=auto", "adapter.settle_steps=auto",
         "training.warmup_steps=1", "training.save_steps=4", "evaluation.exact_match_examples=8",
         "output_dir=run"]  # fmt: skip
TRIED = (
    ["--version"],
    ["--help"],
    ["env"],
    ["init", "--list"],
    ["init", "model=embedded", "data.train=own.jsonl", "-o", "mine.yaml"],
    ["data", "mine.yaml"],
    ["train", "embedded", *SHORT],
    ["generate", "run", "--prompts", "prompts.txt", "max_new_tokens=4"],
    ["export", "run", "--format", "per-expert", "-o", "out"],
    ["report", "run"],
)


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


def try_it(programs: Path, folder: Path) -> dict[str, float]:
    """The first commands, away from the repository: seconds of each."""
    place = folder / f"work-{programs.parent.name}"
    place.mkdir()
    rows = [{"prompt": f"number {n} is", "completion": f" {n}"} for n in range(40)]
    (place / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (place / "prompts.txt").write_text("A dog is a\n", "utf-8")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    took: dict[str, float] = {}
    for arguments in TRIED:
        start = time.monotonic()
        run(programs / "drlora", *arguments, cwd=place, env=clean, quiet=True)
        took[" ".join(arguments[:2])] = round(time.monotonic() - start, 1)
    return took


def run(*command: object, cwd: Path | None = None, env: dict | None = None,
        quiet: bool = False) -> None:  # fmt: skip
    """One command, which must end well."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=env, capture_output=quiet, text=True, errors="replace"
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
    options = parser.parse_args()
    files = build(options.out)
    pinned = (ROOT / "requirements/torch.txt").read_text("utf-8").splitlines()
    torch = options.torch or next(line for line in pinned if line.startswith("torch"))
    with tempfile.TemporaryDirectory() as temporary:
        for by, file in zip(options.ways, reversed(files), strict=False):
            if by != "none":
                # pip gets the source archive, uv the wheel: both are tried.
                programs = install(by, file, Path(temporary), torch, options.index)
                print(f"{by} of {file.name}: {try_it(programs, Path(temporary))}", flush=True)


if __name__ == "__main__":
    main()
