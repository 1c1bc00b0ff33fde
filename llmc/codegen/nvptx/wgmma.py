"""wgmma: a block's tile multiplied by groups of four warps, operands in shared memory (sm_90a)."""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.llvm import Emitter, f32, i32
from llmc.codegen.nvptx.matmul_loader import CHUNK, TileShape
from llmc.codegen.nvptx.matmul_ptx import (
    WARP,
    fence_proxy,
    multiply_group,
    swizzled_descriptor,
    wait_group,
)
from llmc.codegen.nvptx.mma import STEPS, keep_fragments

GROUP = 4 * WARP
GROUP_ROWS = 64


class WgmmaConsumer:
    """Warp groups below one another: 64 rows and all columns of the tile each; sums are f32.

    name: bf16 or f16, the operands' dtype.
    """

    lag = 2  # a chunk is read until the next one's products are under way

    def __init__(self, shape: TileShape, name: str):
        assert shape.rows * GROUP == shape.threads * GROUP_ROWS
        assert shape.columns % 8 == 0 and shape.columns <= 256
        self.shape, self.name = shape, name

    def begin(self, e: Emitter, thread: ir.Value) -> list[ir.Value]:
        """Addresses of this thread, and its sums: zeros."""
        self.thread = thread
        group = e.b.udiv(thread, i32(GROUP))
        self.left = e.b.mul(group, i32(GROUP_ROWS * CHUNK))
        return [f32(0.0)] * (self.shape.columns // 2)

    def ready(self, e: Emitter) -> None:
        """Before the barrier behind which a chunk is read."""
        fence_proxy(e)

    def start(self, e: Emitter, stage: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Start a chunk's products."""
        left = swizzled_descriptor(e, self._uniform(e, e.b.add(stage, self.left)))
        right = swizzled_descriptor(e, e.b.add(stage, i32(self.shape.rows * CHUNK)))
        return multiply_group(e, self.name, sums, left, right, STEPS)

    def _uniform(self, e: Emitter, value: ir.Value) -> ir.Value:
        """A value that is the same in all lanes, told so to the assembler."""
        return e.call("llvm.nvvm.shfl.sync.idx.i32", value.type, i32(-1), value, i32(0), i32(31))

    def finish(self, e: Emitter, stage: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Wait for the products of the chunk before."""
        return wait_group(e, sums, 1)

    def end(self, e: Emitter, sums: list[ir.Value]) -> list[ir.Value]:
        """The sums, when nothing is in flight any more."""
        return wait_group(e, sums, 0)

    def keep(self, e: Emitter, pointer: ir.Value, stride: int, sums: list[ir.Value]) -> None:
        """Store the sums as rows in shared memory; each warp has 16 rows."""
        lane = e.b.and_(self.thread, i32(WARP - 1))
        warp = e.b.lshr(self.thread, i32(5))
        row = e.b.add(e.b.mul(warp, i32(16)), e.b.lshr(lane, i32(2)))
        column = e.b.shl(e.b.and_(lane, i32(3)), i32(1))
        keep_fragments(e, pointer, stride, row, column, sums, 1)
