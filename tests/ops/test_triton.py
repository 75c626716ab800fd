"""Law 1 for the Triton kernels: the engine equals `naive`, in Triton's interpreter and on a GPU.

Run: make test ARGS=tests/ops/test_triton.py. With a GPU, first: make test ARGS="-m gpu -x -n 0".
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_cases import CASES, LARGE, prepare, relative_errors, run

from drlora.errors import ConfigError
from drlora.ops import adapted_experts
from drlora.ops.contract import make_case

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it exists for Linux only)",
)
# The interpreter cuts bfloat16 off where a chip rounds it.
INTERPRETER_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def run_program(name, cache, **environment):
    script = Path(__file__).parents[1] / "triton_cases.py"
    done = subprocess.run(
        [sys.executable, str(script), name],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(once):
    def make(folder):
        errors = run_program("interpret", folder, TRITON_INTERPRET="1")
        (folder / "errors.json").write_text(json.dumps(errors))

    return json.loads((once("triton", make) / "errors.json").read_text())


def assert_small(errors, tolerance):
    # `not <=` and not `>`: NaN is an error too.
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_in_the_interpreter(interpreted, case):
    dtype = CASES[case].get("dtype", torch.float32)
    assert_small(interpreted[case], INTERPRETER_TOLERANCE[dtype])


@needs_triton
@pytest.mark.slow
def test_compiles_for_hopper(tmp_path):
    found = run_program("compile", tmp_path, TRITON_INTERPRET="0")
    kernels = {variant.split()[0] for variant in found}
    products = {"shrink_kernel", "product_kernel", "factor_grad_kernel"}
    assert kernels == {*products, "silu_mul_kernel", "silu_mul_backward_kernel", "combine_kernel"}
    assert all(takes["shared_bytes"] <= 227 * 1024 for takes in found.values()), found
    for variant, takes in found.items():
        if variant.split()[0] in products:
            assert takes["products"] and takes["asynchronous copies"], (variant, takes)


@needs_triton
def test_refuses_the_cpu():
    base, pieces, leaves, index = make_case([1, 2])
    with pytest.raises(ConfigError, match="needs a GPU.*engine='auto'"):
        adapted_experts(leaves[0], index, leaves[1], base, pieces, engine="triton")


@needs_triton
def test_refuses_double_precision():
    base, pieces, leaves, index = make_case([1, 2], dtype=torch.float64)
    with pytest.raises(ConfigError, match="not torch.float64; choose engine='loop'"):
        adapted_experts(leaves[0], index, leaves[1], base, pieces, engine="triton")


def test_says_how_to_go_on_without_triton(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("drlora.ops.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    base, pieces, leaves, index = make_case([1, 2])
    with pytest.raises(ConfigError, match="needs the package triton.*engine='auto'"):
        adapted_experts(leaves[0], index, leaves[1], base, pieces, engine="triton")


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_equals_naive_on_a_gpu(case):
    settings = {**CASES, **LARGE}[case]
    dtype = settings.get("dtype", torch.float32)
    tolerance = TOLERANCE.get(dtype, INTERPRETER_TOLERANCE[dtype])
    assert_small(relative_errors(settings, "cuda"), tolerance)


@needs_triton
@pytest.mark.gpu
def test_repeats_to_the_bit_and_never_waits_for_the_device():
    prepared = prepare(LARGE["gate, up and down, bfloat16"], "cuda")
    first = run("triton", *prepared)  # puts the ranks on the device, which does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run("triton", *prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
