"""map and reduce on the GPU. Bound by memory bandwidth.

map     a thread computes one vector of a result, up to 16 bytes of its widest operand, along the
        last axis.
reduce  a row is shared by the threads of a warp (short rows) or a block: they reduce it together,
        then each computes every n-th vector of the results.
"""

from __future__ import annotations

from llmc.codegen import elements
from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.rows import Result, results_of, unflatten
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I64, ir
from llmc.codegen.nvptx.kernel import WARP, Block, DeviceEmitter, DeviceFrame, Warp
from llmc.codegen.reductions import whole_lanes
from llmc.ir.dims import Dim, ceildiv, known_multiple, maximum, product
from llmc.ir.program import Program, Stage

VECTOR_BYTES = 16
SHORT_ROW = 1024  # elements: up to here a warp takes a row


class MapKernel:
    """Elementwise work, gathers, movement, casts, rope, cache appends."""

    threads = 256
    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        self.stage, self.program = stage, program
        self.results = results_of(stage, program)
        self.lanes = most_lanes(stage, program)

    def blocks(self) -> Dim:
        return ceildiv(maximum(1, *(self._vectors(result) for result in self.results)),
                       self.threads)

    def _width(self, result: Result) -> int:
        """Elements of a vector: a power of two that divides every row."""
        width = self.lanes
        while not known_multiple(result.shape[-1], width):
            width //= 2
        return width

    def _vectors(self, result: Result) -> Dim:
        return product(result.shape[:-1]) * (result.shape[-1] // self._width(result))

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """One vector of every result."""
        e.exact_division = True
        place = e.b.add(e.b.mul(e.block, ir.Constant(I64, self.threads)), e.thread)
        for result in self.results:
            inside = e.b.icmp_signed("<", place, frame.dim(self._vectors(result)))
            with e.b.if_then(inside):
                self._vector(e, frame, result, place)

    def _vector(self, e: DeviceEmitter, frame: DeviceFrame, result: Result,
                place: ir.Value) -> None:
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        x = Expression(e, frame, sources, self.lanes)
        width, number = self._width(result), x.index(place)
        per_row = x.dim(result.shape[-1] // width)
        outer = unflatten(x, result.shape[:-1], number // per_row)
        store_result(x, result, outer, number % per_row * width, width)


class ReduceKernel:
    """A body with reductions along the last axis."""

    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        self.stage, self.program = stage, program
        self.results = results_of(stage, program)
        self.lanes = most_lanes(stage, program)
        sizes = [node.shape[-1] for node in stage.body.nodes() if node.rank > 1]
        self.short = all(isinstance(size, int) and size <= SHORT_ROW for size in sizes)
        self.threads = 128 if self.short else 256
        self.rows_per_block = self.threads // WARP if self.short else 1

    def blocks(self) -> Dim:
        rows = maximum(1, *(product(result.shape[:-1]) for result in self.results))
        return ceildiv(rows, self.rows_per_block)

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """The row of this warp or block, of every result."""
        e.exact_division = True
        row = e.block
        if self.short:
            warp = e.b.lshr(e.thread, ir.Constant(I64, 5))
            row = e.b.add(e.b.mul(row, ir.Constant(I64, self.rows_per_block)), warp)
        for result in self.results:
            rows = frame.dim(product(result.shape[:-1]))
            with e.b.if_then(e.b.icmp_signed("<", row, rows)):
                self._row(e, frame, result, row)

    def _row(self, e: DeviceEmitter, frame: DeviceFrame, result: Result, row: ir.Value) -> None:
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        group = Warp(e) if self.short else Block(e, self.threads)
        x = Expression(e, frame, sources, self.lanes, group)
        columns = x.dim(result.shape[-1])
        width = whole_lanes(self.lanes, columns)
        outer = unflatten(x, result.shape[:-1], x.index(row))
        first = x.index(group.index) * width
        with x.loop(first, columns, width * group.count) as column:
            store_result(x, result, outer, column, width)


def store_result(x: Expression, result: Result, outer: list[Index], column: Index,
                 lanes: int) -> None:
    """Compute and store `lanes` elements of a row of a result."""
    index = [*outer, column] if result.value.rank else []
    value = elements.broadcast(x.e, x.value(result.value, index, lanes), lanes)
    place = result.place(x, index) if result.value.rank else [0] * result.buffer.type.rank
    x.store(result.buffer, place, value)


def most_lanes(stage: Stage, program: Program) -> int:
    """Elements of 16 bytes of the narrowest of the stage's wide operands and results: 4 or 8."""
    bits = [program.buffers[name].type.dtype.bits for name in (*stage.operands, *stage.results)
            if program.buffers[name].type.dtype.is_float]
    return max(1, min(8, VECTOR_BYTES * 8 // min(bits, default=32)))
