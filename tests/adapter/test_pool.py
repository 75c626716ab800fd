"""Rank pools: the ways in which owners may change, and that the index follows each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from drlora.adapter.pool import RankPool
from drlora.errors import CheckpointError

OWNERS = np.array([1, -1, 0, 1, -1, 1])


def make_pool(rank=1) -> RankPool:
    torch.manual_seed(0)
    pool = RankPool(num_experts=2, in_features=4, out_features=3, rank=rank, num_rows=6)
    with torch.no_grad():
        pool.importance.copy_(torch.arange(1.0, 7.0))
        pool.birth.copy_(torch.arange(1, 7))
    return pool


def by_load(pool):
    pool.load_state_dict({"owner": torch.from_numpy(OWNERS).int()}, strict=False)


def by_attribute(pool):
    pool.owner = torch.from_numpy(OWNERS).int()


def by_method(pool):
    pool.set_owners(OWNERS)


def by_copy(pool):
    pool.owner.copy_(torch.from_numpy(OWNERS))


@pytest.mark.parametrize("change", [by_load, by_attribute, by_method, by_copy])
@pytest.mark.parametrize("first", ["book", "forward", "all_rows", "offsets", "packed_index"])
def test_whatever_is_asked_first_knows_the_new_owners(change, first):
    pool = make_pool()
    change(pool)
    asked = getattr(pool, first)
    found = asked(torch.float32) if callable(asked) else asked
    if first == "forward":
        assert torch.equal(found[0], pool.lora_A[[2, 0, 3, 5]])
    if first == "all_rows":
        assert torch.equal(found[0], pool.lora_A[[2, 0, 3, 5, 1, 4]])
        assert pool.offset_E1.tolist() == [0, 1, 4], "read after the rows, as traced pieces do"
    assert pool.owner.tolist() == pool.book.owner_R.tolist() == OWNERS.tolist()
    assert pool.offsets == (0, 1, 4) and pool.packed_index.tolist() == [2, 0, 3, 5]


def test_rows_that_change_hands_have_no_birth_and_no_statistics():
    pool = make_pool()  # owners 0 1 - - - -
    weights = pool.lora_A.detach().clone()
    pool.set_ranks([3, 1])
    assert pool.owner.tolist() == [0, 0, 0, 1, -1, -1]
    assert pool.importance.tolist() == [1, 0, 0, 0, 5, 6]
    assert pool.birth.tolist() == [1, 0, 0, 0, 5, 6]
    assert torch.equal(pool.lora_A, weights)


@pytest.mark.parametrize("ranks", [[4, 3], [1], [-1, 2]])
def test_ranks_that_do_not_fit_change_nothing(ranks):
    pool = make_pool()
    before = {key: value.clone() for key, value in pool.state_dict().items()}
    with pytest.raises(ValueError, match="rows are asked for|one grant per expert|granted -1"):
        pool.set_ranks(ranks)
    assert all(torch.equal(value, before[key]) for key, value in pool.state_dict().items())
    assert pool.offsets == (0, 1, 2)


def test_owners_that_do_not_fit_are_refused():
    pool = make_pool()
    with pytest.raises(ValueError, match="owners for 6 rows"):
        pool.set_owners(OWNERS[:4])
    with pytest.raises(ValueError, match="between -1"):
        pool.set_owners(OWNERS + 1)
    pool.owner = torch.full((6,), 7, dtype=torch.int32)
    for _ in range(2):  # it does not go on with the old owners the second time
        with pytest.raises(CheckpointError, match="rank map is damaged"):
            pool.forward(torch.float32)


def test_births_of_an_earlier_run_are_forgotten():
    pool = make_pool()
    pool.forget_births()
    assert not pool.birth.any() and pool.importance.all()


def test_owners_that_are_written_as_they_were_are_read_once(monkeypatch):
    pool, asked = make_pool(), []
    monkeypatch.setattr(pool, "_read_owners", lambda: pytest.fail("the index is made again"))
    as_read = pool._is_as_read
    monkeypatch.setattr(pool, "_is_as_read", lambda: asked.append(1) or as_read())
    pool.owner.copy_(pool.owner.clone())
    pool(torch.float32), pool(torch.float32)
    assert len(asked) == 1


def test_what_ddp_sends_out_is_not_looked_at(monkeypatch):
    """It writes buffers in every step, and to look at them would make the host wait."""
    pool = make_pool()
    monkeypatch.setattr(pool, "_is_as_read", lambda: pytest.fail("the host waits"))
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", pool)
    pool.owner.copy_(pool.owner.clone())
    pool(torch.float32)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", None)
    assert pool.book.ranks().tolist() == [1, 1], "what was passed over then stays passed over"


def test_a_pool_made_in_inference_mode_works_there():
    with torch.inference_mode():
        pool = make_pool()
        assert len(pool(torch.float32)[0]) == 2
