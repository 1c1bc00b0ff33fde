"""Slots of the slot states (of recurrences): which sequence owns which.

A slot holds all that a sequence's past is to a recurrent layer, in every layer's state at the same
index. It cannot be cut back to fewer tokens, and no two sequences can share one. Policy only: no
tensors here.
"""

from __future__ import annotations

from llmc.errors import ShapeError
from llmc.runtime.pages import Sequence

LOST = -1  # the slot of a sequence whose state a failed step has spoilt


class SlotPool:
    """Hands out slot numbers 0 .. size - 1. A pool of size 0 is that of a model without slots."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def reserve(self, sequence: Sequence) -> None:
        """Give a sequence a slot if it has none (ShapeError if there is none left, or if its state
        was lost)."""
        if not self.size:
            return
        if sequence.slot == LOST:
            raise ShapeError("the sequence's state was lost when a step of it failed: release the "
                             "sequence and start it again")
        if sequence.slot is None:
            if not self._free:
                raise ShapeError(f"all {self.size} slots for sequences are taken; release some, or "
                                 "raise max_batch")
            sequence.slot = self._free.pop()

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's slot back."""
        if sequence.slot is not None and sequence.slot != LOST:
            self._free.append(sequence.slot)
        sequence.slot = None

    def lose(self, sequence: Sequence) -> None:
        """After a step that failed half-way: a sequence that had a past cannot go on."""
        self.release(sequence)
        if self.size and sequence.length:
            sequence.slot = LOST
