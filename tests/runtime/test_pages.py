"""Pages: all or nothing, and nothing lost."""

import pytest

from llmc.errors import ShapeError
from llmc.ir import ops
from llmc.runtime.pages import PAGE, PagePool, Sequence


def test_page_size_is_that_of_the_kernels():
    assert PAGE == ops.PAGE


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65])
def test_reserve_gives_the_pages_that_the_length_needs(length):
    pool, sequence = PagePool(4), Sequence()
    pool.reserve(sequence, length)
    assert len(sequence.pages) == -(-length // PAGE)
    assert pool.free == 4 - len(sequence.pages)


def test_a_reservation_that_does_not_fit_changes_nothing():
    pool, first, second = PagePool(3), Sequence(), Sequence()
    pool.reserve(first, 2 * PAGE)
    with pytest.raises(ShapeError, match="KV cache is full"):
        pool.reserve(second, 2 * PAGE)
    assert second.pages == [] and pool.free == 1


def test_pages_are_owned_once_and_come_back():
    pool, sequences = PagePool(6), [Sequence() for _ in range(3)]
    for sequence in sequences:
        pool.reserve(sequence, PAGE + 1)
    owned = [page for sequence in sequences for page in sequence.pages]
    assert sorted(owned) == list(range(6))
    sequences[1].length = PAGE + 1
    pool.truncate(sequences[1], PAGE)
    assert pool.free == 1 and len(sequences[1].pages) == 1
    for sequence in sequences:
        pool.release(sequence)
    assert pool.free == 6
