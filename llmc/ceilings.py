"""Measures this machine's ceilings: reading memory, and floating-point operations in registers.

Clocks and bandwidth move from minute to minute on shared machines, so a benchmark samples a ceiling
right beside the figure that it judges.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llmc.codegen.host.ceilings import READ_BYTES, generate_ceilings
from llmc.codegen.target import Target
from llmc.runtime.host_device import load_object
from llmc.runtime.memory import aligned_empty

BUFFER_BYTES = 1 << 29  # at least; and CACHES times the largest cache
CACHES = 4
SECONDS = 0.02  # of one sample: long beside the start of a thread, short beside clock changes


class Ceilings:
    """Ceilings of `threads` threads together; each call is one fresh sample."""

    def __init__(self, threads: int | None = None, target: Target | None = None):
        self.threads = threads or len(os.sched_getaffinity(0))
        self._code = generate_ceilings(target or Target.host())
        self._library = load_object(self._code.object, self._code.exports)
        self._pool = ThreadPoolExecutor(self.threads)
        self._buffer: np.ndarray | None = None
        self._turns: dict[str, int] = {}

    def read_bandwidth(self) -> float:
        """Bytes per second that all threads read from memory, each a range of its own."""
        if self._buffer is None:
            self._buffer = aligned_empty(max(BUFFER_BYTES, CACHES * largest_cache()))
            self._buffer[:] = 1
        read = self._function("llmc_read")
        share = len(self._buffer) // self.threads // READ_BYTES * READ_BYTES
        base = self._buffer.ctypes.data
        seconds = self._together(lambda thread: read(base + thread * share, share))
        return share * self.threads / seconds

    def peak_f32(self) -> float:
        """f32 flops per second by fused multiply-add, all threads."""
        return self._peak("llmc_peak_f32", self._code.f32_flops)

    def peak_bf16(self) -> float:
        """bf16 flops per second by dot products; that of f32 where they do not exist."""
        if not self._code.bf16_flops:
            return self.peak_f32()
        return self._peak("llmc_peak_bf16", self._code.bf16_flops)

    def peak_int8(self) -> float:
        """int8 operations per second by products of bytes; that of f32 where they do not exist."""
        if not self._code.int8_flops:
            return self.peak_f32()
        return self._peak("llmc_peak_int8", self._code.int8_flops)

    def _peak(self, name: str, flops: int) -> float:
        run = self._function(name)
        operand = aligned_empty(128)
        operand[:] = 0
        address = operand.ctypes.data
        if name not in self._turns:
            trial = 10_000
            seconds = self._together(lambda _: run(address, trial))
            self._turns[name] = max(trial, int(trial * SECONDS / seconds))
        turns = self._turns[name]
        return flops * turns * self.threads / self._together(lambda _: run(address, turns))

    def _function(self, name: str) -> Callable[[int, int], float]:
        return self._library.function(name, ctypes.c_float, ctypes.c_void_p, ctypes.c_int64)

    def _together(self, work: Callable[[int], object]) -> float:
        """Seconds until every thread has done its part."""
        started = time.perf_counter()
        list(self._pool.map(work, range(self.threads)))
        return time.perf_counter() - started


def largest_cache() -> int:
    """Bytes of the largest cache that this process's CPUs see; 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)
