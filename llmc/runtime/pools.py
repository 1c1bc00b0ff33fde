"""How many pages and slots the states get, by what the options ask for and the memory there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from llmc.ir.dims import symbols
from llmc.runtime.binding import Tensor
from llmc.runtime.pages import PAGE

LEAST_SLOTS = 8  # open sequences, even if max_batch says fewer: nobody releases them at once
PAGES, SLOTS = "pool_pages", "pool_slots"  # the symbols in the shapes of states


@dataclass(frozen=True)
class Pools:
    """pages: of PAGE tokens, for every paged state; slots: sequences, for every slot state (0 where
    there is none)."""

    pages: int
    slots: int

    def symbols(self) -> dict[str, int]:
        """Values of the symbols in the shapes of the states."""
        return {PAGES: self.pages, SLOTS: self.slots}


def pool_sizes(states: Iterable[Tensor], context: int, max_batch: int, memory: int) -> Pools:
    """Pools for max_batch sequences of `context` tokens, in at most `memory` bytes (but at least
    one page and one slot)."""
    bytes_of = {PAGES: 0, SLOTS: 0}
    for state in states:
        (pool,) = (each.name for each in symbols(state.shape[0]))
        elements = prod(state.concrete_shape({pool: 1}))
        bytes_of[pool] += elements * state.count * state.dtype.bits // 8
    slots = 0
    if bytes_of[SLOTS]:
        slots = max(1, min(max(max_batch, LEAST_SLOTS), memory // bytes_of[SLOTS]))
    left = memory - slots * bytes_of[SLOTS]
    pages = -(-context // PAGE) * max_batch
    return Pools(max(1, min(pages, left // max(1, bytes_of[PAGES]))), slots)
