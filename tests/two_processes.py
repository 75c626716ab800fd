"""One of two gloo processes that train one model: `python two_processes.py FOLDER RANK`.

Used by test_many_processes, which trains the same in one process and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model, trainable
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import drlora

TOTAL, CUT = 200, 100  # ranks grow after steps 30, 50, ... 190
SETTINGS: dict[str, Any] = dict(
    r_init=2, r_target=6, r_max=16, p_grow=0.2, grow_every=20, warmup_steps=30, settle_steps=10,
    lora_alpha=8.0, router="train",
)  # fmt: skip
# Everything that writes to single rows, which a process may or may not hold.
ROWS: dict[str, Any] = dict(
    young_rows="inherit",
    options={"young_a": "gradient", "move_share": 0.2},
    grow_every=4,
    warmup_steps=6,
    settle_steps=2,
)
SHORT = 20
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Job:
    """A run by one process, or by several under DDP or FSDP2; `start` is a checkpoint."""

    def __init__(self, engine: str = "", start: Path | None = None, total: int = TOTAL, **changes):
        torch.manual_seed(0)
        base = make_model(num_hidden_layers=1)
        config = drlora.DrLoraConfig(**{**SETTINGS, **changes})
        self.model = (
            PeftModel.from_pretrained(base, start, is_trainable=True)
            if start
            else get_peft_model(base, config)
        ).train()
        self.net = self.model
        if engine == "ddp":
            self.net = DistributedDataParallel(self.model)
        elif engine == "fsdp2":
            for layer in self.model.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        decay = 0.1 if "move_share" in changes.get("options", {}) else 0.0
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=1e-3, weight_decay=decay)
        self.dynamics = drlora.RankDynamics(self.model, total)
        self.losses, self.history = [], {}
        if start:
            self.dynamics.load_state_dict(load_file(start / "dynamics.safetensors"))
            saved = torch.load(start / "optimizer.pt", weights_only=True)
            set_optimizer_state_dict(self.model, self.optimizer, saved, options=_FULL)

    def go(self, stop: int) -> Job:
        """Train up to step `stop`, each process on its half of every batch of four examples."""
        mine = slice(None)
        if dist.is_initialized():
            mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        for step in range(self.dynamics.step, stop):
            batch = {k: v[mine] for k, v in make_batch(step, rows=4).items()}
            loss = self.net(**batch).loss
            loss.backward()
            self.dynamics.before_optimizer_step()
            self.optimizer.step()
            if self.dynamics.after_optimizer_step(self.optimizer):
                for key, value in self.dynamics.state_dict().items():
                    self.history[f"{step + 1} {key}"] = value.clone()
            self.optimizer.zero_grad()
            self.losses.append(_mean(loss.detach()))
        return self

    def save(self, folder: Path) -> Job:
        """A checkpoint that any number of processes can continue."""
        adapter = drlora.adapter_state(self.model)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_FULL)
        if not dist.is_initialized() or dist.get_rank() == 0:
            with drlora.write_checkpoint(folder) as new:
                self.model.save_pretrained(new, state_dict=adapter)
                torch.save(optimizer, new / "optimizer.pt")
                save_file(self.dynamics.state_dict(), new / "dynamics.safetensors")
        if dist.is_initialized():
            dist.barrier()
        return self

    def result(self) -> dict[str, torch.Tensor]:
        """Losses, the statistics after each event, and the final adapter in full."""
        final = {f"final {key}": value for key, value in drlora.adapter_state(self.model).items()}
        return {"losses": torch.stack(self.losses), **self.history, **final}


def _mean(loss: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss


def coming_apart(rank: int) -> list[str]:
    """What is said when one process has another seed, other statistics or other ranks."""

    def other_seed(job: Job) -> None:
        for adapter in job.dynamics.adapters.values():
            for pool in adapter.rank_pools.values():
                pool.seed += 1

    def other_routing(job: Job) -> None:
        next(iter(job.dynamics.adapters.values())).frequency[0] += 1e-3

    def other_ranks(job: Job) -> None:
        next(iter(job.dynamics.adapters.values())).rank_pools["down"].grant([1, 0, 0, 0, 0, 0], 5)

    said = []
    for after, spoil in ((0, other_seed), (5, other_routing), (5, other_ranks)):
        job = Job(total=SHORT, grow_every=4, warmup_steps=6, settle_steps=1).go(after)
        if rank == 1:
            spoil(job)
        try:
            job.go(SHORT)
            said.append("nothing")
        except drlora.SyncError as error:
            said.append(str(error))
    return said


def main() -> None:
    """All runs of this process, one file each."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for engine in ("ddp", "fsdp2"):
        job = Job(engine).go(CUT).save(folder / f"{engine}-{CUT}").go(TOTAL)
        save_file(job.result(), folder / f"{engine}.{rank}")
    save_file(Job("fsdp2", folder / f"one-{CUT}").go(TOTAL).result(), folder / f"resumed.{rank}")
    rows = Job("fsdp2", total=SHORT, **ROWS).go(SHORT)
    save_file(rows.result(), folder / f"rows.{rank}")
    (folder / f"said.{rank}").write_text("\n".join(coming_apart(rank)))


if __name__ == "__main__":
    main()
