"""What a stage's kernel is on the host: the four answers, and what it is given to answer with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import llvmlite.ir as ir

from llmc.codegen.llvm import Emitter
from llmc.ir.dims import Dim
from llmc.ir.program import Buffer, Program, Stage


@dataclass(frozen=True)
class Worker:
    """One thread's view while it runs a stage: LLVM values of the current function."""

    index: ir.Value  # i64, 0 <= index < count
    count: ir.Value  # i64
    scratch: ir.Value  # this worker's own memory, 64-aligned, Kernel.scratch_bytes long


class Frame(Protocol):
    """Operands and dims of the step, as LLVM values in the function being emitted."""

    program: Program
    layer: ir.Value | None  # i64 inside a Loop
    alignment: int  # bytes: every buffer starts at a multiple of it

    def dim(self, dim: Dim) -> ir.Value:
        """The value of a dim, i64; a constant where the shape key fixes it."""
        ...

    def pointer(self, buffer: Buffer) -> ir.Value:
        """Base address of the buffer (of this turn's copy, inside a Loop)."""
        ...


class Kernel(Protocol):
    """A stage's code. Constructed as KIND(stage, program, target).

    The driver emits, per stage and worker:
    setup(); tile() for tiles of range(tiles()), any worker for any tile (shares.py); barrier.
    """

    scratch_bytes: int | Dim

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Upper bound of tiles at this shape, i64."""
        ...

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Once per worker, before its first tile (a normalised row, converted activations)."""
        ...

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """One tile's arithmetic and stores."""
        ...


@runtime_checkable
class Warming(Protocol):
    """A kernel that can be got ready while an earlier stage ends."""

    def warm(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Fetch into the caches what this worker reads first; the worker has no scratch yet."""
        ...


def operand_buffers(stage: Stage, program: Program) -> dict[str, Buffer]:
    """Body input name -> buffer."""
    return {node["name"]: program.buffers[name]
            for node, name in zip(stage.body.inputs, stage.operands, strict=True)}
