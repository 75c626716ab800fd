"""What the processes of one run share, over torch.distributed's default group.

One process alone, or a program that never set a group up, is the common case and costs nothing.
Which rows of a parameter a process holds is said in `held`, what DeepSpeed makes of one in `zero`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from drlora.errors import DrLoraError, SyncError

Found = TypeVar("Found")


def are_several() -> bool:
    """Whether this run has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """How many processes this run has."""
    return dist.get_world_size() if are_several() else 1


def best_device() -> torch.device:
    """The accelerator that this machine has, or the CPU.

    A build of torch for CUDA names its accelerator also where there is no driver for it.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def is_main() -> bool:
    """Whether this is the process that writes files and talks: the first, or the only one."""
    return not are_several() or dist.get_rank() == 0


def add_up(sums: Tensor) -> None:
    """Replace `sums` by their sum over all processes."""
    if are_several():
        dist.all_reduce(sums)


def wait_for_all() -> None:
    """Return when every process has come here."""
    if are_several():
        dist.barrier()


def on_main(ask: Callable[[], Found]) -> Found:
    """What `ask` returns in the main process, in every process.

    Raises:
        DrLoraError: in every process, if it is raised there.
        OSError: likewise.
    """
    if not are_several():
        return ask()
    answer: list = [None, None]
    if is_main():
        try:
            answer[0] = ask()
        except (DrLoraError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def refuse_differing(
    step: int, parts: Mapping[str, Iterable[Tensor]], device: torch.device
) -> None:
    """Stop a run whose processes have come apart; a few bytes are exchanged.

    Args:
        step: of the run, for the message.
        parts: name -> tensors that must be the same in every process, to the bit.
        device: one that the processes can talk from.

    Raises:
        SyncError: in every process, naming the parts and the processes that differ from the first.
    """
    if not are_several():
        return
    mine = torch.tensor([_digest(tensors) for tensors in parts.values()], device=device)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    differs = torch.stack(everyones) != everyones[0]
    if differs.any():
        names = [
            name for name, is_odd in zip(parts, differs.any(0).tolist(), strict=True) if is_odd
        ]
        odd = differs.any(1).nonzero().flatten().tolist()
        raise SyncError(
            f"step {step}: processes {odd} differ from process 0 in {', '.join(names)}, so they "
            f"would grow different models. Give every process the same seed, settings and adapter, "
            f"let the engine reduce all gradients, and continue from the last checkpoint."
        )


def _digest(tensors: Iterable[Tensor]) -> int:
    """63 bits of a hash of their bytes."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(found.digest(), "big") >> 1
