"""The engine of the CPU: one expert after the other, forward and backward by hand.

For products of 16 bits oneDNN writes code for each shape, and it and torch keep that of the last
1,024 shapes each, a megabyte a shape, in pieces that keep the memory between them from being given
back. Rows and ranks are filled up so that there are few shapes (`filling`), and here they keep
`KEPT_SHAPES`, where the environment does not say otherwise.
"""

import os

KEPT_SHAPES = 256  # the layers beside the experts have a few dozen
_NAMES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
for _name in _NAMES:
    os.environ.setdefault(_name, str(KEPT_SHAPES))  # read at the first product of a process


def kept_shapes() -> int:
    """Of how many shapes oneDNN keeps the code in this process, as the environment says."""
    said = os.environ[_NAMES[1]]
    return int(said) if said.isdecimal() else KEPT_SHAPES


from drlora.ops.loop import engine as _engine  # noqa: E402, F401  # it registers itself
