"""What `drlora inspect` prints: blocks, sizes, memory, and the growth plan as a chart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter

from rich.console import Console
from rich.table import Table

from drlora.errors import counted
from drlora.runs.inspection import (
    AdapterSize,
    Beside,
    BlockShape,
    BudgetNotReached,
    GrowthForecast,
    Inspection,
    Memory,
    SizeAtRank,
)

CHART_WIDTH = 60
CHART_HEIGHT = 6
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Show what `inspect` found."""
    console = console or Console(highlight=False, soft_wrap=True)
    parameters, adapter = found.parameters, found.adapter
    console.print(
        f"{found.model} ({found.architecture}): {parameters.total:,} parameters, "
        f"{parameters.experts:,} of them in experts"
    )
    console.print(_block_table(found.blocks))
    console.print(f"adapter on {', '.join(adapter.projections)} of every expert:")
    for name in ("r_init", "r_target", "r_max"):
        row: SizeAtRank = getattr(adapter, name)
        console.print(f"  {name:8} {row.rank:4}  {row.parameters:>15,} parameters")
    stored = adapter.stored
    if stored.rank != adapter.r_target.rank:
        console.print(
            f"  stored   {stored.rank:4}  {stored.parameters:>15,} parameters, "
            f"more than r_target: this method needs room for ranks to move"
        )
    _print_beside(adapter.beside, console)
    console.print(f"  budget   {adapter.budget_ranks:,} ranks over all layers and projections")
    _print_memory(found.memory_gb, adapter, console)
    if found.growth is not None:
        _print_growth(found.growth, console)
    for warning in found.warnings:
        console.print(f"warning: {warning}")


def _print_beside(beside: Beside, console: Console) -> None:
    if beside.layers:
        lora = f"{beside.ordinary_lora:,} in LoRA on {beside.layers} other layers"
        console.print(f"    of them {lora}")
    if beside.routers:
        console.print(f"    of them {beside.routers:,} in routers")
    if beside.modules_to_save:
        console.print(f"    of them {beside.modules_to_save:,} in modules trained in full")


def _block_table(blocks: Sequence[BlockShape]) -> Table:
    """One row for each run of blocks of the same shape."""
    table = Table(title=counted(len(blocks), "MoE block"), box=None, pad_edge=False)
    for name in ("blocks", "experts", "top-k", "gate_up (E, 2I, H)", "down (E, H, I)"):
        table.add_column(name)
    shape = attrgetter("experts", "top_k", "hidden_size", "expert_width")
    for (e, k, h, i), run in itertools.groupby(blocks, key=shape):
        names = [block.name for block in run]
        label = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        shapes = (str((e, 2 * i, h)), str((e, h, i)))
        table.add_row(label, str(e), str(k or "?"), *shapes)
    return table


def _print_memory(memory: Memory, adapter: AdapterSize, console: Console) -> None:
    parts = memory.parts
    in_float32 = "" if adapter.beside.modules_to_save else " in float32"
    kept = memory.dtype
    if memory.quantised != "not quantised":
        kept = f"{memory.quantised}, the others {memory.dtype}"
    console.print(
        f"memory in GB: weights {memory.weights:.2f} ({kept}), adapter"
        f"{in_float32} {parts.adapter:.2f}, gradients {parts.gradients:.2f}, "
        f"optimizer {parts.optimizer:.2f}; activations of {memory.tokens:,} tokens about "
        f"{memory.activations:.1f} ({memory.activations_with_checkpointing:.1f} with "
        f"gradient checkpointing)"
    )
    console.print(
        f"  what is trained takes {memory.adapter_at_budget:.2f} GB "
        f"(r_max for every expert would be {memory.adapter_at_r_max_everywhere:.2f} GB)"
    )
    totals = ", ".join(f"{row.r_target}: {row.total:.1f}" for row in memory.by_rank)
    console.print(f"  in all, by r_target: {totals} GB")


def _print_growth(growth: GrowthForecast | BudgetNotReached, console: Console) -> None:
    console.print(f"growth over {growth.steps:,} steps:")
    if isinstance(growth, BudgetNotReached):
        console.print(f"  the budget is not reached: {growth.reason}")
        return
    console.print(f"  {growth.schedule}")
    console.print(f"  quota {growth.quota_module_ranks} module ranks a layer and event")
    for line in [*growth_chart(growth), *progress_rows(growth)]:
        console.print(f"  {line}")
    console.print(
        f"  the budget is reached at step {growth.reached_at_step:,}, "
        f"{growth.reached_at_share:.0%} of the run"
    )


def progress_rows(growth: GrowthForecast) -> list[str]:
    """Events and mean rank by a few round numbers of steps."""
    events, steps = growth.mean_ranks, growth.steps
    if not events:
        return []
    rows = [f"{'by step':>10} {'events':>7} {'mean rank':>10}"]
    for step in [*range(_round_part(steps), steps, _round_part(steps)), steps]:
        done = [event for event in events if event.step <= step]
        mean = done[-1].mean_rank if done else growth.start_rank
        rows.append(f"{step:>10,} {len(done):>7,} {mean:>10.3f}")
    return rows


def _round_part(steps: int) -> int:
    """About a sixth of the steps, as a number with one digit that is not 0."""
    sixth = max(1, steps // 6)
    unit = 10 ** (len(str(sixth)) - 1)
    return sixth // unit * unit


def growth_chart(growth: GrowthForecast) -> list[str]:
    """Mean rank over the run, as lines of blocks; none where ranks do not change."""
    events = growth.mean_ranks
    if not events:
        return []
    start, steps = growth.start_rank, growth.steps
    ranks = [start, *(event.mean_rank for event in events)]
    at = [0, *(event.step for event in events)]
    columns = []
    for column in range(CHART_WIDTH):
        step = (column + 1) * steps / CHART_WIDTH
        columns.append(ranks[sum(known <= step for known in at) - 1])
    high = max(ranks)
    lines = []
    for row in reversed(range(CHART_HEIGHT)):
        filled = [min(8, max(0, round(8 * (c / high * CHART_HEIGHT - row)))) for c in columns]
        label = f"{high:g}" if row == CHART_HEIGHT - 1 else ""
        lines.append(f"{label:>6} {''.join(_EIGHTHS[eighths] for eighths in filled)}".rstrip())
    axis = f"step 0{steps:>{CHART_WIDTH - 6},}"
    return [*lines, f"{'':6} {axis}   mean rank, from {start:g}"]
