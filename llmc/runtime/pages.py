"""Pages of the paged states: which sequence owns which page.

A page holds PAGE tokens of one sequence, in every layer's pool at the same index. Policy only: no
tensors here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmc.errors import ShapeError

PAGE = 32  # tokens; equals llmc.ir.ops.PAGE, which the kernels are compiled for


@dataclass
class Sequence:
    """One sequence's tokens that are in the cache, and the pages that hold them."""

    length: int = 0
    pages: list[int] = field(default_factory=list)


class PagePool:
    """Hands out page numbers 0 .. size - 1."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Give a sequence the pages for `length` tokens; all or nothing (ShapeError if too few)."""
        missing = -(-length // PAGE) - len(sequence.pages)
        if missing > len(self._free):
            raise ShapeError(
                f"the KV cache is full: {missing} more pages of {PAGE} tokens are needed and "
                f"{len(self._free)} of {self.size} are free; raise kv_memory or shorten the input")
        for _ in range(missing):
            sequence.pages.append(self._free.pop())

    def release(self, sequence: Sequence) -> None:
        """Take all of a sequence's pages back."""
        self._free.extend(reversed(sequence.pages))
        sequence.pages.clear()
        sequence.length = 0

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget tokens from `length` on, and give back the pages that held only those."""
        keep = -(-length // PAGE)
        self._free.extend(reversed(sequence.pages[keep:]))
        del sequence.pages[keep:]
        sequence.length = length
