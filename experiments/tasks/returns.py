"""Make the task `returns`: what type does a Python function return, by its signature alone?

    python experiments/tasks/returns.py

Source: the stubs of the standard library (typeshed) in the PyPI wheel of mypy, which is read, not
installed. Writes experiments/tasks/data/returns; the README there says how it is split.
"""

import ast
import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from common import (
    COMMITTED,
    DEV_LINES,
    SEED,
    TEST_LINES,
    TRAIN_LINES,
    Example,
    Splits,
    fetched,
    main,
    make_example,
)

VERSION = "2.4.1"
SHA256 = "1784648d6ec8c2b5465e3f26241b845a0b3cb4e56c993c64abe16989e7698999"
FOLDER = "mypy/typeshed/stdlib/"
LONGEST_SIGNATURE_CHARS, LONGEST_TYPE_CHARS = 120, 30
LEAST_MODULES = 3
LARGEST_HELD_OUT_MODULE = 120


@dataclass(frozen=True)
class Function:
    """A function of a stub; `family` is the module it belongs to, without leading underscores."""

    family: str
    prompt: str
    type: str


def functions_of(path: str, source: str) -> Iterator[Function]:
    """The functions of one stub whose type is written and short, constructors left out."""
    module = path.removesuffix(".pyi").removesuffix("/__init__").replace("/", ".")
    family = module.partition(".")[0].strip("_")

    def walk(node: ast.AST, owner: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from walk(child, child.name)
            elif isinstance(child, ast.If):
                yield from walk(child, owner)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and is_typed(child):
                place = f"class {owner}" if owner else f"module {module}"
                prompt = f"{place}\ndef {child.name}({ast.unparse(child.args)}) ->"
                yield Function(family, prompt, ast.unparse(child.returns))

    yield from walk(ast.parse(source), "")


def is_typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the stub says what is returned, and the name alone does not."""
    return function.returns is not None and function.name not in ("__init__", "__new__")


def read_functions() -> list[Function]:
    """All functions of the stubs with short signatures, in file order."""
    found = []
    name = f"mypy-{VERSION}-py3-none-any.whl"
    client = ("pip", "download", "--no-deps", "--platform=any", "--only-binary=:all:")
    archive = fetched(name, SHA256, *client, f"mypy=={VERSION}")
    with zipfile.ZipFile(archive) as files:
        for member in sorted(files.namelist()):
            if member.startswith(FOLDER) and member.endswith(".pyi"):
                source = files.read(member).decode()
                found += functions_of(member.removeprefix(FOLDER), source)
    return [
        function
        for function in found
        if len(function.prompt) <= LONGEST_SIGNATURE_CHARS
        and len(function.type) <= LONGEST_TYPE_CHARS
    ]


def returns_splits() -> Splits:
    """Whole modules are held out; what is declared alike in two modules goes to neither side."""
    functions = read_functions()
    modules_of: dict[str, set[str]] = {}
    types_of: dict[str, set[str]] = {}
    families_of: dict[str, set[str]] = {}
    for function in functions:
        modules_of.setdefault(function.type, set()).add(function.family)
        types_of.setdefault(function.prompt, set()).add(function.type)
        families_of.setdefault(line_of(function.prompt), set()).add(function.family)
    by_family: dict[str, dict[str, Example]] = {}
    for function in functions:
        is_known = len(modules_of[function.type]) >= LEAST_MODULES
        if is_known and len(types_of[function.prompt]) == 1:
            example = make_example(function.prompt, [function.type])
            by_family.setdefault(function.family, {})[function.prompt] = example
    return held_out_modules(by_family, families_of)


def line_of(prompt: str) -> str:
    """The signature, without the class or module that it is declared in."""
    return prompt.partition("\n")[2]


def held_out_modules(
    by_family: dict[str, dict[str, Example]], families_of: dict[str, set[str]]
) -> Splits:
    """Test and dev from modules of their own, without signatures that another module has too."""
    order = sorted(family for family, of in by_family.items() if len(of) <= LARGEST_HELD_OUT_MODULE)
    random.Random(SEED).shuffle(order)
    splits: Splits = {"train": [], "dev": [], "test": []}
    for split, lines in (("test", TEST_LINES), ("dev", DEV_LINES)):
        while len(splits[split]) < lines:
            splits[split] += [
                example
                for prompt, example in by_family.pop(order.pop()).items()
                if len(families_of[line_of(prompt)]) == 1
            ]
        random.Random(SEED).shuffle(splits[split])
    once = {prompt: example for of in by_family.values() for prompt, example in of.items()}
    train = list(once.values())
    random.Random(SEED).shuffle(train)
    return {**splits, "train": train[:TRAIN_LINES]}


if __name__ == "__main__":
    main(returns_splits, __doc__, COMMITTED / "returns")
