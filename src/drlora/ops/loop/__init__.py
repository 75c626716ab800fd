"""The engine of the CPU: one expert after the other, forward and backward by hand.

For products of 16 bits oneDNN writes code for each shape, and it and torch keep that of the last
1,024 shapes each, a megabyte a shape, in pieces that keep the memory between them from being given
back. Rows and ranks are filled up so that there are few shapes (`filling`), and here they keep
`KEPT_SHAPES`, where the environment does not say otherwise.
"""

import os

KEPT_SHAPES = 256  # the layers beside the experts have a few dozen
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(KEPT_SHAPES))  # read at the first product of a process

from drlora.ops.loop import engine as _engine  # noqa: E402, F401  # it registers itself
