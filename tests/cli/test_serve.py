"""drlora serve: the right command, one checked answer, a clean end; the engine is a small script.

Run: make test ARGS=tests/cli/test_serve.py
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import save_all

from drlora.cli.main import main
from drlora.errors import CheckpointError, ConfigError
from drlora.export.choices import ENGINES as CHOICES
from drlora.export.engines import ENGINES
from drlora.runs import serve
from drlora.runs.serving import SERVERS, plan_serving

# An engine: says what it was given, answers with the text in ANSWER, notes how it ended.
ENGINE = """\
import http.server, json, os, signal, sys
here = os.environ["ENGINE_NOTES"]
json.dump(sys.argv[1:], open(here + "/words.json", "w"))
if os.environ.get("ENGINE_DIES"):
    sys.exit("no such flag")
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, found):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())
    def do_GET(self):
        if os.environ.get("ENGINE_LISTS_NOTHING") and self.path != "/health":
            return self.send_error(500)
        self.answer({"data": [{"id": "base"}, {"id": "a"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        json.dump(asked, open(here + "/asked.json", "w"))
        self.answer({"choices": [{"text": os.environ["ENGINE_ANSWER"]}]})
    def log_message(self, *args):
        pass
def ended(number, frame):
    open(here + "/ended", "a").write(signal.Signals(number).name)
    if number == signal.SIGTERM or not os.environ.get("ENGINE_IS_STUBBORN"):
        os._exit(0)
signal.signal(signal.SIGINT, ended)
signal.signal(signal.SIGTERM, ended)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
CONVERTER = """\
import pathlib, sys
words = sys.argv[1:]
pathlib.Path(words[words.index("--outfile") + 1]).write_text(" ".join(words))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run with trained routers."""
    folder = tmp_path_factory.mktemp("serve")
    assert main(["train", str(save_all(folder, adapter={"router": "train"}))]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, for a test to write into."""
    subprocess.run(["cp", "-r", trained / "run", tmp_path / "run"], check=True)
    return tmp_path / "run"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put programs of these names on PATH, which has nothing else."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("ENGINE_NOTES", str(tmp_path))
    monkeypatch.setenv("ENGINE_ANSWER", " yes")
    monkeypatch.delenv("LLAMA_CPP", raising=False)

    def put(*names):
        for name in names:
            (programs / name).write_text(f"#!{sys.executable}\n{ENGINE}")
            (programs / name).chmod(0o755)

    return put


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_names():
    assert tuple(SERVERS) == CHOICES
    assert {server.engine for server in SERVERS.values()} <= {name for name, *_ in ENGINES}


def test_a_dry_run_prints_the_command_and_starts_nothing(run, install, capsys):
    install("vllm")
    assert main(["serve", str(run), "--dry-run", "--port", "8123", "--flags=--seed 3"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("command  ")]
    export = run / "served" / "per-expert"
    words = line.removeprefix("command  ").split()
    base = str(run.parent / "model")
    assert words[:2] == ["vllm", "serve"] and Path(words[2]).name == Path(base).name
    assert words[3:] == [
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"a={export}",
        "--host", "127.0.0.1", "--port", "8123", "--seed", "3",
    ]  # fmt: skip
    assert not export.exists() and not (run.parent / "words.json").exists()


def test_it_is_exported_started_asked_and_ended(run, install, port, tmp_path, capfd, monkeypatch):
    install("vllm")
    sample = json.loads((run / "result.json").read_text())["after"]["match"]["samples"][0]
    monkeypatch.setenv("ENGINE_ANSWER", sample["prediction"] + " and more")
    assert main(["serve", str(run), "--port", port, "--check"]) == 0
    printed = capfd.readouterr().out
    assert (run / "served" / "per-expert" / "adapter_model.safetensors").is_file()
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["model"] == "a" and asked["prompt"] == sample["prompt"]
    assert asked["temperature"] == 0.0
    assert (tmp_path / "ended").read_text() == "SIGINT"
    if sample["prediction"].strip():
        assert "as the run did after training" in printed
    monkeypatch.setenv("ENGINE_ANSWER", "something else")
    assert main(["serve", str(run), "--port", port, "--check", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["checked"]["answer"] == "something else" and said["format"] == "per-expert"


def test_ctrl_c_ends_the_engine_and_is_no_error(run, install, port, tmp_path):
    install("vllm")
    command = [sys.executable, "-m", "drlora", "serve", str(run), "--port", port]

    def heeds_ctrl_c():  # which a shell takes from what it starts in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ, preexec_fn=heeds_ctrl_c
    ) as process:
        for line in process.stdout:
            if line.startswith("serving"):
                break
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 0
        finally:
            process.terminate()
        assert "ended    the engine is stopped" in process.stdout.read()
    assert (tmp_path / "ended").read_text() == "SIGINT"


def test_an_engine_that_does_not_mind_ctrl_c_is_ended_all_the_same(
    run, install, port, tmp_path, monkeypatch
):
    install("vllm")
    monkeypatch.setenv("ENGINE_IS_STUBBORN", "1")
    monkeypatch.setattr(serve, "PATIENCE_S", 0.5)
    started = time.monotonic()
    assert main(["serve", str(run), "--port", port, "--check"]) == 0
    assert (tmp_path / "ended").read_text() == "SIGINTSIGTERM"
    assert time.monotonic() - started < 60


def test_a_second_ctrl_c_leaves_no_engine_behind(install, port, tmp_path, monkeypatch):
    install("vllm")
    monkeypatch.setenv("ENGINE_IS_STUBBORN", "1")
    command = [tmp_path / "bin" / "vllm", "--port", port]
    with subprocess.Popen(command, start_new_session=True) as process:
        while not (tmp_path / "words.json").exists():
            time.sleep(0.05)
        wait = process.wait

        def interrupted(seconds):
            monkeypatch.setattr(process, "wait", wait)
            raise KeyboardInterrupt

        monkeypatch.setattr(process, "wait", interrupted)
        serve._end(process)
        assert process.poll() == -signal.SIGKILL


def test_an_engine_that_dies_is_told(run, install, port, capfd, monkeypatch):
    install("vllm")
    monkeypatch.setenv("ENGINE_DIES", "1")
    assert main(["serve", str(run), "--port", port, "--check"]) == 2
    said = capfd.readouterr().err
    assert "no such flag" in said and "ended with code 1 before it answered" in said


def test_an_empty_answer_is_told(run, install, port, capsys, monkeypatch):
    install("vllm")
    monkeypatch.setenv("ENGINE_ANSWER", " ")
    assert main(["serve", str(run), "--port", port, "--check"]) == 2
    assert "with nothing" in capsys.readouterr().err


def test_llama_cpp_gets_the_base_and_the_adapter_as_gguf(run, install, port, tmp_path, monkeypatch):
    install("llama-server")
    source = tmp_path / "llama.cpp"
    source.mkdir()
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (source / name).write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(source))
    assert main(["serve", str(run), "--port", port, "--check"]) == 0
    served = run / "served"
    words = json.loads((tmp_path / "words.json").read_text())
    assert words[:4] == ["-m", str(served / "base.gguf"), "--lora",
                         str(served / "gguf" / "adapter.gguf")]  # fmt: skip
    assert (served / "base.gguf").read_text().endswith("/model")
    assert main(["serve", str(run), "--port", port, "--check"]) == 0  # nothing is made anew
    plan = plan_serving(served / "gguf", "llama.cpp", output=str(served))
    assert plan.is_there and plan.command[1:5] == tuple(words[:4])


def test_transformers_gets_the_merged_model(run, install, port, tmp_path, monkeypatch):
    """It does not list models where there is no cache of the hub."""
    install("transformers")
    monkeypatch.setenv("ENGINE_LISTS_NOTHING", "1")
    assert main(["serve", str(run), "--port", port, "--check", "-o", str(tmp_path / "there")]) == 0
    words = json.loads((tmp_path / "words.json").read_text())
    assert words[:2] == ["serve", str(tmp_path / "there" / "merged")]
    assert (tmp_path / "there" / "merged" / "model.safetensors").is_file()
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["model"] == str(tmp_path / "there" / "merged")


def test_an_export_is_served_as_it_is(run, install, tmp_path):
    install("vllm")
    out = tmp_path / "out"
    assert main(["export", str(run), "--format", "per-expert", "-o", str(out)]) == 0
    plan = plan_serving(out)
    assert plan.is_there and plan.export == out and f"a={out}" in plan.command
    assert plan.prompt and plan.expected is not None
    full = tmp_path / "full"
    words = ["export", str(run), "--format", "peft", "-o", str(full)]
    assert main(words) == 0
    with pytest.raises(ConfigError, match="vllm with peft: refuses modules trained in full"):
        plan_serving(full)


def test_an_export_from_before_the_run_went_on_is_not_served(run, install):
    install("vllm")
    out = run / "served" / "per-expert"
    assert main(["export", str(run), "--format", "per-expert", "-o", str(out)]) == 0
    assert plan_serving(run).is_there
    later = (out / "drlora_export.json").stat().st_mtime + 10
    os.utime(run / "adapter_model.safetensors", (later, later))
    with pytest.raises(ConfigError, match="is older than the adapter"):
        plan_serving(run)


def test_what_cannot_be_served_says_why(run, install, tmp_path):
    with pytest.raises(ConfigError, match="drlora has no server of its own"):
        plan_serving(run)
    install("llama-server")
    with pytest.raises(ConfigError, match=r"llama.cpp with gguf: .*LLAMA_CPP"):
        plan_serving(run)
    with pytest.raises(ConfigError, match="engine='vlm' is not known"):
        plan_serving(run, "vlm")
    with pytest.raises(CheckpointError, match="neither a run nor an export"):
        install("vllm")
        model = next(run.parent.glob("run")) / "served"
        model.mkdir()
        (model / "config.json").write_text("{}")
        plan_serving(model)
