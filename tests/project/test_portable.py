"""What lets the package be installed elsewhere: systems, versions of Python, declared packages."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from drlora.distributed import best_device

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "drlora"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Modules of the standard library that Windows does not have.
UNIX_ONLY = {"crypt", "fcntl", "grp", "nis", "posix", "pty", "pwd", "readline", "resource", "spwd",
             "syslog", "termios", "tty"}  # fmt: skip
# Packages that are imported where an option asks for them, and refused in words where missing.
ON_DEMAND = {"triton", "shtab", "playwright"}


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run when the module is imported, also inside if and try."""
    found, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        for field in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                waiting += getattr(node, field, [])
    return found


def imported(nodes) -> set[str]:
    """The first part of every imported name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    return {str(p.relative_to(SRC)): ast.parse(p.read_text("utf-8")) for p in SRC.rglob("*.py")}


def test_nothing_of_unix_alone_is_imported_with_a_module(modules):
    found = {name: imported(top_level(tree)) & UNIX_ONLY for name, tree in modules.items()}
    assert not {name: bad for name, bad in found.items() if bad}


ABSENT = """
import os, sys
for name in %r:
    sys.modules[name] = None                      # importing it fails
for name in ("register_at_fork", "fork", "forkpty", "getuid", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
import importlib, pkgutil, drlora
for found in pkgutil.walk_packages(drlora.__path__, "drlora."):
    if "triton" not in found.name and not found.name.endswith("__main__"):
        importlib.import_module(found.name)
assert drlora.DrLoraConfig().r_target == 16
"""


def test_every_module_imports_where_unix_is_not():
    """torch and its like import these themselves, so they come first."""
    first = (
        "import torch, transformers, peft, datasets, trl, matplotlib.pyplot, accelerate, psutil\n"
    )
    first += "import multiprocessing.util, concurrent.futures, tempfile\n"
    code = first + ABSENT % (sorted(UNIX_ONLY - {"posix"}),)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_imported_package_is_declared(modules):
    needed = set().union(*(imported(ast.walk(tree)) for tree in modules.values()))
    needed -= set(sys.stdlib_module_names) | {"drlora"} | ON_DEMAND
    declared = {_plain(Requirement(line).name) for line in PROJECT["dependencies"]}
    providers = {
        name: {_plain(provider) for provider in found}
        for name, found in metadata.packages_distributions().items()
    }
    assert not {name for name in needed if not providers.get(name, {name}) & declared}
    used = set().union(*(providers.get(name, {name}) for name in needed))
    assert declared - used <= {"accelerate"}, "declared, and imported by nothing but the Trainer"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_lowest_versions_are_those_that_are_declared():
    """`make test-lowest` installs requirements/lowest.txt."""
    pinned = {}
    for line in (ROOT / "requirements" / "lowest.txt").read_text("utf-8").splitlines():
        if match := re.match(r"([\w.-]+)==(\S+)", line):
            pinned[match[1].lower()] = match[2]
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        (low,) = (s.version for s in requirement.specifier if s.operator == ">=")
        assert pinned[requirement.name.lower()].startswith(low), requirement.name


def test_source_is_of_the_oldest_python():
    """The syntax of 3.11; that of 3.12 (a quote of the same kind in an f-string) is not parsed."""
    oldest = tuple(map(int, re.findall(r"\d+", PROJECT["requires-python"])))
    assert oldest == (3, 11)
    for path in SRC.rglob("*.py"):
        ast.parse(path.read_text("utf-8"), feature_version=oldest)


def test_a_cuda_build_of_torch_without_a_driver_computes_on_the_cpu(monkeypatch):
    """It names the accelerator that it was built for, unless it is asked whether there is one."""

    def of_a_cuda_build(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", of_a_cuda_build)
    assert best_device() == torch.device("cpu")
    for path in SRC.rglob("*.py"):
        asked = re.findall(r"current_accelerator\(([^)]*)\)", path.read_text("utf-8"))
        assert all("check_available=True" in words for words in asked), path
