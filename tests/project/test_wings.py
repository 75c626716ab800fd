"""The package is built in wings in one total order; a file imports only from wings before its own.

Read from the source with `ast`, so imports inside functions and under TYPE_CHECKING count too.
Run: make test ARGS=tests/project/test_wings.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import transformers

from drlora.io import run_files

SRC = Path(__file__).parents[2] / "src" / "drlora"
MAX_LINES = 400

# Lowest first. Wings of one row do not know each other.
ORDER: tuple[frozenset[str], ...] = (
    frozenset({"errors", "version"}),
    frozenset({"io", "config", "distributed", "embedded", "recipes"}),
    frozenset({"ops"}),
    frozenset({"data", "moe"}),
    frozenset({"evaluation", "adapter"}),
    frozenset({"export", "ranks"}),
    frozenset({"forecast", "report", "trainer", "testing", "verification"}),
    frozenset({"runs", "registration"}),
    frozenset({"compare", "doctor", "planning"}),
    frozenset({"cli"}),
)
# They depend on the package; the package never depends on them.
OUTSIDERS = frozenset({"benchmarks", "examples", "experiments", "tests"})


def row_of(wing: str) -> int | None:
    return next((row for row, wings in enumerate(ORDER) if wing in wings), None)


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import in `source`, a file of the package `package`.

    `from a.b import c` gives `a.b.c`: c may be a module, and where it is not, the part that
    matters here (the wing right below drlora) is the same, except for `from drlora import c`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = [*(parents if node.level else []), *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def violations(source: str, path: str) -> list[str]:
    """What the order forbids in `source`, the file at `path` relative to src/drlora."""
    parts = Path(path).with_suffix("").parts
    own = row_of(parts[0])
    if own is None:
        return [f"{path}: drlora.{parts[0]} is no wing; put it into one, or add it to ORDER"]
    found = []
    for line, name in imported_names(source, ".".join(["drlora", *parts[:-1]])):
        top, _, rest = name.partition(".")
        wing = rest.partition(".")[0]
        if top in OUTSIDERS:
            found.append(f"{path}:{line}: drlora must not import {top}")
        if top != "drlora" or wing == parts[0]:
            continue
        row = row_of(wing)
        if row is None:
            # The package itself, or a name that its __init__ gathers from all wings.
            found.append(f"{path}:{line}: {name!r} is no wing; import what defines it")
        elif row >= own:
            found.append(f"{path}:{line}: {parts[0]} must not import {wing}")
    return list(dict.fromkeys(found))  # once, also where one line imports many names


def package_files() -> list[Path]:
    outside = {SRC / "__init__.py", SRC / "__main__.py"}
    return sorted(path for path in SRC.rglob("*.py") if path not in outside)


def test_files_import_only_from_wings_before_their_own():
    found = [
        violation
        for path in package_files()
        for violation in violations(path.read_text(), path.relative_to(SRC).as_posix())
    ]
    assert not found, "\n".join(found)


def test_every_wing_is_there_and_says_what_it_is():
    here = {path.stem if path.suffix else path.name for path in SRC.iterdir()}
    here = {name for name in here if not name.startswith("__") and name != "py"}
    assert here == frozenset().union(*ORDER)
    for wing in here:
        init = SRC / wing / "__init__.py"
        assert not init.parent.is_dir() or ast.get_docstring(ast.parse(init.read_text())), wing


def test_the_outermost_file_imports_no_outsider():
    names = imported_names((SRC / "__init__.py").read_text(), "drlora")
    assert not {name.partition(".")[0] for _, name in names} & OUTSIDERS


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in SRC.rglob("*.py")}
    long = {str(path.relative_to(SRC)): n for path, n in lengths.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, split them: {long}"


def printing(path: Path) -> Iterator[str]:
    """Calls of print and imports of rich in a file."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id == "print":
            yield f"{path.relative_to(SRC)}:{called.lineno}: print"
    for line, name in imported_names(source, "drlora"):
        if name.partition(".")[0] == "rich":
            yield f"{path.relative_to(SRC)}:{line}: {name}"


def test_only_the_command_line_prints():
    found = [line for path in package_files() for line in printing(path)]
    elsewhere = [line for line in found if not line.startswith("cli/")]
    assert not elsewhere, "\n".join(elsewhere)
    assert {line.rpartition(" ")[2] for line in found} >= {"print", "rich.console.Console"}


def spelt(path: Path) -> Iterator[str]:
    """The texts in a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value


def test_each_file_name_of_a_run_is_spelt_once():
    """In io/run_files.py. Examples of the command line are written out."""
    names = [value for name, value in vars(run_files).items() if name.isupper()]
    found = [
        f"{path.relative_to(SRC)}: {name}"
        for path in package_files()
        if path.name != "run_files.py" and path.parent.name != "cli"
        for text in spelt(path)
        for name in names
        if text == name or ("." in name.strip(".") and name.replace("{}", "") in text)
    ]
    assert not found, "\n".join(found)
    assert (run_files.ADAPTER_CONFIG, run_files.ADAPTER_WEIGHTS) == (
        peft.utils.CONFIG_NAME, peft.utils.SAFETENSORS_WEIGHTS_NAME
    )  # fmt: skip
    assert run_files.TRAINER_STATE == transformers.trainer.TRAINER_STATE_NAME
    assert run_files.CHECKPOINT.format("") == f"{transformers.trainer.PREFIX_CHECKPOINT_DIR}-"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ranks/event.py", "from drlora.adapter.pool import RankPool"),
        ("config/adapter.py", "from drlora.errors import ConfigError"),
        ("adapter/inject.py", "from drlora.adapter.layer import DrLoraExperts"),
        ("ops/__init__.py", "from .naive import ragged_lora"),
        ("ops/loop/engine.py", "from drlora.ops.naive import ragged_lora"),
        ("ops/loop/engine.py", "from ..naive import ragged_lora"),
        ("cli/main.py", "import drlora.runs.train"),
        ("runs/train.py", "from drlora.version import __version__"),
        ("ranks/dynamics.py", "import torch\nfrom transformers import Trainer"),
    ],
)
def test_allowed_imports_pass(path, source):
    assert violations(source, path) == []


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        (
            "adapter/pool.py",
            "import drlora.ranks.event",
            "adapter must not import ranks",
        ),
        (
            "io/files.py",
            "from drlora.config.adapter import DrLoraConfig",
            "io must not import config",
        ),
        (
            "errors.py",
            "from drlora.config.adapter import DrLoraConfig",
            "errors must not import config",
        ),
        ("ops/naive.py", "from ..adapter.observe import x", "ops must not import adapter"),
        ("ops/loop/engine.py", "from ... import ranks", "ops must not import ranks"),
        ("moe/blocks.py", "def f():\n    from drlora.adapter.layer import X", "import adapter"),
        (
            "export/plan.py",
            "from drlora.ranks.starts import load",
            "export must not import ranks",
        ),
        ("ranks/dynamics.py", "from drlora import DrLoraConfig", "import what defines it"),
        ("ranks/dynamics.py", "import drlora", "import what defines it"),
        ("cli/main.py", "from experiments.tasks import make", "must not import experiments"),
        ("cli/main.py", "import tests.helpers", "must not import tests"),
        ("novelty.py", "import math", "add it to ORDER"),
    ],
)
def test_violating_imports_are_caught(path, source, said):
    (violation,) = violations(source, path)
    assert said in violation
    assert path in violation
