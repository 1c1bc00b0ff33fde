"""Kernels of one op, line by line: the host's code, with a thread in the place of a worker's tile.

Right for every shape, and slow for long lines: what a model runs at every step has kernels of its
own.
"""

from __future__ import annotations

from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host import dense_matmul, single
from llmc.codegen.host.dense_matmul import _Block as Products
from llmc.codegen.host.kernel import Worker
from llmc.codegen.host.rows import unflatten
from llmc.codegen.llvm import POINTER, i64, ir
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.ir.dims import Dim, ceildiv, maximum, product
from llmc.ir.program import Program, Stage


class AlongAxisKernel:
    """argmax, argmin, cumsum and top_k: a thread for each line."""

    threads = 64
    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        self.host = single.AlongAxisKernel(stage, program, target)
        self.host.lines = 1

    def blocks(self) -> Dim:
        return ceildiv(maximum(1, product(self.host.outer)), self.threads)

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        line = e.b.add(e.b.mul(e.block, i64(self.threads)), e.thread)
        with e.b.if_then(e.b.icmp_signed("<", line, self.host.tiles(e, frame))):
            self.host.tile(e, frame, worker(line), line)


class ScatterKernel:
    """scatter_nd and scatter_elements, by one thread: updates may meet, and their order counts."""

    threads = 1
    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        self.host = single.ScatterKernel(stage, program, target)

    def blocks(self) -> Dim:
        return 1

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        self.host.tile(e, frame, worker(i64(0)), i64(0))


class DenseMatmulKernel(dense_matmul.DenseMatmulKernel):
    """The product of two computed tensors: a thread for each element of the result."""

    threads = 128
    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, target)
        self.lanes = 1

    def blocks(self) -> Dim:
        return ceildiv(maximum(1, self._elements()), self.threads)

    def _elements(self) -> Dim:
        return product(self.batch) * self.rows * self.columns

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """One element; those of a warp lie side by side in a row."""
        place = e.b.add(e.b.mul(e.block, i64(self.threads)), e.thread)
        with e.b.if_then(e.b.icmp_signed("<", place, frame.dim(self._elements()))):
            sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
            x = Expression(e, frame, sources, 1)
            number, columns, rows = x.index(place), x.dim(self.columns), x.dim(self.rows)
            batch = tuple(unflatten(x, self.batch, number // columns // rows))
            block = Products(batch, number // columns % rows, number % columns, 1, 1, 1)
            self._block(x, block)


def worker(number: ir.Value) -> Worker:
    """A thread as a worker without scratch."""
    return Worker(number, i64(1), ir.Constant(POINTER, None))
