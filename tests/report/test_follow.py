"""`drlora report --follow`: the page of a run under way, until it is over.

Run: make test ARGS=tests/report/test_follow.py
"""

import json

import pytest
from tiny_run import save_all

from drlora import load_recipe, train
from drlora.cli.main import main
from drlora.errors import ConfigError
from drlora.report import follow
from drlora.report.follow import follow_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("follow")
    path = save_all(folder, training=dict(save_strategy="no"))
    train(load_recipe(path))
    return folder / "run"


def test_the_page_loads_itself_anew_until_the_run_is_over(run, monkeypatch, capsys):
    """The run is taken back to before its end, and ends while it is followed."""
    result = run / "result.json"
    text = result.read_text()
    result.unlink()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        page = (run / "report.html").read_text()
        assert '<meta http-equiv="refresh" content="3">' in page
        if len(waited) == 2:
            result.write_text(text)

    monkeypatch.setattr(follow.time, "sleep", sleep)
    assert main(["report", str(run), "--follow", "--every", "3"]) == 0
    assert waited == [3, 3]
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert 'http-equiv="refresh"' not in page
    assert "Answers of run" in page and "Evenness of the load of experts" in page
    samples = json.loads(text)["after"]["match"]["samples"]
    assert samples and samples[0]["prompt"] in page


def test_what_cannot_be_followed(run):
    with pytest.raises(ConfigError, match="at least 1"):
        next(follow_report([run], seconds=0))
    assert main(["report", str(run), "--follow", "--format", "png"]) == 2
