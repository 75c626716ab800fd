"""What every test shares: one thread, no network, a fixed seed. Run: make test"""

import gc
import os

# Read when the libraries are imported, so set before any of them is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: the first call of an operator is slow for reasons that are not the test's.
settings.register_profile("drlora", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("drlora")


# Files with single tests of many seconds. They go first, so that short ones are left at the end of
# a run on several workers, for the worker that is done to take from the other.
_LONG = {"test_benchmarks", "test_callback", "test_chat_templates", "test_compare", "test_compile",
         "test_crashes", "test_examples", "test_fsdp", "test_many_processes", "test_resume",
         "test_traps", "test_train_cli", "test_triton"}  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> int:
    """Start each test from the same torch seed, whatever ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`once(name, make)`: a folder that `make(folder)` filled, for all workers together.

    A module's fixture is made again by each worker that gets one of the module's tests, and again
    when the worker comes back to the module.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make_once(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not made.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                made.touch()
        return folder

    return make_once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first; those marked `gpu` are skipped where there is no CUDA device."""
    items.sort(key=lambda item: item.path.stem not in _LONG)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Libraries that are imported by now stay: no collection looks at their objects again.

    transformers' Trainer collects garbage at the end of every run, a tenth of a second each time.
    """
    gc.collect()
    gc.freeze()
