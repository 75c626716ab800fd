"""Which rows a split such as `train[:90%]` stands for, and whether two splits share any."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import ReadInstruction

from drlora.errors import DataError


def base_of(split: str) -> str:
    """`train` of `train[:90%]`."""
    return split.partition("[")[0]


def rows_of(split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """The rows of a split, as (name of the split without its slice, rows counted from 0).

    Args:
        split: a name, which may carry a slice; several may be joined by `+`.
        sizes: name -> number of examples.

    Raises:
        DataError: if it is not written as `datasets` reads it, or goes beyond the data.

    >>> rows_of("train[:90%]", {"train": 50})
    [('train', range(0, 45))]
    """
    try:
        found = ReadInstruction.from_spec(split).to_absolute(dict(sizes))
    except (ValueError, AssertionError, KeyError) as error:
        raise DataError(
            f"split {split!r} of {dict(sizes)} examples cannot be read: {error}; write it as "
            f"'train', 'train[:90%]', 'train[100:]' or 'train[10:20]'"
        ) from error
    return [(one.splitname, range(one.from_ or 0, one.to or 0)) for one in found]
