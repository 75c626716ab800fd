"""The caches of products by shape are small, unless whoever starts the process says otherwise."""

import importlib
import os

from drlora.ops import loop

NAMES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def test_capacities_are_set_where_they_are_not(monkeypatch):
    monkeypatch.setenv(NAMES[0], "7")
    monkeypatch.delenv(NAMES[1], raising=False)
    importlib.reload(loop)
    assert [os.environ[name] for name in NAMES] == ["7", str(loop.KEPT_SHAPES)]
