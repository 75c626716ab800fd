"""Rank books: ownership of pool rows, in whole numbers."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import drlora.adapter.row_book
import drlora.ranks.allocator
import drlora.ranks.directions
import drlora.ranks.placement
from drlora.adapter.row_book import FREE, RankBook


@given(
    experts=st.integers(1, 6),
    rank=st.integers(0, 3),
    target=st.integers(3, 6),
    wishes=st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), max_size=6),
)
def test_grants_only_claim_free_rows(experts, rank, target, wishes):
    book = RankBook.uniform(experts, experts * target, rank)
    for wish in wishes:
        grants = np.array(wish[:experts])
        before, ranks = book.owner_R.copy(), book.ranks()
        if grants.sum() > book.free:
            with pytest.raises(ValueError, match="free"):
                book.grant(grants)
            assert (book.owner_R == before).all()
            continue
        rows = book.grant(grants)
        owned = before != FREE
        assert (book.owner_R[owned] == before[owned]).all(), "an owned row changed hands"
        assert (before[rows] == FREE).all()
        assert (book.ranks() == ranks + grants).all()
        assert book.free + book.ranks().sum() == experts * target


def test_packed_rows_are_ordered_by_expert():
    book = RankBook(np.array([1, FREE, 0, 1, 0, FREE]), 3)
    assert book.packed().tolist() == [2, 4, 0, 3]
    assert book.offsets().tolist() == [0, 2, 4, 4]


def test_released_rows_can_be_granted_again():
    book = RankBook.uniform(2, 6, 2)
    book.release([1, 2])
    assert book.ranks().tolist() == [1, 1] and book.free == 4
    with pytest.raises(ValueError, match="row 1 is to be released but nobody owns it"):
        book.release([0, 1])
    assert book.grant([0, 3]).tolist() == [1, 2, 4] and book.ranks().tolist() == [1, 4]


def test_negative_grants_and_foreign_owners_are_refused():
    book = RankBook.uniform(2, 4, 1)
    with pytest.raises(ValueError, match="granted -1"):
        book.grant([0, -1])
    with pytest.raises(ValueError, match="between -1"):
        RankBook(np.array([0, 2]), 2)


@pytest.mark.parametrize(
    "module",
    [
        drlora.adapter.row_book,
        drlora.ranks.allocator,
        drlora.ranks.directions,
        drlora.ranks.placement,
    ],
    ids=lambda m: m.__name__,
)
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0
