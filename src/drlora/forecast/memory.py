"""Memory of a run by part, from what its step takes on paper.

On a GPU, what torch allocates there:

    weights + adapter + optimizer + step (activations and gradients) + CUDA_BYTES

On a CPU, what the process has resident at its peak; four parts come to it:

    process       Python and the libraries, as they are when the forecast is made, and LATER_BYTES
    checkpoint    pages of the file of weights that stay mapped, though the numbers were copied:
                  experts that are put together or packed when they are loaded. The system takes
                  them back where memory is short
    allocator     ALLOCATOR of the step: blocks of other sizes do not fit where earlier ones were
    code          SHAPE_BYTES for each shape of a 16-bit product whose code is kept

LATER_BYTES, ALLOCATOR and SHAPE_BYTES were found by benchmarks/plan.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from safetensors import safe_open

from drlora.ops.loop import kept_shapes

LATER_BYTES = 100e6  # imported or made at the first step
ALLOCATOR = 0.15
SHAPE_BYTES = 0.8e6  # of code that oneDNN writes
CUDA_BYTES = 0.6e9  # of the context and of libraries
NUMBER_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4}
EIGHT_BITS = 1 + 4 / 256  # bytes of a number, of 256 that share a float32
# Bytes that an optimizer keeps for a trained number, by the first words of its name that fit;
# float32 moments of Adam are assumed of all others.
OPTIMIZER_BYTES = {
    "sgd": 0.0,
    "adafactor": 0.0,  # of rows and columns alone
    "adamw_8bit": 2 * EIGHT_BITS,
    "adamw_bnb_8bit": 2 * EIGHT_BITS,
    "adamw_torch_8bit": 2 * EIGHT_BITS,
    "paged_adamw_8bit": 0.0,  # may be in the host's memory
    "paged": 0.0,
    "lion_8bit": EIGHT_BITS,
    "lion": 4.0,
    "": 8.0,
}


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes at the peak, by part; see above."""

    process: float
    weights: float
    checkpoint: float
    adapter: float
    optimizer: float
    step: float
    allocator: float
    code: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, float]:
        """Plain values, and their sum as `total`."""
        return {name: round(value) for name, value in {**asdict(self), "total": self.total}.items()}


def optimizer_bytes(optim: str) -> float:
    """That an optimizer keeps for a trained number, by transformers' name of it."""
    return next(size for name, size in OPTIMIZER_BYTES.items() if optim.startswith(name))


def memory_forecast(
    model: PeftModel,
    weight_bytes: float,
    peak_bytes: float,
    optim: str,
    checkpoint_bytes: float = 0.0,
    on_cpu: bool = True,
    works_in: torch.dtype = torch.float32,
) -> MemoryForecast:
    """Put the parts together.

    Args:
        model: on paper, with its adapter.
        weight_bytes: of the base as it is kept.
        peak_bytes: of a step.
        optim: the optimizer, by transformers' name.
        checkpoint_bytes: of pages that stay mapped.
        on_cpu: whether the run is on the CPU.
        works_in: what the experts' products are computed in.
    """
    writes_code = on_cpu and works_in.itemsize == 2
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(p.numel() * p.element_size() for p in trained)
    process = psutil.Process().memory_info().rss + LATER_BYTES if on_cpu else CUDA_BYTES
    return MemoryForecast(
        process=process,
        weights=weight_bytes,
        checkpoint=checkpoint_bytes if on_cpu else 0.0,
        adapter=adapter,
        optimizer=sum(p.numel() for p in trained) * optimizer_bytes(optim),
        step=peak_bytes,
        allocator=ALLOCATOR * peak_bytes if on_cpu else 0.0,
        code=SHAPE_BYTES * kept_shapes() if writes_code else 0.0,
    )


def mapped_bytes(folder: str | Path, shapes: Mapping[str, Any], packed: bool) -> float:
    """Of a checkpoint's tensors that are no parameter as they are, or are to be packed.

    Args:
        folder: with .safetensors files; of a model of the hub that is not here nothing is known.
        shapes: parameter -> a tensor of its shape, of the model without memory.
        packed: whether experts are put into few bits when they are loaded.
    """
    total = 0.0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                if name not in shapes or (packed and ".experts." in name):
                    size = NUMBER_BYTES.get(stored.get_dtype(), 1)
                    total += size * torch.Size(stored.get_shape()).numel()
    return total
