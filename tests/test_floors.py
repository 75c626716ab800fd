"""The package is built in floors, and a file may import only from floors below its own.

Read from the source with `ast`, so imports inside functions and under TYPE_CHECKING count too.
Run: make test ARGS=tests/test_floors.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "drlora"
MAX_LINES = 400

# Modules and subpackages of drlora by floor, lowest first. `report` stands for report/* as well.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "config",
            "config_checks",
            "errors",
            "files",
            "methods",
            "peft_type",
            "places",
            "ranks",
            "version",
            "wording",
            "writing",
        }
    ),
    frozenset(
        {
            "allocator",
            "ops",
            "placement",
            "processes",
            "row_directions",
            "saliency",
            "schedule",
            "young_rows",
        }
    ),
    frozenset(
        {
            "blocks",
            "embeddings",
            "families",
            "inject",
            "layer",
            "observe",
            "ordinary",
            "rank_pool",
            "refusals",
            "routers",
        }
    ),
    frozenset(
        {
            "adapter_files",
            "checkpoint",
            "continue_adapter",
            "dynamics",
            "export",
            "groups",
            "growth",
            "import_lora",
            "peft_method",
            "probe",
            "starts",
        }
    ),
    frozenset(
        {
            "__main__",
            "arguments",
            "assemble",
            "best_model",
            "callback",
            "choices",
            "cli",
            "compare",
            "data",
            "draw",
            "dry_run",
            "embedded",
            "environment",
            "evaluate",
            "event_log",
            "figure_style",
            "evaluate_run",
            "export_run",
            "sources",
            "heat_map",
            "held_out",
            "inspection",
            "inspection_text",
            "job",
            "jsonl",
            "load_data",
            "measure",
            "memory_plan",
            "model_card",
            "moved",
            "outcome",
            "progress",
            "rank_metrics",
            "recipe",
            "report",
            "run_record",
            "rundir",
            "sections",
            "settings",
            "summary",
            "train",
            "trainer",
        }
    ),
)
# The doors are the outermost floor and use each other freely: `cli` is a table of the others.
DOORS = len(FLOORS) - 1

# Neighbours on one floor do not know each other, save for these; a row may import earlier rows.
ORDER_WITHIN: dict[int, tuple[frozenset[str], ...]] = {
    # Every noun is checked on construction, so every noun needs the exceptions; the config is a
    # PEFT config, so it needs PEFT's name of it, and can be made by a method's name.
    0: (
        frozenset({"errors", "peft_type"}),
        frozenset({"files", "methods"}),
        frozenset({"config_checks"}),
        frozenset({"config", "ranks"}),
    ),
    # Moments and new directions are written to the rows that a process holds, which it knows.
    1: (
        frozenset({"processes"}),
        frozenset({"row_directions", "young_rows"}),
    ),
    # Surgery is one operation in steps: know the families, find a block, build the layer that
    # adapts it and carries the meters that watch it, put the layer into the model.
    2: (
        frozenset({"families", "observe", "rank_pool", "refusals"}),
        frozenset({"blocks"}),
        frozenset({"layer", "ordinary"}),
        frozenset({"inject", "routers"}),
    ),
    # An import is an export read backwards: one knows PEFT's layout, the other uses it.
    # The life of ranks is made of events, in which groups of experts compete.
    # Ranks are placed by what a probe finds.
    3: (
        frozenset({"groups"}),
        frozenset({"adapter_files", "export", "growth", "probe"}),
        frozenset({"dynamics", "import_lora", "peft_method", "starts"}),
    ),
}

# They depend on the package; the package never depends on them.
OUTSIDERS = frozenset({"benchmarks", "examples", "experiments", "tests"})


def floor_of(module: str) -> int | None:
    return next((floor for floor, names in enumerate(FLOORS) if module in names), None)


def may_import(importer: str, imported: str) -> bool:
    """Whether the floors let `importer` import `imported`; both are in the table."""
    upper, lower = floor_of(importer), floor_of(imported)
    assert upper is not None and lower is not None
    if importer == imported or lower < upper:
        return True
    if lower > upper:
        return False
    if upper == DOORS:
        return True
    rows = {name: i for i, row in enumerate(ORDER_WITHIN.get(upper, ())) for name in row}
    return importer in rows and imported in rows and rows[imported] < rows[importer]


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import in `source`, a file of the package `package`.

    `from a.b import c` gives `a.b.c`: c may be a module, and where it is not, the part that
    matters here (the module right below drlora) is the same, except for `from drlora import c`.
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
    """What the floors forbid in `source`, the file at `path` relative to src/drlora."""
    parts = Path(path).with_suffix("").parts
    importer = parts[0]
    if floor_of(importer) is None:
        return [
            f"{path}: drlora.{importer} has no floor; add it to FLOORS in {Path(__file__).name}"
        ]

    found = []
    package = ".".join(["drlora", *parts[:-1]])
    for line, name in imported_names(source, package):
        top, _, rest = name.partition(".")
        if top in OUTSIDERS:
            found.append(f"{path}:{line}: drlora must not import {top}")
        if top != "drlora":
            continue
        imported = rest.partition(".")[0]
        if not imported or (name.count(".") == 1 and floor_of(imported) is None):
            # The package itself, or a name its __init__ gathers from all floors.
            if floor_of(importer) != DOORS:
                found.append(
                    f"{path}:{line}: {name!r} is the whole package or a module without a floor; "
                    f"import from the module that defines it, and add a new module to FLOORS"
                )
        elif floor_of(imported) is None:
            found.append(f"{path}:{line}: drlora.{imported} has no floor; add it to FLOORS")
        elif not may_import(importer, imported):
            found.append(
                f"{path}:{line}: {importer} (floor {floor_of(importer)}) must not import "
                f"{imported} (floor {floor_of(imported)})"
            )
    return list(dict.fromkeys(found))  # once, also where one line imports many names


def package_files() -> list[Path]:
    return sorted(path for path in SRC.rglob("*.py") if path != SRC / "__init__.py")


def test_files_import_only_from_floors_below():
    found = [
        violation
        for path in package_files()
        for violation in violations(path.read_text(), path.relative_to(SRC).as_posix())
    ]
    assert not found, "\n".join(found)


def test_init_imports_no_outsider():
    init = SRC / "__init__.py"
    source = init.read_text() if init.exists() else ""
    tops = {name.partition(".")[0] for _, name in imported_names(source, "drlora")}
    assert not tops & OUTSIDERS


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in SRC.rglob("*.py")}
    long = {str(path.relative_to(SRC)): n for path, n in lengths.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, split them: {long}"


def test_no_module_is_on_two_floors():
    names = [name for floor in FLOORS for name in floor]
    assert len(names) == len(set(names))


def test_ordered_modules_are_on_the_floor_they_are_ordered_in():
    for floor, rows in ORDER_WITHIN.items():
        assert frozenset().union(*rows) <= FLOORS[floor]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("allocator.py", "from drlora.ranks import RankPool"),
        ("config.py", "from drlora.errors import ConfigError"),
        ("inject.py", "from drlora.layer import ExpertAdapter"),
        ("ops/__init__.py", "from .naive import ragged_lora"),
        ("ops/fast.py", "from drlora.ops.naive import ragged_lora"),
        ("ops/fast.py", "from ..ranks import RankPool"),
        ("cli.py", "import drlora.train"),
        ("cli.py", "from drlora import __version__"),
        ("report/page.py", "from drlora.recipe import Recipe"),
        ("dynamics.py", "import torch\nfrom transformers import Trainer"),
    ],
)
def test_allowed_imports_pass(path, source):
    assert violations(source, path) == []


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("ranks.py", "import drlora.layer", "must not import layer"),
        ("ranks.py", "from drlora.config import DrLoraConfig", "must not import config"),
        ("ranks.py", "from . import dynamics", "must not import dynamics"),
        ("errors.py", "from drlora.config import DrLoraConfig", "must not import config"),
        ("ops/naive.py", "from ..observe import Observer", "must not import observe"),
        ("ops/naive.py", "from .. import saliency", "must not import saliency"),
        ("allocator.py", "from drlora.schedule import quota", "must not import schedule"),
        ("blocks.py", "def f():\n    from drlora.layer import X", "must not import layer"),
        ("observe.py", "from drlora.layer import X", "must not import layer"),
        ("layer.py", "from drlora.inject import inject", "must not import inject"),
        ("export.py", "from drlora.checkpoint import load", "must not import checkpoint"),
        ("dynamics.py", "from drlora import DrLoraConfig", "the module that defines it"),
        ("dynamics.py", "import drlora", "the whole package"),
        ("cli.py", "from experiments.tasks import make", "must not import experiments"),
        ("cli.py", "import tests.helpers", "must not import tests"),
        ("ranks.py", "from drlora.novelty import x", "add it to FLOORS"),
        ("novelty.py", "import math", "add it to FLOORS"),
    ],
)
def test_violating_imports_are_caught(path, source, said):
    (violation,) = violations(source, path)
    assert said in violation
    assert path in violation
