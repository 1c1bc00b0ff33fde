"""Where the few rows of a matmul's left operand come from.

Either they lie in memory as the arithmetic wants them, or each worker computes all of them (a norm,
an activation, a conversion) into its scratch: cheaper than a barrier, for the rows are few.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.epilogue import split_row
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I1, Emitter, i64, vector
from llmc.ir.dims import Dim, evaluate
from llmc.ir.dims import product as product_of
from llmc.ir.dtypes import DType
from llmc.ir.graph import Node
from llmc.ir.program import Buffer, Program, Stage

CACHE_LINE = 64


class RowsInPlace:
    """Rows of a row-major buffer of the wanted dtype."""

    scratch_bytes = 0

    def __init__(self, buffer: Buffer, k: int):
        self.buffer = buffer
        self.row_bytes = k * buffer.type.dtype.bits // 8

    def emit(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing to prepare."""

    def row(self, e: Emitter, frame: Frame, worker: Worker, row: ir.Value) -> ir.Value:
        """Address of a row's first element."""
        return e.offset(frame.pointer(self.buffer), e.b.mul(row, i64(self.row_bytes)))


class RowsInScratch:
    """At most `rows` rows, computed into the worker's scratch as `dtype`.

    Rows are padded to whole vectors and an odd number of cache lines: rows a power of two apart
    would fall into the same few sets of the L1 cache.
    """

    def __init__(self, stage: Stage, program: Program, product: Node, dtype: DType, rows: int):
        self.stage, self.program, self.product, self.dtype = stage, program, product, dtype
        self.lanes = program.capabilities.vector_lanes
        self.k = evaluate(product.inputs[0].shape[-1], {})
        vectors = -(-self.k // self.lanes) * self.lanes
        lines = -(-vectors * dtype.bits // 8 // CACHE_LINE) | 1
        self.row_bytes = lines * CACHE_LINE
        self.scratch_bytes = rows * self.row_bytes

    def emit(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Compute every row; k beyond the end is padding that nobody reads."""
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        x = Expression(e, frame, sources, self.lanes)
        left = self.product.inputs[0]
        whole = self.k // self.lanes * self.lanes
        with x.loop(0, x.index(frame.dim(self._rows()))) as row:
            target = self.row(e, frame, worker, x.emit_index(row))
            leading = split_row(x, left, row)
            with x.loop(0, whole, self.lanes) as k:
                self._store(x, left, target, (*leading, k))
            if whole < self.k:
                self._store(x, left, target, (*leading, whole), self._mask(self.k - whole))

    def _rows(self) -> Dim:
        return product_of(self.product.inputs[0].shape[:-1])

    def _store(self, x: Expression, left: Node, target: ir.Value, index: tuple[Index, ...],
               mask: ir.Value | None = None) -> None:
        value = x.value(left, index, self.lanes, mask)
        value = elements.convert(x.e, elements.broadcast(x.e, value, self.lanes), left.dtype,
                                 self.dtype)
        elements.store(x.e, value, target, x.emit_index(index[-1]), self.dtype)

    def _mask(self, valid: int) -> ir.Constant:
        return ir.Constant(vector(I1, self.lanes), [lane < valid for lane in range(self.lanes)])

    def row(self, e: Emitter, frame: Frame, worker: Worker, row: ir.Value) -> ir.Value:
        """Address of a row's first element."""
        return e.offset(worker.scratch, e.b.mul(row, i64(self.row_bytes)))
