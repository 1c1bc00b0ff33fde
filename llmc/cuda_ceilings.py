"""Measures a GPU's ceilings: reading memory, and floating-point operations. See `llmc.ceilings`."""

from __future__ import annotations

from typing import Any

from llmc.codegen.nvptx.ceilings import READ_BYTES, THREADS, generate_ceilings
from llmc.runtime.cuda_device import (
    Device,
    Memory,
    Module,
    call,
    launch,
    record_event,
    seconds_between,
)

MOST_BYTES = 4 << 30  # that are read: far beyond any cache
BLOCKS = 8  # of a multiprocessor
SECONDS = 0.005  # of a sample of operations


class CudaCeilings:
    """Ceilings of a whole GPU; each call is one fresh sample, by the GPU's own clock."""

    def __init__(self, device: Device):
        self._device = device
        device.use()
        self._code = generate_ceilings(device.architecture)
        self._module = Module(self._code.ptx.encode(), "ceilings")
        self._blocks = BLOCKS * device.multiprocessors
        self._memory: Memory | None = None
        self._turns: dict[str, int] = {}

    def read_bandwidth(self) -> float:
        """Bytes per second at which all multiprocessors together read memory."""
        turn = self._blocks * THREADS * READ_BYTES
        if self._memory is None:
            size = min(MOST_BYTES, self._device.free_memory() // 2)
            self._memory = Memory(self._device, max(turn, size), "memory to read")
            self._memory.clear(self._device, 0x5A)
        turns = self._memory.size // turn
        return turns * turn / self._seconds("read", turns, self._memory.address)

    def peak_f32(self) -> float:
        """f32 flops per second by fused multiply-add."""
        return self._peak("peak_f32", self._code.f32_flops)

    def peak_bf16(self) -> float:
        """bf16 flops per second of the tensor cores; those of f16 are as many."""
        return self._peak("peak_bf16", self._code.bf16_flops)

    def _peak(self, name: str, flops: int) -> float:
        if name not in self._turns:
            trial = 100
            self._seconds(name, trial)  # wakes the clocks
            self._turns[name] = max(trial, int(trial * SECONDS / self._seconds(name, trial)))
        turns = self._turns[name]
        return flops * turns * self._blocks / self._seconds(name, turns)

    def _seconds(self, name: str, turns: int, address: int = 0) -> float:
        """Seconds of one launch of a kernel."""
        device = self._device
        device.use()
        begin = record_event(device)
        launch(device, self._module.function(name, 0), self._blocks, THREADS, 0, address, turns)
        end = record_event(device)
        device.wait()
        seconds = seconds_between(begin, end)
        for each in (begin, end):
            call("cuEventDestroy", each)
        return seconds

    def close(self) -> None:
        """Free the memory that is read, and the code."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._module.close()

    def __enter__(self) -> CudaCeilings:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
