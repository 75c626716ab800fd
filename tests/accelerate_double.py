"""accelerate's FSDP2 on a CPU: one name is replaced, everything else is accelerate's own code.

accelerate turns to FSDP where its state is called MULTI_<accelerator>; several processes on a CPU
are called MULTI_CPU, and would be given DDP without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


@contextmanager
def fsdp_on_a_cpu() -> Iterator[None]:
    """Meanwhile, a state that is made with an FSDP plugin takes the branch of accelerators."""
    real = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        processes = PartialState(kwargs.get("cpu", False))
        if kwargs.get("fsdp_plugin") is not None:
            known = processes.distributed_type
            assert known in (
                DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP
            )  # fmt: skip
            if known == DistributedType.MULTI_CPU:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        real(self, *args, **kwargs)

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = real
