"""Host memory: zeroed, aligned, in huge pages where that was asked for."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from llmc.runtime.memory import HUGE_PAGE, aligned_empty


@pytest.mark.parametrize("size", [0, 1, 4097, HUGE_PAGE, 3 * HUGE_PAGE + 1])
def test_it_is_aligned_and_zero(size: int):
    memory = aligned_empty(size)
    assert memory.dtype == np.uint8 and memory.size == size
    assert memory.ctypes.data % mmap.PAGESIZE == 0 and not memory.any()


def advised(memory: np.ndarray) -> int:
    """Bytes of an array for which the kernel was asked for huge pages."""
    first, last, total = memory.ctypes.data, memory.ctypes.data + memory.size, 0
    start = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(each, 16) for each in found.groups())
        elif line.startswith("VmFlags:") and " hg" in line:
            total += max(0, min(end, last) - max(start, first))
    return total


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
def test_huge_pages_are_for_what_lies_behind_the_small_ones():
    size = 4 * HUGE_PAGE
    assert advised(aligned_empty(HUGE_PAGE - 1)) == 0
    assert advised(aligned_empty(size)) == size
    assert advised(aligned_empty(size, HUGE_PAGE)) == size - HUGE_PAGE
    assert advised(aligned_empty(HUGE_PAGE + mmap.PAGESIZE, HUGE_PAGE)) == 0
