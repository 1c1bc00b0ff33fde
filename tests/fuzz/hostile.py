"""Memory as bad as it gets: all that a step does not write itself is set to a byte before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.ir.dims import evaluate
from llmc.runtime.executor import Executor
from llmc.runtime.memory import aligned_empty

if TYPE_CHECKING:
    from llmc.runtime.cuda_executor import CudaExecutor

NAN = 0xFF  # NaN in every float type, -1 in integers


def spoil_memory(executor: Executor, byte: int = NAN) -> None:
    """From now on every step begins with arena, scratch and outputs full of a byte."""
    launch = executor._call

    def call(variant, values, given, results) -> None:
        arena = evaluate(variant.arena, values)
        scratch = evaluate(variant.scratch, values) * executor.threads
        executor._arena = _filled(executor._arena, arena, byte)
        executor._scratch = _filled(executor._scratch, scratch, byte)
        for array in results.values():
            array.reshape(-1).view(np.uint8)[...] = byte
        launch(variant, values, given, results)

    executor._call = call  # type: ignore[method-assign]


def spoil_states(executor: Executor, byte: int = NAN) -> None:
    """Fill every page of every state."""
    for state in executor._states:
        state[:] = byte


def spoil_device(executor: CudaExecutor, byte: int = NAN) -> None:
    """The same on a GPU: every page now, and arena and outputs before every step."""
    assert executor._state_memory is not None
    executor._state_memory.clear(executor.device, byte)
    launch = executor._run

    def run(*arguments: Any) -> None:
        for name in ("arena", "outputs"):
            executor._grown[name].clear(executor.device, byte)
        launch(*arguments)

    executor._run = run  # type: ignore[method-assign]


def _filled(memory: np.ndarray, size: int, byte: int) -> np.ndarray:
    memory = memory if memory.size >= size else aligned_empty(size)
    memory[:] = byte
    return memory
