"""One version, a changelog that can be released, a source archive, and checks before a commit.

Run: make test ARGS=tests/project/test_release.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from datetime import date
from pathlib import Path

import yaml

import drlora

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def sections():
    """Title -> its headings."""
    parts = re.split(r"^## ", CHANGELOG, flags=re.M)[1:]
    return {part.splitlines()[0]: re.findall(r"^### (.*)$", part, flags=re.M) for part in parts}


def test_the_version_stands_in_one_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/drlora/version.py"
    others = [
        path.relative_to(ROOT)
        for path in (ROOT / "src").rglob("*.py")
        if f'"{drlora.__version__}"' in path.read_text("utf-8") and path.name != "version.py"
    ]
    assert not others


def test_the_changelog_has_the_form_of_releases():
    """A development version has the section [Unreleased] on top; a release has its own, dated."""
    titles = list(sections())
    is_development = ".dev" in drlora.__version__
    assert (titles[0] == "[Unreleased]") == is_development
    for title in titles[is_development:]:
        version, day = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", title).groups()
        assert date.fromisoformat(day) and version
    if not is_development:
        assert titles[0].startswith(f"[{drlora.__version__}] - ")
    for title, kinds in sections().items():
        assert kinds == [kind for kind in KINDS if kind in kinds], title


def test_the_source_archive_builds_what_the_repository_does(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    packaged = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged <= names and "pyproject.toml" in names
    assert not any(name.startswith(("tests/", "experiments/", "docs/")) for name in names)


def test_the_hooks_need_nothing_but_make():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    entries = [hook["entry"].split() for repo in hooks for hook in repo["hooks"]]
    assert entries and all(e[0] == "make" and e[-1] in verbs for e in entries)
