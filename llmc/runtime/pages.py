"""Pages of the paged states: which sequences hold which page, and what finished pages contain.

A page holds PAGE tokens, in every layer's pool at the same index. A full page can be held by many
sequences that begin with the same tokens. It is found by its key, a digest of all tokens up to its
end; pages that nobody holds stay findable until somebody needs the room, the least recently used
going first. Policy only: no tensors here.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

import numpy as np

from llmc.errors import LlmcError, ShapeError

PAGE = 32  # tokens; equals llmc.ir.ops.PAGE, which the kernels are compiled for


@dataclass
class Sequence:
    """One sequence's tokens that are in the cache, and the pages that hold them. Only a PagePool
    changes the pages."""

    length: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None  # of the states of recurrent layers (see slots.py)
    _row: np.ndarray = field(default_factory=lambda: np.empty(8, np.int32), repr=False,
                             compare=False)
    _known: int = field(default=0, repr=False, compare=False)  # pages that stand in _row

    def page_row(self) -> np.ndarray:
        """The pages as i32 [len(pages)], a view that the next change makes stale."""
        count = len(self.pages)
        if self._known < count:
            if len(self._row) < count:
                self._row = np.resize(self._row, 2 * count)
            self._row[self._known:count] = self.pages[self._known:]
            self._known = count
        return self._row[:count]

    def _cut(self, count: int) -> list[int]:
        """Drop all pages but the first `count`; those that went."""
        gone = self.pages[count:]
        del self.pages[count:]
        self._known = min(self._known, count)
        return gone


def extend_keys(keys: list[bytes], tokens: np.ndarray) -> None:
    """Append to `keys`, those of a sequence's first pages, the keys of its other full pages.
    tokens: all of its tokens, i32."""
    for page in range(len(keys), len(tokens) // PAGE):
        content = tokens[page * PAGE:(page + 1) * PAGE].tobytes()
        before = keys[page - 1] if page else b""
        keys.append(hashlib.blake2b(before + content, digest_size=16).digest())


class PagePool:
    """Hands out page numbers 0 .. size - 1."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._holders = [0] * size
        self._pages: dict[bytes, int] = {}  # key -> page
        self._keys: dict[int, bytes] = {}  # page -> key
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, least recent first

    @property
    def free(self) -> int:
        """Pages that can be handed out; `cached` of them would be forgotten then."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and whose content can still be found."""
        return len(self._idle)

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Give a sequence the pages for `length` tokens; all or nothing (ShapeError if too few)."""
        missing = -(-length // PAGE) - len(sequence.pages)
        if missing > self.free:
            raise ShapeError(
                f"the KV cache is full: {missing} more pages of {PAGE} tokens are needed and "
                f"{self.free} of {self.size} are free; raise kv_memory or shorten the input")
        for _ in range(missing):
            page = self._free.pop() if self._free else self._forget_oldest()
            self._holders[page] = 1
            sequence.pages.append(page)

    def release(self, sequence: Sequence) -> None:
        """Take all of a sequence's pages back."""
        self._drop(sequence._cut(0))
        sequence.length = 0

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget tokens from `length` on, and give back the pages that held only those.

        LlmcError if that would cut a page that others hold.
        """
        self.keep(sequence, -(-length // PAGE))
        if length % PAGE and length < sequence.length:
            page = sequence.pages[-1]
            if self._holders[page] > 1:
                raise LlmcError("a page that several sequences hold cannot be cut: release this "
                                "sequence and compute it anew")
            self._unlist(page)
        sequence.length = length

    def keep(self, sequence: Sequence, count: int) -> None:
        """Give back all pages of a sequence but the first `count`."""
        self._drop(sequence._cut(count))

    # ---- prefixes -----------------------------------------------------------------------------

    def adopt(self, sequence: Sequence, keys: Sequences[bytes]) -> int:
        """Let an empty sequence begin with the pages of the longest known prefix; how many.

        keys: those of its first full pages, as `extend_keys` makes them, and no more than may be
        taken over (a step needs at least one token to compute).
        """
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            self._holders[page] += 1
            self._idle.pop(page, None)
            sequence.pages.append(page)
        sequence.length = PAGE * len(sequence.pages)
        return len(sequence.pages)

    def known(self, keys: Sequences[bytes]) -> int:
        """How many pages `adopt` would find."""
        return next((number for number, key in enumerate(keys) if key not in self._pages),
                    len(keys))

    def publish(self, sequence: Sequence, keys: Sequences[bytes], first: int = 0) -> None:
        """Let others find a sequence's pages from number `first` to len(keys); all are full and
        computed. Of two pages with the same content the earlier is the one that is found."""
        for key, page in zip(keys[first:], sequence.pages[first:len(keys)], strict=True):
            if key not in self._pages and page not in self._keys:
                self._pages[key] = page
                self._keys[page] = key

    # ---- bookkeeping --------------------------------------------------------------------------

    def _drop(self, pages: list[int]) -> None:
        """One holder less for each page; the last are the first to be forgotten, for a page is
        of no use without those before it."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _forget_oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._unlist(page)
        return page

    def _unlist(self, page: int) -> None:
        """A page's content cannot be found any more."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]

    def check(self, sequences: Iterable[Sequence]) -> None:
        """LlmcError unless these sequences hold exactly the pages that are held, and every other
        page is free or cached, once."""
        held = Counter(page for sequence in sequences for page in sequence.pages)
        for page, count in enumerate(self._holders):
            where = (page in self._idle) + self._free.count(page)
            if count != held[page] or where != (count == 0):
                raise LlmcError(f"page {page}: {count} holders are counted, {held[page]} sequences "
                                f"hold it, it is free {where} times")
        if {page: key for key, page in self._pages.items()} != self._keys \
                or not self._idle.keys() <= self._keys.keys():
            raise LlmcError("the table of cached pages contradicts itself")
