"""`drlora doctor`: what works is said to work, and what does not is found, with a way out.

Run: make test ARGS=tests/doctor/test_doctor.py
"""

import json
from importlib import metadata

import pytest
from registries import as_they_were

from drlora.cli.main import main
from drlora.doctor import machine
from drlora.doctor.examine import examine
from drlora.doctor.kernels import engines, storages
from drlora.doctor.machine import hub, memory_and_disk
from drlora.doctor.packages import packages
from drlora.ops.engine import Engine, register_engine
from drlora.ops.naive import experts_naive


def by_name(findings):
    return {finding.what: finding for finding in findings}


def test_everything_here_works(capsys):
    found = examine(asks_hub=False)
    names = by_name(found.findings)
    assert {"torch", "GPU", "memory", "disk", "engine naive, cpu", "storage nf4"} <= names.keys()
    assert all(f.verdict == "works" for name, f in names.items() if "engine loop" in name)
    assert all(f.verdict == "works" for name, f in names.items() if name.startswith("storage"))
    assert all(f.way_out for f in found.findings if f.verdict != "works")
    assert main(["doctor", "--json", "--offline"]) == (0 if found.is_well else 1)
    assert json.loads(capsys.readouterr().out)["findings"][0].keys() == {
        "what", "verdict", "said", "way_out"
    }  # fmt: skip


def test_an_engine_that_computes_something_else_fails():
    def wrong(x_TH, *rest):
        return 1.1 * experts_naive(x_TH, *rest)

    def broken(*_):
        raise RuntimeError("no such kernel\nmore")

    with as_they_were():
        register_engine(Engine("wrong", wrong))
        register_engine(Engine("broken", broken))
        names = by_name(engines())
    assert names["engine wrong, cpu"].verdict == "fails"
    assert "differs" in names["engine wrong, cpu"].said
    assert names["engine broken, cpu"].said == "no such kernel"
    assert names["engine naive, cpu"].verdict == "works"


def test_versions_that_do_not_go_together(monkeypatch):
    real = metadata.version
    versions = {"torch": "1.0", "trl": None}

    def version(name):
        if name in versions and versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    names = by_name(packages())
    assert names["torch"].verdict == "fails" and "1.0, where" in names["torch"].said
    assert names["trl"].said == "is missing" and "pip install" in names["trl"].way_out
    assert names["numpy"].verdict == "works"


def test_a_full_disk_and_little_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "LEAST_DISK", 1e30)
    monkeypatch.setattr(machine, "LEAST_MEMORY", 1e30)
    assert [f.verdict for f in memory_and_disk(tmp_path)] == ["fails", "fails"]


def test_a_storage_that_loses_the_numbers(monkeypatch):
    from drlora.doctor import kernels

    monkeypatch.setattr(kernels, "ROUNDED", 0.01)
    assert by_name(storages())["storage nf4"].verdict == "fails"


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_is_not_asked_where_it_is_not_to_be(monkeypatch, offline):
    monkeypatch.setattr(machine.constants, "HF_HUB_OFFLINE", offline)
    found = hub(asks=False)
    assert found.verdict == "absent"
    assert ("HF_HUB_OFFLINE" in found.said) == offline
