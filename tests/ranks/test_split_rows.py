"""Rows that ZeRO cuts anywhere are written, forgotten and corrected as whole ones are.

DeepSpeed is not needed: its marks are put on parameters by hand, one process after another. What it
does itself is in tests/trainer/test_deepspeed.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import drlora
from drlora.distributed import zero
from drlora.distributed.held import Block, add_up_rows, blocks_of, trained_tensor, write_rows
from drlora.ranks.optimizer_rows import forget_rows, state_of
from drlora.ranks.young_rows import OwnClocks
from drlora.ranks.zero import WatchedZero

ROWS, WIDTH = 7, 5


def cut(parameter: nn.Parameter, start: int, stop: int, before: int = 3) -> nn.Parameter:
    """The parameter as ZeRO-2 leaves it to a process that trains elements `start` to `stop - 1`."""
    found = nn.Parameter(parameter.detach().clone())
    flat = nn.Parameter(torch.full((before + stop - start + 2,), 9.0))
    flat.data[before : before + stop - start] = parameter.detach().view(-1)[start:stop]
    found._hp_mapping = None
    if stop > start:
        found._hp_mapping = SimpleNamespace(
            param_group_index=0,
            hp_fragment_address=SimpleNamespace(start=before, numel=stop - start),
            lp_fragment_address=SimpleNamespace(start=start, numel=stop - start),
        )
    found._drlora_zero = SimpleNamespace(single_partition_of_fp32_groups=[flat])
    return found


def bounds_of(cuts: list[int]) -> list[tuple[int, int]]:
    edges = [0, *sorted(cuts), ROWS * WIDTH]
    return list(zip(edges, edges[1:], strict=False))


def put_together(parts: list[tuple[nn.Parameter, tuple[int, int]]]) -> Tensor:
    """What all processes train, in one piece; nothing beside it may have been touched."""
    pieces = []
    for parameter, (start, stop) in parts:
        flat = parameter._drlora_zero.single_partition_of_fp32_groups[0].detach()
        assert (flat[:3] == 9).all() and (flat[3 + stop - start :] == 9).all()
        pieces.append(flat[3 : 3 + stop - start])
    return torch.cat(pieces).view(ROWS, WIDTH)


def make_parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))


CUTS = st.lists(st.integers(0, ROWS * WIDTH), max_size=3)
SOME = st.lists(st.integers(0, ROWS - 1), unique=True)


@given(CUTS)
def test_the_blocks_of_all_processes_are_the_parameter(cuts):
    counted = torch.zeros(ROWS, WIDTH)
    for start, stop in bounds_of(cuts):
        for block in blocks_of(cut(make_parameter(), start, stop)):
            counted[block.first : block.end, block.columns] += 1
    assert (counted == 1).all()


@given(CUTS, SOME, st.booleans())
def test_rows_are_written_wherever_they_are_kept(cuts, rows, is_number):
    index = torch.tensor(rows, dtype=torch.int64)
    values: Any = 0.5 if is_number else torch.randn(len(rows), WIDTH)
    wanted = make_parameter()
    write_rows(wanted, index, values)
    parts = [(cut(make_parameter(), *bounds), bounds) for bounds in bounds_of(cuts)]
    for parameter, _ in parts:
        write_rows(parameter, index, values)
        assert torch.equal(parameter, wanted)  # what this process computes with
    assert torch.equal(put_together(parts), wanted)


@given(CUTS, SOME)
def test_moments_are_forgotten(cuts, rows):
    index = torch.tensor(rows, dtype=torch.int64)
    whole = {"exp_avg": make_parameter().detach().clone(), "step": torch.tensor(3.0)}
    forget_rows(make_parameter(), whole, index)
    parts = [(cut(make_parameter(), *bounds), bounds) for bounds in bounds_of(cuts)]
    for parameter, _ in parts:
        flat = trained_tensor(parameter)
        if flat is not None:  # the weights lie as moments do
            forget_rows(parameter, {"exp_avg": flat.data, "step": torch.tensor(3.0)}, index)
    assert torch.equal(put_together(parts), whole["exp_avg"])


@given(CUTS)
def test_young_rows_are_corrected(cuts):
    births = torch.tensor([0, 2, 0, 2, 1, 0, 2], dtype=torch.int32)

    def train(a: nn.Parameter, b: nn.Parameter, grads: list[Tensor]) -> None:
        pool: Any = SimpleNamespace(lora_A=a, lora_B=b, birth=births)
        clocks, trained = OwnClocks(), [t for t in map(trained_tensor, (a, b)) if t is not None]
        if not trained:
            return
        optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0)
        for step in range(1, 5):
            for parameter, tensor in zip((a, b), map(trained_tensor, (a, b)), strict=True):
                if tensor is not None:
                    tensor.grad = torch.zeros_like(tensor)
                    for block in blocks_of(parameter):
                        born_R1 = (births < step)[block.first : block.end, None]
                        grad_RI = grads[step][block.first : block.end, block.columns] * born_R1
                        block.of(tensor.grad).copy_(grad_RI)
            optimizer.step()
            clocks.correct(optimizer, [pool], step)

    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(5)]
    whole = make_parameter(), make_parameter()
    train(*whole, grads)
    pairs = [(cut(make_parameter(), *at), cut(make_parameter(), *at)) for at in bounds_of(cuts)]
    for pair in pairs:
        train(*pair, grads)
    for number, wanted in enumerate(whole):
        parts = [(pair[number], at) for pair, at in zip(pairs, bounds_of(cuts), strict=True)]
        torch.testing.assert_close(put_together(parts), wanted.detach(), rtol=0, atol=1e-6)


def test_a_process_that_trains_nothing_of_a_parameter_knows_what_is_kept():
    parameter, other = cut(make_parameter(), 4, 4), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([other])
    other.grad = torch.ones(3)
    optimizer.step()
    assert blocks_of(parameter) == [] and trained_tensor(parameter) is None
    assert set(state_of(optimizer, parameter)) == {"step", "exp_avg", "exp_avg_sq"}


def test_an_ordinary_parameter_is_one_block():
    assert blocks_of(make_parameter()) == [Block(0, ROWS)]


def test_an_optimizer_that_was_never_shown_is_asked_for():
    parameter = cut(make_parameter(), 0, 5)
    del parameter._drlora_zero
    with pytest.raises(drlora.ConfigError, match=r"call dynamics\.watch\(engine\.optimizer\)"):
        blocks_of(parameter)


class ZeROOptimizer:
    """What DeepSpeed calls the base of its own."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class DeepSpeedZeroOptimizer(ZeROOptimizer):
    """ZeRO-1 and ZeRO-2."""


class ZenFlowZeroOptimizer(DeepSpeedZeroOptimizer):
    """Another."""


class BF16_Optimizer(ZeROOptimizer):  # noqa: N801
    """ZeRO-1 with gradients accumulated in float32."""


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (DeepSpeedZeroOptimizer(zero_hpz_partition_size=2), "zero_hpz_partition_size=2"),
        (DeepSpeedZeroOptimizer(swap_optimizer=True), "offloading to NVMe"),
        (DeepSpeedZeroOptimizer(params_in_nvme_and_cpu=True), "offloading to NVMe"),
        (DeepSpeedZeroOptimizer(partial_offload=0.5), "an offload_optimizer ratio of 0.5"),
        (DeepSpeedZeroOptimizer(zenflow=True), "zenflow"),
        (DeepSpeedZeroOptimizer(has_moe_layers=True), "expert_parallel"),
        (ZenFlowZeroOptimizer(), "zenflow"),
        (BF16_Optimizer(), "the optimizer BF16_Optimizer"),
    ],
)
def test_what_rows_cannot_be_followed_in_is_refused_by_name(optimizer, said):
    wrapper = SimpleNamespace(optimizer=optimizer)  # as accelerate's
    assert zero.zero_of(wrapper) is optimizer
    with pytest.raises(drlora.ConfigError, match=f"under DeepSpeed with {said}. Train with plain"):
        WatchedZero(optimizer, [], SimpleNamespace(parameters=[]), True, int, int)


def test_deepspeed_without_zero_is_refused():
    class DeepSpeedOptimizerWrapper:
        optimizer = torch.optim.SGD([torch.zeros(1)])

    assert zero.zero_of(DeepSpeedOptimizerWrapper()) is None
    with pytest.raises(drlora.ConfigError, match=r"without ZeRO \(stage 0\)"):
        zero.refuse_without_zero(DeepSpeedOptimizerWrapper())


def test_a_step_that_never_came_to_the_optimizer_is_known():
    weight = nn.Parameter(torch.ones(2))
    inner = torch.optim.AdamW([weight])
    watched = WatchedZero(
        DeepSpeedZeroOptimizer(optimizer=inner), [], SimpleNamespace(parameters=[], are_held=False),
        has_own_clocks=True, count=lambda: 1, end_of_warmup=lambda: 0,
    )  # fmt: skip
    assert watched.take_sums(weight.device) == [] and watched.was_skipped
    weight.grad = torch.ones(2)
    inner.step()
    watched.take_sums(weight.device)
    assert not watched.was_skipped
    watched.let_go()
    inner.step()
    watched.take_sums(weight.device)
    assert watched.was_skipped


def test_sums_are_added_up_among_those_who_share_rows(monkeypatch):
    """Under HSDP others have the same rows: adding theirs would count every row several times."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        parameter = distribute_tensor(torch.ones(4, 3), mesh, [Replicate(), Shard(0)])
        asked: list[Any] = []
        monkeypatch.setattr(dist, "all_reduce", lambda sums, group: asked.append(group))
        add_up_rows(parameter, torch.ones(2, 3))
        assert asked == [mesh.get_group("shard")]
        assert [(block.first, block.end) for block in blocks_of(parameter)] == [(0, 2)]
    finally:
        dist.destroy_process_group()
