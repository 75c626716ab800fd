"""docs/evidence.md and docs/planning.md state what the result files say.

Run: pytest tests/project/test_evidence.py
"""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_evidence  # noqa: E402
import make_planning  # noqa: E402

BLOCKS = {
    found["plan"]: found
    for found in make_evidence.BLOCK.finditer(make_evidence.PAGE.read_text("utf-8"))
}


@pytest.mark.parametrize("plan", BLOCKS)
def test_the_tables_are_those_of_the_results(plan, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert make_evidence.tables(BLOCKS[plan]) == BLOCKS[plan]["tables"]


def test_a_number_that_the_results_do_not_have_is_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = make_evidence.PAGE.read_text("utf-8")
    changed = text.replace("+9.20", "+9.30")
    assert changed != text and make_evidence.with_tables(changed) == text


@pytest.mark.parametrize("name", make_evidence.FIGURES)
def test_the_figures_are_those_of_the_comparisons(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    make_evidence.draw(name, tmp_path)
    assert (tmp_path / name).read_bytes() == (make_evidence.IMAGES / name).read_bytes()
    assert f"images/{name}" in make_evidence.PAGE.read_text("utf-8")


def test_the_tables_of_planning_are_those_of_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = make_planning.PAGE.read_text("utf-8")
    assert len(make_planning.BLOCK.findall(text)) == len(make_planning.TABLES)
    assert make_planning.remake(text) == text


def test_concentration_and_rank_correlation_by_hand():
    sys.path.insert(0, str(ROOT / "experiments"))
    from concentration import concentration, spearman

    assert concentration([0.25] * 4) == pytest.approx(0)
    assert concentration([3.0, 0, 0, 0]) == pytest.approx(0.75)
    assert concentration([1, 1, 0, 0]) == pytest.approx(0.5)
    values = np.array([1.0, 2.0, 4.0, 8.0])
    assert spearman(values, values**3) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert spearman(values, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.8944, abs=1e-4)
