"""`drlora report`: what it reads, that nothing in a run breaks out of the page, every format."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import shutil
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_run import make_run
from peft import get_peft_model
from tiny import make_model

import drlora
from drlora.cli.main import main
from drlora.errors import CheckpointError
from drlora.report.encode import SIGNAL_BYTES, encode_runs, quantise
from drlora.report.facts import SUMMARY
from drlora.report.markdown import markdown
from drlora.report.page import page
from drlora.report.read import SIGNALS, read_run
from drlora.report.write import distinct_names, write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028|`'\""
LARGEST_BYTES = 3_000_000
KEPT = Path(__file__).parents[2] / "docs" / "runs" / "embedded"
TYPES = {"i2": "<i2", "i4": "<i4", "u1": "<u1", "u2": "<u2"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "made", layers=3, experts=6, events=4)


def decoded(column: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(column["data"]), TYPES[column["type"]])


def edited(run: Path, folder: Path, name: str, change) -> Path:
    """A copy of a run with `change(entries)` made to one of its logs."""
    shutil.copytree(run, folder)
    entries = [json.loads(line) for line in (run / name).read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(e) + "\n" for e in change(entries)))
    return folder


def test_ranks_over_time_are_those_of_the_logs(run):
    (found,) = read_run(run).maps
    result = json.loads((run / "result.json").read_text())
    assert found.final() == [ranks["gate_up"] for ranks in result["ranks"].values()]
    assert (found.history[0] == 8).all()
    assert found.events == (20, 40, 60, 80)
    for line in (run / "events.jsonl").read_text().splitlines():
        entry = json.loads(line)
        block = found.blocks.index(entry["block"])
        event = sum(step < entry["step"] for step in found.events)
        assert found.history[event, block].tolist() == entry["ranks"]
        row = found.known_at.index(entry["step"])
        for name in SIGNALS:
            assert found.signals[name][row, block].tolist() == entry[name]


@pytest.mark.parametrize("missing", ["events.jsonl", "result.json", "metrics.jsonl"])
def test_runs_with_fewer_files_are_read(run, tmp_path, missing):
    """Runs from before events.jsonl, and runs that are under way."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / missing).unlink()
    found, whole = read_run(folder), read_run(run)
    assert np.array_equal(found.maps[0].history, whole.maps[0].history)
    assert "<html" in page([found])
    assert "made.jsonl" in markdown([found])


@pytest.mark.parametrize(
    ("spent", "stored", "said"),
    [
        (96, 96, "96 of 96"),
        (96, 192, "96 of 96 (room for 192)"),  # budget_scope: model
        (70, 192, "70 of 96 (room for 192)"),
        (120, 120, "120 of 120"),  # the factors are those of the first block
    ],
)
def test_a_budget_that_layers_share_is_less_than_there_is_room_for(
    run, tmp_path, spent, stored, said
):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    factors = {"r_target": 4, "experts": 6, "layers": 2, "projections": 2}
    result = {
        **json.loads(path.read_text()),
        "budget": {"spent": spent, "stored": stored, **factors},
    }
    path.write_text(json.dumps(result))
    assert SUMMARY["Ranks spent"](read_run(tmp_path / "run")) == said


def test_the_kept_run_is_read():
    found = read_run(KEPT)
    assert found.maps[0].final()[0] == found.result["ranks"]["model.layers.0.mlp"]["down"]
    assert (found.maps[0].history[0] == 8).all()


def test_ranks_of_single_projections_and_blocks_of_different_size(run, tmp_path):
    def apart(entries):
        for entry in entries:
            for projection in ("gate_up", "down"):
                yield {**entry, "projection": projection}

    folder = edited(run, tmp_path / "run", "growth.jsonl", apart)
    (folder / "events.jsonl").unlink()
    result = json.loads((folder / "result.json").read_text())
    small = {"gate_up": [8, 9], "down": [8, 8]}
    result["ranks"]["model.layers.9.mlp"] = small
    (folder / "result.json").write_text(json.dumps(result))
    found = read_run(folder)
    assert [m.projection for m in found.maps] == ["gate_up", "down"]
    assert found.maps[0].experts == (6, 6, 6, 2)
    assert found.maps[0].final()[3] == [8, 9]
    assert (found.maps[0].history[:, 3, 2:] == -1).all()
    payload = json.loads(encode_runs([found]))["runs"][0]["maps"]
    assert [m["experts"] for m in payload] == [[6, 6, 6, 2]] * 2


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("growth.jsonl", lambda es: [{**es[0], "expert": 6}], "6 experts, but 6 grew"),
        ("growth.jsonl", lambda es: [{**es[0], "block": "elsewhere"}], "elsewhere"),
        ("events.jsonl", lambda es: [{**e, "routing": [1.0] * 9} for e in es], "do not fit"),
        ("events.jsonl", lambda es: [{**e, "ranks": "x"} for e in es], "do not fit"),
    ],
)
def test_logs_that_do_not_fit_are_refused(run, tmp_path, name, change, said):
    with pytest.raises(CheckpointError, match=said):
        read_run(edited(run, tmp_path / "run", name, change))


def test_quantised_values_are_near(run):
    values = np.array([0.0, 1e-8, 3e-5, 0.2, np.nan])
    for bits, error in ((16, 1.003), (8, 1.08)):
        column = quantise(values, bits)
        code, top = decoded(column).astype(float), 2**bits - 1
        assert code[0] == 0 and code[-1] == top
        unit = np.log(column["high"] / column["low"]) / (top - 2)
        back = column["low"] * np.exp(unit * (code[1:4] - 1))
        assert np.all(np.abs(np.log(back / values[1:4])) < np.log(error))


def test_the_page_holds_ranks_and_grants_exactly(run):
    record = read_run(run)
    (found,) = json.loads(encode_runs([record]))["runs"]
    (rank_map,) = found["maps"]
    grants = {key: decoded(rank_map["grants"][key]) for key in ("event", "cell", "granted")}
    ranks = decoded(rank_map["start"]).astype(int).copy()
    np.add.at(ranks, grants["cell"], grants["granted"])
    assert ranks.reshape(3, 6).tolist() == record.maps[0].final()
    assert grants["event"].min() == 1 and grants["event"].max() == 4
    assert found["held_out"] == [[0, 4.0], [100, 1.5]]
    assert found["log"]["loss"][0] == pytest.approx(record.logs[0]["loss"], rel=1e-5)
    assert found["epochs_per_step"] == 1 / 40 and found["diverged_at"] is None


def test_the_step_at_which_a_run_diverged_is_in_the_page(run, tmp_path):
    def lost(entries):
        return [
            e | {"loss": None} if e["step"] >= 30 and e["kind"] == "log" else e for e in entries
        ]

    early = edited(run, tmp_path / "early", "metrics.jsonl", lost)
    late = edited(run, tmp_path / "late", "metrics.jsonl", lambda entries: entries)
    result = json.loads((late / "result.json").read_text())
    result["diverged"] = ["the held-out loss rose from 4 to 5"]
    (late / "result.json").write_text(json.dumps(result))
    runs = json.loads(encode_runs([read_run(early), read_run(late)]))["runs"]
    assert [one["diverged_at"] for one in runs] == [30, result["steps"]]


class Tags(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def test_nothing_breaks_out_of_the_page(run, tmp_path):
    """Names of the model, the data, blocks, projections and the folder are text, wherever shown."""

    def renamed(entries):
        return ({**e, "block": HOSTILE + e["block"], "projection": HOSTILE} for e in entries)

    folder = edited(run, tmp_path / "<b onclick=alert(3)>&amp;", "events.jsonl", renamed)
    entries = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(entry) + "\n" for entry in renamed(entries))
    (folder / "growth.jsonl").write_text(text)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe |= {"model": HOSTILE, "data": {"train": HOSTILE}, HOSTILE: HOSTILE}
    recipe["adapter"]["saliency"] = HOSTILE
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    record = read_run(folder)
    harmless, hostile = Tags(page([read_run(run)])), Tags(page([record]))
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in harmless.tags}
    assert len(hostile.scripts) == 3
    assert hostile.scripts[1:] == harmless.scripts[1:]
    assert not any(name.startswith("on") for _, attrs in hostile.tags for name in attrs)
    assert not any(tag == "img" for tag, _ in hostile.tags)
    data = json.loads(hostile.scripts[0])
    assert data["runs"][0]["maps"][0]["blocks"][0].startswith(HOSTILE)
    assert not re.search("[<>&\u2028]", hostile.scripts[0])
    lines = markdown([record])
    assert "<script>" not in lines and "\u2028" not in lines


def test_the_page_asks_nothing_of_a_network(run):
    text = page([read_run(run)])
    tags = Tags(text).tags
    assert not any("src" in attrs or tag in ("link", "iframe") for tag, attrs in tags)
    policy = next(a["content"] for _, a in tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    assert len(text.encode()) < LARGEST_BYTES


def test_a_large_run_stays_small(tmp_path):
    """48 layers x 128 experts take less than 3 MB however many events there are."""
    found = read_run(make_run(tmp_path / "large", layers=48, experts=128, events=6))
    many = found.maps[0]
    signals = {name: np.repeat(array, 30, axis=0) for name, array in many.signals.items()}
    known_at = tuple(range(1, 1 + len(signals["routing"])))
    large = type(found)(
        **{**vars(found), "maps": (type(many)(
            **{**vars(many), "signals": signals, "known_at": known_at}
        ),)}
    )  # fmt: skip
    (rank_map,) = json.loads(encode_runs([large]))["runs"][0]["maps"]
    sizes = [decoded(column).nbytes for column in rank_map["signals"].values()]
    assert 0.8 * SIGNAL_BYTES < sum(sizes) <= SIGNAL_BYTES
    kept = rank_map["known_at"]
    assert (kept[0], kept[-1]) == (known_at[0], known_at[-1])
    assert len(page([large]).encode()) < LARGEST_BYTES


def test_every_format(run, tmp_path, capsys):
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(run / "report.html")}
    other = make_run(tmp_path / "other", layers=3, experts=6, events=2, seed=1)
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("md", b"# 2 DR-LoRA runs")):
        path = tmp_path / f"two.{ending}"
        assert main(["report", str(run), str(other), "-o", str(path)]) == 0
        assert path.read_bytes().startswith(start)
    again = tmp_path / "again.svg"
    assert main(["report", str(run), str(other), "-o", str(again)]) == 0
    assert again.read_bytes() == (tmp_path / "two.svg").read_bytes()
    text = (tmp_path / "two.md").read_text()
    assert "| | made | other |" in text
    assert "| Held-out loss after | 1.5000 | 1.5000 |" in text
    assert not list(tmp_path.glob("*.tmp"))


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    paths = [Path("/a/seed1/run"), Path("/a/seed2/run"), Path("/a/seed1/run"), Path("/b")]
    assert distinct_names(paths) == ["seed1/run", "seed2/run", "seed1/run (3)", "b"]
    assert distinct_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    twin = make_run(tmp_path / "twin" / "made", layers=3, experts=6, events=2)
    text = write_report([run, twin], tmp_path / "two.md").read_text()
    assert f"| | {run.parent.name} made | twin made |" in text.replace("/", " ").replace("\\", "")


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text('{"r_init": 1}')
    assert main(["report", str(tmp_path)]) == 2
    assert "does not tell the ranks of its experts" in capsys.readouterr().err


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_run_before_its_first_event_is_reported_as_such(run, has_checkpoint, tmp_path):
    """In every format, alone and beside a finished run; with the ranks of a checkpoint, if any."""
    folder = tmp_path / "young"
    folder.mkdir()
    shutil.copy(run / "config.yaml", folder)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    if has_checkpoint:
        settings = dict(r_init=2, r_target=3, r_max=6, p_grow=0.5)
        model = get_peft_model(make_model(), drlora.DrLoraConfig(**settings))
        model.save_pretrained(folder / "checkpoint-5")
    text = write_report([folder], tmp_path / "one.md").read_text()
    assert "There was no growth event yet." in text
    assert ("Every expert has rank 2." in text) == has_checkpoint
    assert ("| MoE blocks | 2 blocks of 6 experts |" in text) == has_checkpoint
    html = write_report([folder], tmp_path / "one.html").read_text()
    assert "There was no growth event yet." in html
    assert ("Charts follow" in html) == (not has_checkpoint)
    for name in ("one.svg", "two.md", "two.html", "two.png"):
        both = [folder, run] if name.startswith("two") else [folder]
        assert write_report(both, tmp_path / name).stat().st_size > 100
    assert "no growth event" not in write_report([run], tmp_path / "over.md").read_text()


def test_in_a_browser(run, tmp_path):
    """What tools/check_report.py checks, in one view; axe-core is not at hand here."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    source = Path(__file__).parents[2] / "tools" / "check_report.py"
    spec = importlib.util.spec_from_file_location("check_report", source)
    assert spec is not None and spec.loader is not None
    check_report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_report)
    path = tmp_path / "report.html"
    path.write_text(page([read_run(run)]), "utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        check_report.check(browser, path, 390, "dark", Namespace(images=None, axe=None))
