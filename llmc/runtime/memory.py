"""Aligned host memory."""

from __future__ import annotations

import mmap

import numpy as np

HUGE_PAGE = 2 << 20


def aligned_empty(size: int, small: int = 0) -> np.ndarray:
    """`size` bytes of fresh zeroed memory, page-aligned, committed as it is touched.

    Above 2 MiB the kernel is asked for huge pages; where it refuses, small ones do. small: so many
    bytes (a multiple of the page size) at the beginning are in small pages anyway.
    """
    # Private: a forked process gets a copy, and only private memory is given huge pages by default.
    mapping = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size - small >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE, small)
    return np.frombuffer(mapping, np.uint8)[:size]


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
