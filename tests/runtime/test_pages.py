"""Pages: all or nothing, and nothing lost."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmc.errors import LlmcError, ShapeError
from llmc.ir import ops
from llmc.runtime.pages import PAGE, PagePool, Sequence, extend_keys


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


# ---- shared pages -------------------------------------------------------------------------------


def keys_of(tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, np.array(tokens, np.int32))
    return keys


def test_a_key_tells_all_tokens_up_to_the_end_of_its_page():
    first = keys_of([1] * 100)
    assert len(first) == 3 and len(set(first)) == 3
    assert keys_of([1] * 96 + [2] * 4) == first
    assert keys_of([1] * 64 + [2] * 32) == [*first[:2], keys_of([1] * 64 + [2] * 32)[2]]
    other = keys_of([2] + [1] * 95)
    assert not set(other) & set(first)


def test_keys_are_extended_as_tokens_come():
    keys = keys_of([1] * 40)
    extend_keys(keys, np.array([1] * 40 + [3] * 60, np.int32))
    assert keys == keys_of([1] * 40 + [3] * 60)


def test_pages_stay_findable_until_the_room_is_needed():
    pool, first, second = PagePool(3), Sequence(), Sequence()
    keys = keys_of([1] * 64)
    pool.reserve(first, 64)
    pool.publish(first, keys)
    pages = list(first.pages)
    pool.release(first)
    assert pool.free == 3 and pool.cached == 2
    assert pool.adopt(second, keys) == 2 and second.pages == pages and second.length == 64
    pool.release(second)
    pool.reserve(second, 65)  # a page never used, then the end of the prefix, then its beginning
    assert pool.cached == 0 and pool.adopt(Sequence(), keys) == 0
    pool.check([second])


def test_of_a_prefix_the_end_is_forgotten_first():
    pool, first, second = PagePool(3), Sequence(), Sequence()
    keys = keys_of([1] * 96)
    pool.reserve(first, 96)
    pool.publish(first, keys)
    pool.release(first)
    pool.reserve(second, 1)
    assert pool.adopt(first, keys) == 2


def test_a_page_is_free_when_its_last_holder_lets_go():
    pool, sequences = PagePool(2), [Sequence() for _ in range(3)]
    keys = keys_of([1] * 32)
    pool.reserve(sequences[0], 32)
    pool.publish(sequences[0], keys)
    for sequence in sequences[1:]:
        assert pool.adopt(sequence, keys) == 1
    for count, sequence in enumerate(sequences):
        assert pool.free == 1, count
        pool.release(sequence)
    assert pool.free == 2


def test_cutting_a_full_page_makes_it_nobodys_prefix():
    pool, first, second = PagePool(2), Sequence(), Sequence()
    keys = keys_of([1] * 32)
    pool.reserve(first, 32)
    first.length = 32
    pool.publish(first, keys)
    pool.truncate(first, 20)
    assert pool.adopt(second, keys) == 0
    pool.check([first, second])


def test_a_shared_page_cannot_be_cut():
    pool, first, second = PagePool(2), Sequence(), Sequence()
    keys = keys_of([1] * 32)
    pool.reserve(first, 32)
    first.length = 32
    pool.publish(first, keys)
    pool.adopt(second, keys)
    with pytest.raises(LlmcError, match="several sequences"):
        pool.truncate(first, 20)


def test_the_row_of_pages_follows_the_list():
    pool, sequence = PagePool(40), Sequence()
    for length in (1, 33, 40 * PAGE, 5 * PAGE, 9 * PAGE):
        if length < sequence.length:
            pool.truncate(sequence, length)
        else:
            pool.reserve(sequence, length)
        sequence.length = length
        assert sequence.page_row().tolist() == sequence.pages


def test_what_is_lost_is_noticed():
    pool, sequence = PagePool(2), Sequence()
    pool.reserve(sequence, 1)
    pool.check([sequence])
    with pytest.raises(LlmcError, match="page 0"):
        pool.check([])
    with pytest.raises(LlmcError, match="page 0"):
        pool.check([sequence, sequence])


class Pages(RuleBasedStateMachine):
    """Sequences of tokens over two letters, in blocks of a page: whatever happens, a page's content
    is that of every sequence that holds it, and none is lost."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(7)
        self.tokens: dict[int, list[int]] = {}
        self.sequences: dict[int, Sequence] = {}
        self.content: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end
        self.number = 0

    @rule(blocks=st.lists(st.integers(0, 1), min_size=1, max_size=4), tail=st.integers(1, 31))
    def start(self, blocks, tail):
        tokens = [block for block in blocks for _ in range(PAGE)] + [9] * tail
        sequence = Sequence()
        known = self.pool.known(keys_of(tokens))
        found = self.pool.adopt(sequence, keys_of(tokens))
        assert found == known
        for page in range(found):
            assert self.content[sequence.pages[page]] == tuple(tokens[:(page + 1) * PAGE])
        if -(-len(tokens) // PAGE) - found > self.pool.free:
            with pytest.raises(ShapeError):
                self.pool.reserve(sequence, len(tokens))
            self.pool.release(sequence)
            return
        self.number += 1
        self.sequences[self.number], self.tokens[self.number] = sequence, tokens
        self.grow(sequence, tokens, found)

    def grow(self, sequence, tokens, first):
        self.pool.reserve(sequence, len(tokens))
        for page in range(first, len(sequence.pages)):
            self.content[sequence.pages[page]] = tuple(tokens[:(page + 1) * PAGE])
        sequence.length = len(tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), end=st.booleans())
    def publish(self, data, end):
        number = data.draw(st.sampled_from(sorted(self.sequences)))
        self.pool.publish(self.sequences[number], keys_of(self.tokens[number]))
        if end:
            self.pool.release(self.sequences.pop(number))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data):
        number = data.draw(st.sampled_from(sorted(self.sequences)))
        self.pool.release(self.sequences.pop(number))

    @invariant()
    def nothing_is_lost(self):
        self.pool.check(self.sequences.values())
        for number, sequence in self.sequences.items():
            assert sequence.page_row().tolist() == sequence.pages
            for page, place in enumerate(sequence.pages):
                assert self.content[place] == tuple(self.tokens[number][:(page + 1) * PAGE])


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
