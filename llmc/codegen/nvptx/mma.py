"""mma.sync: a block's tile multiplied by its warps, from swizzled shared memory (sm_80 and up)."""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.llvm import F32, I64, Emitter, f32, i32
from llmc.codegen.nvptx.matmul_loader import CHUNK, TileShape
from llmc.codegen.nvptx.matmul_ptx import WARP, load_matrices, multiply_fragments

FRAGMENT_ROWS, FRAGMENT_COLUMNS = 16, 8
STEPS = 4  # m16n8k16 along a chunk of 64 elements


def keep_fragments(e: Emitter, pointer: ir.Value, stride: int, row: ir.Value, column: ir.Value,
                   sums: list[ir.Value], fragment_rows: int) -> None:
    """Store 16 x 8 fragments, laid out [row][column], as rows of f32 in shared memory.

    row, column (i32): where this thread's first element belongs; a thread holds two neighbours of
    a row, and the two below them by eight rows.
    """
    per_row = len(sums) // 4 // fragment_rows
    place = e.b.zext(e.b.add(e.b.mul(row, i32(stride)), column), I64)
    start = e.offset(pointer, place, F32)
    pair = ir.VectorType(F32, 2)
    for number in range(len(sums) // 4):
        i, j = divmod(number, per_row)
        for half in range(2):
            values = sums[4 * number + 2 * half:4 * number + 2 * half + 2]
            vector: ir.Value = ir.Constant(pair, ir.Undefined)
            for lane, value in enumerate(values):
                vector = e.b.insert_element(vector, value, i32(lane))
            offset = (FRAGMENT_ROWS * i + 8 * half) * stride + FRAGMENT_COLUMNS * j
            e.store(vector, e.offset(start, offset, F32), align=8)


class MmaConsumer:
    """Warps in a grid of warp_rows x warp_columns, each with its part of the block's tile.

    name: bf16 or f16, the operands' dtype; sums are f32.
    """

    lag = 1  # chunks that may still be read while one is copied

    def __init__(self, shape: TileShape, name: str, warp_rows: int, warp_columns: int):
        assert warp_rows * warp_columns * WARP == shape.threads
        self.shape, self.name = shape, name
        self.warp_columns = warp_columns
        self.rows, self.columns = shape.rows // warp_rows, shape.columns // warp_columns
        self.row_fragments = self.rows // FRAGMENT_ROWS
        self.column_fragments = self.columns // FRAGMENT_COLUMNS
        assert self.column_fragments % 2 == 0 and self.row_fragments > 0

    def begin(self, e: Emitter, thread: ir.Value) -> list[ir.Value]:
        """Addresses of this thread, and its sums: zeros."""
        self.lane = e.b.and_(thread, i32(WARP - 1))
        warp = e.b.lshr(thread, i32(5))
        self.first_row = e.b.mul(e.b.udiv(warp, i32(self.warp_columns)), i32(self.rows))
        self.first_column = e.b.mul(e.b.urem(warp, i32(self.warp_columns)), i32(self.columns))
        # ldmatrix: lanes 8i..8i+7 give the rows of matrix i
        low, bit3, bit4 = (e.b.and_(e.b.lshr(self.lane, i32(shift)), i32(mask))
                           for shift, mask in ((0, 7), (3, 1), (4, 1)))
        left = self._place(e, e.b.add(self.first_row, e.b.and_(self.lane, i32(15))), low, bit4)
        column = e.b.add(low, e.b.mul(bit4, i32(8)))
        right = self._place(e, e.b.add(self.first_column, column), low, bit3)
        right = e.b.add(right, i32(self.shape.rows * CHUNK))
        self.left = [e.b.xor(left, i32(32 * step)) for step in range(STEPS)]
        self.right = [e.b.xor(right, i32(32 * step)) for step in range(STEPS)]
        return [f32(0.0)] * (4 * self.row_fragments * self.column_fragments)

    def _place(self, e: Emitter, row: ir.Value, low: ir.Value, piece: ir.Value) -> ir.Value:
        return e.b.add(e.b.mul(row, i32(CHUNK)), e.b.mul(e.b.xor(piece, low), i32(16)))

    def ready(self, e: Emitter) -> None:
        """Before the barrier behind which a chunk is read: nothing."""

    def start(self, e: Emitter, stage: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """What may run while further copies are started: nothing."""
        return sums

    def finish(self, e: Emitter, stage: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Add a chunk's products."""
        sums = list(sums)
        for step in range(STEPS):
            left = e.b.add(stage, self.left[step])
            a = [load_matrices(e, e.b.add(left, i32(FRAGMENT_ROWS * CHUNK * i)))
                 for i in range(self.row_fragments)]
            right = e.b.add(stage, self.right[step])
            for pair in range(self.column_fragments // 2):
                b = load_matrices(e, e.b.add(right, i32(2 * FRAGMENT_COLUMNS * CHUNK * pair)))
                for i in range(self.row_fragments):
                    for half in range(2):
                        at = 4 * (i * self.column_fragments + 2 * pair + half)
                        sums[at:at + 4] = multiply_fragments(
                            e, self.name, a[i], b[2 * half:2 * half + 2], sums[at:at + 4])
        return sums

    def end(self, e: Emitter, sums: list[ir.Value]) -> list[ir.Value]:
        """The sums, when nothing is in flight any more."""
        return sums

    def keep(self, e: Emitter, pointer: ir.Value, stride: int, sums: list[ir.Value]) -> None:
        """Store the sums as rows in shared memory."""
        row = e.b.add(self.first_row, e.b.lshr(self.lane, i32(2)))
        column = e.b.add(self.first_column, e.b.shl(e.b.and_(self.lane, i32(3)), i32(1)))
        keep_fragments(e, pointer, stride, row, column, sums, self.row_fragments)
