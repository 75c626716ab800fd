"""The caches of products by shape are small, unless whoever starts the process says otherwise."""

import os
import subprocess
import sys

import pytest

from drlora.ops.loop import KEPT_SHAPES

NAMES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
READ = f"import os, drlora.ops.loop; print([os.environ[name] for name in {NAMES!r}])"


@pytest.mark.parametrize("given", [{}, {"LRU_CACHE_CAPACITY": "7"}])
def test_capacities_are_set_where_they_are_not(given):
    environment = {k: v for k, v in os.environ.items() if k not in NAMES} | given
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([given.get(name, str(KEPT_SHAPES)) for name in NAMES])
