"""What can become of a file: bits flipped, ends cut, fields exchanged, numbers without measure.

    broken, how = mutate(random.Random(7), "ranks.json", contents)

The same generator gives the same file.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

LONG = "long " * 2000
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 10**9, 2**31, 2**63, -(2**64), 10**40),
    *(float("nan"), float("inf"), float("-inf"), 1e-300),
    *("", " ", "0", "nan", "true", "null", "~", "../../etc/passwd", "/dev/zero", "/", "C:\\x"),
    *("\x00", "\ud800", "\u202egpj", "e\u0301", "\U0001f4a5", "{{7*7}}", "<script>x</script>"),
    *("%s%n", "${HOME}", "$(id)", "!!python/object:os.system", "embedded:", "embedded:../x", LONG),
    *([], {}, [[]], [None], {"": 0}, [1, "a"], {"a": {"b": [1]}}),
)


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mutate(rng: random.Random, name: str, contents: bytes) -> tuple[bytes, str]:
    """A broken copy of a file, and what was done to it; the name's ending says what it is."""
    bytewise: list[Callable[[random.Random, bytes], bytes]] = [flip, cut, repeat, insert, zero]
    ending = name.rpartition(".")[2]
    structured = {
        "json": in_json,
        "jsonl": in_lines,
        "yaml": in_yaml,
        "safetensors": in_header,
    }.get(ending)
    ways = [*bytewise, *[structured] * 6] if structured else bytewise
    way = rng.choice(ways)
    return way(rng, contents), way.__name__


def flip(rng: random.Random, contents: bytes) -> bytes:
    """One to eight bits turned."""
    found = bytearray(contents)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(max(1, min(len(found), rng.choice((64, 4096, len(found))))))
        found[at] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(rng: random.Random, contents: bytes) -> bytes:
    """The end is missing."""
    return contents[: rng.randrange(len(contents))]


def repeat(rng: random.Random, contents: bytes) -> bytes:
    """A part stands there twice, or many times."""
    start = rng.randrange(len(contents))
    part = contents[start : start + rng.choice((1, 16, 256))]
    return contents[:start] + part * rng.choice((2, 3, 1000)) + contents[start:]


def insert(rng: random.Random, contents: bytes) -> bytes:
    """Other bytes in between."""
    at = rng.randrange(len(contents))
    junk = rng.choice(
        (b"\x00" * 8, b"\xff\xfe", b"\xed\xa0\x80", "\u202e\U0001f4a5".encode(), b"[" * 5000,
         b"{'a':" * 500, b"- " * 2000, b"&a [*a, *a]", b'"\\ud800"', rng.randbytes(40))
    )  # fmt: skip
    return contents[:at] + junk + contents[at:]


def zero(rng: random.Random, contents: bytes) -> bytes:
    """A part is empty, as after a crash of the machine."""
    start = rng.randrange(len(contents))
    length = min(rng.choice((8, 512, len(contents))), len(contents) - start)
    return contents[:start] + bytes(length) + contents[start + length :]


def in_json(rng: random.Random, contents: bytes) -> bytes:
    """One value of a JSON file is another, is gone, or has an unknown neighbour."""
    return json.dumps(in_value(rng, json.loads(contents))).encode("utf-8", "surrogatepass")


def in_lines(rng: random.Random, contents: bytes) -> bytes:
    """One to three lines of a log or of a data file are other ones."""
    lines = contents.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        if rng.random() < 0.2:
            lines[at] = json.dumps(rng.choice(HOSTILE)).encode()
        elif lines[at].startswith(b"{"):
            lines[at] = in_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def in_yaml(rng: random.Random, contents: bytes) -> bytes:
    """One value of a YAML file is another, is gone, or has an unknown neighbour."""
    value = in_value(rng, yaml.safe_load(contents))
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except RecursionError:  # the writer gives up before the reader does
        return contents + b"deep: " + b"[" * 3000 + b"]" * 3000


def in_header(rng: random.Random, contents: bytes) -> bytes:
    """The header of a safetensors file is another, or has another length."""
    (length,) = struct.unpack("<Q", contents[:8])
    if rng.random() < 0.2:
        wrong = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + contents[8:]
    header = json.dumps(in_value(rng, json.loads(contents[8 : 8 + length])))
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + contents[8 + length :]


def in_value(rng: random.Random, value: Any) -> Any:
    """`value` with a change somewhere in it."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return rng.choice((*HOSTILE, nested(900)))
    holder, key = rng.choice(places)
    what = rng.random()
    if what < 0.55:
        holder[key] = rng.choice((*HOSTILE, nested(rng.choice((3, 60, 400)))))
    elif what < 0.65:
        del holder[key]
    elif what < 0.75 and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", str(key)[:-1], "\U0001f4a5", "", "__class__"))] = holder[key]
    elif what < 0.9:
        other, there = rng.choice(places)
        holder[key], other[there] = other[there], holder[key]
    elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] *= rng.choice((-1, 0, 3, 0.5, 10**6, 10**12))
    return value


def _places(value: Any) -> Any:
    """(mapping or list, key) of every value in `value`."""
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        yield value, key
        yield from _places(item)
