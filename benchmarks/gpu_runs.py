"""Cases of `benchmarks.gpu` that are programs: the tests that need a GPU, and real fine-tuning.

Each is a process of its own, so a package that is missing costs its case alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu_setting import Setting
from benchmarks.harness import Row, where

ROOT = Path(__file__).parent.parent
TESTS = ["tests/ops/test_triton.py", "tests/ranks/test_on_a_device.py",
         "tests/ranks/test_saliency.py"]  # fmt: skip
MODELS = {
    "embedded": "embedded",
    "qwen2-moe-tiny": "experiments/models/qwen2-moe-tiny",
    "llama-moe-tiny": "experiments/models/llama-moe-tiny",
}
VERDICT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b\s+(\S+)|(\S+::\S.*?)\s+(PASSED|FAILED)")


def tests(setting: Setting) -> Iterator[Row]:
    """The tests that are marked `gpu`; without a GPU, those of a device that run on the CPU."""
    which = ["-m", "gpu", *TESTS] if setting.on_gpu else ["-k", "cpu and float32", TESTS[1]]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        *which,
    ]
    if setting.on_gpu and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # kernels are compiled side by side
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started, counts, failed, last = time.monotonic(), {"PASSED": 0, "FAILED": 0}, [], ""
    ended = "cut off"
    try:
        with _process(command, environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                if found := VERDICT.search(line):
                    verdict = found[1] or found[4]
                    counts[verdict] = counts.get(verdict, 0) + 1
                    if verdict in ("FAILED", "ERROR"):
                        failed.append((found[2] or found[3])[:200])
            ended = f"exit {process.wait()}"
    finally:  # also where the time is up
        yield {
            "case": "gpu tests", "implementation": "pytest", "passed": counts["PASSED"],
            "failed": failed, "ended": ended, "said": last[:300],
            "wall_s": time.monotonic() - started, **where(),
        }  # fmt: skip


def fine_tunes(setting: Setting) -> Iterator[Row]:
    """`drlora train` on small real models, by the embedded recipe."""
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            yield _fine_tune(name, model, Path(folder) / "run", setting)
        if not setting.on_gpu:
            return


def _fine_tune(name: str, model: str, run: Path, setting: Setting) -> Row:
    changes = [f"output_dir={run}", f"model={model}"]
    if not setting.on_gpu:
        changes += ["training.max_steps=4", "adapter.settle_steps=1", "adapter.grow_every=1",
                    "training.warmup_steps=1", "training.per_device_train_batch_size=2",
                    "evaluation.loss_examples=2", "evaluation.exact_match=false",
                    "evaluation.samples=0", "training.use_cpu=true"]  # fmt: skip
    command = [sys.executable, "-m", "drlora", "train", "embedded", *changes]
    started, said = time.monotonic(), []
    with _process(command, {**os.environ, "HF_HUB_OFFLINE": "1"}) as process:
        assert process.stdout is not None
        said = [line.strip() for line in process.stdout if line.strip()]
        ended = process.wait()
    row: Row = {"case": f"gpu fine-tune {name}", "implementation": "drlora train",
                "wall_s": time.monotonic() - started, **where()}  # fmt: skip
    if not (run / "result.json").exists():
        return {**row, "error": f"exit {ended}: {(said or ['nothing was said'])[-1][:300]}"}
    result = json.loads((run / "result.json").read_text("utf-8"))
    kept = ("before", "after", "budget", "steps", "verdict", "device", "engines",
            "peak_gpu_memory_bytes")  # fmt: skip
    known = {key: result[key] for key in kept if key in result}
    return {**row, **known, "train_s": result["seconds"]}


@contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """With both outputs in one; it and its children end with the block."""
    paths = [str(ROOT / "src"), str(ROOT), environment.get("PYTHONPATH", "")]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def head_loss(setting: Setting) -> Iterator[Row]:
    """Loss and gradient of a head of 151,936 tokens: all logits, and the targets in chunks."""
    from drlora.evaluation import head  # the other cases of this file do without the package

    hidden, vocabulary, tokens = (2048, 151_936, 2048) if setting.on_gpu else (16, 64, 24)
    torch.manual_seed(0)
    device, dtype = setting.device, torch.bfloat16
    weight_VH = torch.randn(vocabulary, hidden, device=device, dtype=dtype) * 0.02
    for targets in (tokens, tokens // 8):
        x_NH = torch.randn(targets, hidden, device=device, dtype=dtype, requires_grad=True)
        target_N = torch.randint(0, vocabulary, (targets,), device=device)
        found = {}
        for name, function in (("all logits", _plain), ("targets", head.target_losses)):
            if setting.on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            loss = function(x_NH, weight_VH, None, target_N).mean()
            (grad_NH,) = torch.autograd.grad(loss, x_NH)
            peak = torch.cuda.max_memory_allocated() - before if setting.on_gpu else None
            found[name] = (loss.item(), grad_NH.float(), peak)
            del loss, grad_NH
        (loss, grad, _), (other, other_grad, _) = found.values()
        off = float((grad - other_grad).norm() / grad.norm())
        for name, (value, _, peak) in found.items():
            yield {
                "case": f"gpu head V{vocabulary} H{hidden} targets {targets}",
                "implementation": name, "loss": value, "peak_extra_bytes": peak,
                "gradient_off": off, "loss_off": abs(other / loss - 1), **where(),
            }  # fmt: skip


def _plain(
    x_NH: torch.Tensor, weight_VH: torch.Tensor, bias: None, target_N: torch.Tensor
) -> torch.Tensor:
    logits_NV = torch.nn.functional.linear(x_NH, weight_VH).float()
    return torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none")
