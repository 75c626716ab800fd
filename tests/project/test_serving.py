"""docs/serving.md and the rules of engines say what `make engines` found.

Run: make test ARGS=tests/project/test_serving.py
"""

import json
import sys
from pathlib import Path

import pytest

from drlora.export.engines import ENGINES, Facts, readings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_serving  # noqa: E402

FOUND = json.loads(make_serving.RESULTS.read_text("utf-8"))
ROWS = [
    row for row in FOUND["rows"] if row["format"] != "base" and row["outcome"] != "no such export"
]


def facts_of(row):
    """What is known of the export of a row."""
    family, _, routers = row["case"].partition("-")
    has_routers = bool(routers) or row["case"] == "embedded"
    family = "olmoe" if family == "embedded" else family
    is_lora = row["format"] in ("per-expert", "mlx")
    return Facts(
        row["format"],
        family,
        rank=16,
        has_modules=has_routers and row["format"] == "peft",
        has_router_lora=has_routers and is_lora,
        # PEFT has no names for these two's experts of a folder.
        peft_loads=row["format"] != "per-expert" or family != "qwen2_moe",
    )


def test_the_tables_are_those_of_the_results():
    text = make_serving.PAGE.read_text("utf-8")
    assert make_serving.with_tables(text) == text
    changed = text.replace("llama.cpp 11434", "llama.cpp 11435")
    assert make_serving.with_tables(changed) == text


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['engine']}-{r['case']}-{r['format']}")
def test_the_rules_say_what_was_found(row):
    """What is told before an export is written, in its README and by verify."""
    known = {reading.engine: reading for reading in readings(facts_of(row))}
    reading = known[row["engine"]]
    if reading.reads is not None:
        assert reading.reads == (row["outcome"] == "equal"), (reading, row)


def test_nothing_is_claimed_that_was_not_compared():
    """An adapter that does nothing would be noticed; versions are those of the rules."""
    versions = {name: version for name, version, *_ in ENGINES}
    for row in ROWS:
        if row["outcome"] == "equal" and "effect" in row:
            assert row["effect"] > 100 * FOUND["tolerance"], row
            if "positions" in row:
                assert row["argmax_equal"] == row["positions"] > 100
    for engine, said in FOUND["engines"].items():
        if said["installed"]:
            own = said["versions"][make_serving.PACKAGES[engine]]
            assert own.split(".0.0")[0] in versions[engine], (engine, own)
