"""Reading and checking settings that a user wrote: YAML, `key=value`, names, types.

Nothing here knows which settings there are; recipe.py does.
"""

from __future__ import annotations

import difflib
import re
import types
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from drlora.errors import ConfigError, shown
from drlora.io.files import read_text

LARGEST_YAML_BYTES = 128 * 2**10
MOST_VALUES = 20_000


_MERGE = "tag:yaml.org,2002:merge"  # `<<: *others`


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number, and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        own = [key for key, _ in node.value if key.tag != _MERGE]
        keys = Counter(str(self.construct_object(key, deep=True)) for key in own)
        twice = sorted(key for key, count in keys.items() if count > 1)
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]} is set twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, takes 1e-4 for a string because it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` stands for.

    Raises:
        ConfigError: naming `where` and the line of the fault.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line} is not valid YAML: {problem}.") from error
    except (ValueError, TypeError, RecursionError, AttributeError) as error:
        # Dates that are none, numbers of too many digits, nesting that is too deep.
        raise ConfigError(f"{where} is not valid YAML: {error}.") from error
    _refuse_too_many_values(value, where)
    return value


def _refuse_too_many_values(value: Any, where: str) -> None:
    """With aliases a few lines can stand for more values than fit into memory."""
    waiting, seen = [value], 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, (list, tuple, set)):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend(one)
            waiting.extend(one.values())
        seen += 1
        if seen + len(waiting) > MOST_VALUES:
            raise ConfigError(f"{where} stands for more than {MOST_VALUES} values.")


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with `key=value` overrides (dotted keys) on top.

    Raises:
        ConfigError: if there is no such file, or it holds no mapping, or an override is none.
    """
    text = read_text(Path(path), LARGEST_YAML_BYTES, ConfigError)
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `setting: value` lines, not {shown(tree)}.")
    return with_overrides(tree, overrides)


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree`, in which each `key=value` was put in its place.

    Raises:
        ConfigError: if one of them is no override, or its key leads into a plain value.
    """
    for override in overrides:
        set_in(tree, *split_override(override))
    return tree


def split_override(text: str) -> tuple[list[str], Any]:
    """`a.b=value` as (["a", "b"], value), the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{text!r} is no override; write key=value, as training.max_steps=100.")
    return key.split("."), parse_yaml(value, f"the value in {text!r}")


def set_in(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set `tree[path[0]][path[1]]...` in place, making the mappings in between.

    Raises:
        ConfigError: if what lies in between is a plain value.
    """
    for depth, key in enumerate(path[:-1], start=1):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(path)}: {'.'.join(path[:depth])} is no section.")
    tree[path[-1]] = value


def refuse_unknown(
    found: Collection[Any],
    known: Collection[str],
    section: str,
    elsewhere: Mapping[str, str] | None = None,
    shown: str | None = None,
) -> None:
    """Refuse names in `found` that are not in `known`.

    Args:
        found: names that the user wrote.
        known: names that exist here.
        section: where "here" is, "" for the top of a recipe.
        elsewhere: name -> the dotted name it has in another place.
        shown: what to say instead of the list of known names.

    Raises:
        ConfigError: with the nearest known name and the list of them.
    """
    for name in found:
        if name in known:
            continue
        full = f"{section}.{name}" if section else str(name)
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"{section}.{near[0]}" if near and section else "".join(near)
        hint = hint or (elsewhere or {}).get(str(name), "")
        raise ConfigError(
            f"{full} is not a setting; {f'did you mean {hint}? K' if hint else 'k'}nown "
            f"{f'in {section} ' if section else ''}are {shown or ', '.join(sorted(known))}."
        )


def check_type(value: Any, wanted: Any, name: str) -> Any:
    """`value`, refused unless it fits the annotation `wanted`.

    100.0 becomes 100 for an int, and one text or number a list of it where only lists are taken, as
    in `loss_type: ipo`. Only plain types, lists, dicts and unions of them are looked at; anything
    else passes.

    Raises:
        ConfigError: naming the setting, its value and what it must be.
    """
    takes = get_args(wanted) or (wanted,)
    is_whole = isinstance(value, float) and value.is_integer()
    if is_whole and int in takes and float not in takes:
        return int(value)
    if not _fits(value, wanted):
        if isinstance(value, (str, int, float)) and _fits([value], wanted):
            return [value]
        raise ConfigError(f"{name}={shown(value, 80)} must be {described(wanted)}.")
    return value


def _fits(value: Any, wanted: Any) -> bool:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict or wanted is dict:
        return isinstance(value, dict)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted in (bool, str, type(None)):
        return isinstance(value, wanted)
    return True


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    type(None): "null",
}


def described(wanted: Any) -> str:
    """What a value must be for the annotation `wanted`, in words.

    >>> described(int | None)
    'a whole number or null'
    """
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(described(one) for one in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is list:
        return "a list" if arguments[0] is Any else f"a list ({described(arguments[0])} each)"
    return _NAMES.get(origin or wanted, str(wanted))
