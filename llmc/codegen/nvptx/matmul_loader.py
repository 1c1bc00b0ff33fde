"""Tiles of both operands on their way from global to shared memory.

A chunk is 128 bytes of k of every row of the left tile, then of every column of the right one; a
row's eight 16-byte pieces are swizzled (piece ^ row % 8), which is what ldmatrix reads without bank
conflicts and what wgmma's 128-byte swizzle means. Chunks lie in a ring of stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import llvmlite.ir as ir

from llmc.codegen.host.kernel import Frame
from llmc.codegen.llvm import I32, I64, Emitter, i32, i64
from llmc.codegen.nvptx.matmul_ptx import copy_async, shared_pointer
from llmc.codegen.nvptx.product import Product, RowTile

PIECE = 16  # bytes of a copy
CHUNK = 128  # bytes of k of a chunk
PIECES = CHUNK // PIECE


@dataclass(frozen=True)
class TileShape:
    """rows x columns of a block's tile; columns is parts x width."""

    rows: int
    columns: int
    threads: int
    stages: int

    @property
    def stage_bytes(self) -> int:
        return (self.rows + self.columns) * CHUNK


class TileLoader:
    """One thread's share of a block's copies. Emitted where it is made: the addresses of its pieces
    in chunk 0."""

    def __init__(self, e: Emitter, frame: Frame, product: Product, shape: TileShape,
                 thread: ir.Value, tile: RowTile, first_column: ir.Value):
        """thread: i32; first_column (of each part): i64."""
        self.e, self.product, self.shape, self.tile = e, product, shape, tile
        self.step = shape.threads // PIECES  # rows that one round of copies covers
        self.row = e.b.lshr(thread, i32(3))
        self.piece = e.b.and_(thread, i32(PIECES - 1))
        swizzled = e.b.xor(self.piece, e.b.and_(self.row, i32(7)))
        self.place = e.b.add(e.b.mul(self.row, i32(CHUNK)), e.b.mul(swizzled, i32(PIECE)))
        size = product.dtype.bits // 8
        self.whole = product.k * size % PIECE == 0  # rows start at pieces
        along = e.b.mul(e.b.zext(self.piece, I64), i64(PIECE))
        left, right = frame.pointer(product.left), frame.pointer(product.weight)
        rows_left = e.b.sub(tile.stop, e.b.add(tile.first, self._row64()))
        self.left = []
        for start in range(0, shape.rows, self.step):
            row = e.b.add(tile.first, e.b.add(self._row64(), i64(start)))
            source = e.offset(left, e.b.add(e.b.mul(row, i64(product.k * size)), along))
            self.left.append((source, e.b.icmp_signed(">", rows_left, i64(start))))
        self.right = []
        for start in range(0, shape.columns, self.step):
            column, exists = self._column(start, first_column)
            source = e.offset(right, e.b.add(e.b.mul(column, i64(size)), along))
            self.right.append((source, exists))

    def _row64(self) -> ir.Value:
        return self.e.b.zext(self.row, I64)

    def _column(self, start: int, first_column: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """First element of the right operand's column behind a column of the tile; and whether
        there is one (None: always)."""
        e, product = self.e, self.product
        width = self.shape.columns // product.parts
        place = e.b.add(self._row64(), i64(start))
        if width % self.step == 0:  # all threads are in one part
            part: ir.Value = i64(start // width)
        else:
            part = e.b.udiv(place, i64(width))
        column = e.b.add(first_column, e.b.sub(place, e.b.mul(part, i64(width))))
        exists = []
        if start + self.step > width * product.parts:
            exists.append(e.b.icmp_signed("<", place, i64(width * product.parts)))
        if product.part_size % width:
            exists.append(e.b.icmp_signed("<", column, i64(product.part_size)))
        return (product.column(e, self.tile, part, column),
                reduce(e.b.and_, exists) if exists else None)

    # What lies beyond the end is not copied: no result is made of it, and if all blocks read the
    # last row instead, they would wait for one line of L2 (measured: 1.5 times as long).

    def load_left(self, chunk: ir.Value, stage: ir.Value) -> None:
        """Start this thread's copies of a chunk (i64) of the rows to a stage (its shared address,
        i32)."""
        e = self.e
        offset = e.b.mul(chunk, i64(CHUNK))
        target = e.b.add(stage, self.place)
        count = self._bytes_left(chunk)
        for number, (pointer, exists) in enumerate(self.left):
            place = e.b.add(target, i32(number * self.step * CHUNK))
            if self.whole:
                copy_async(e, place, e.offset(pointer, offset), count, exists)
            else:
                with e.b.if_then(exists):
                    self._copy_elements(place, e.offset(pointer, offset), count)

    def load_right(self, chunk: ir.Value, stage: ir.Value) -> None:
        """The same of the weight's columns."""
        e = self.e
        offset = e.b.mul(chunk, i64(CHUNK))
        target = e.b.add(stage, self.place)
        for number, (pointer, exists) in enumerate(self.right):
            place = e.b.add(target, i32((self.shape.rows + number * self.step) * CHUNK))
            copy_async(e, place, e.offset(pointer, offset), None, exists)

    def _bytes_left(self, chunk: ir.Value) -> ir.Value | None:
        """Bytes of this thread's piece that lie before the end of a row; None: always all."""
        e, product = self.e, self.product
        row_bytes = product.k * product.dtype.bits // 8
        if row_bytes % CHUNK == 0:
            return None
        start = e.b.add(e.b.mul(e.b.trunc(chunk, I32), i32(CHUNK)), e.b.mul(self.piece, i32(PIECE)))
        left = e.b.sub(i32(row_bytes), start)
        return e.maximum(i32(0), e.minimum(left, i32(PIECE)))

    def _copy_elements(self, place: ir.Value, source: ir.Value, count: ir.Value | None) -> None:
        """A piece element by element, for rows that do not start at multiples of 16 bytes."""
        e = self.e
        size = self.product.dtype.bits // 8
        assert count is not None
        bits = ir.IntType(8 * size)
        target = shared_pointer(e, place)
        for byte in range(0, PIECE, size):
            exists = e.b.icmp_signed("<", i32(byte), count)
            with e.b.if_else(exists) as (inside, outside):
                with inside:
                    e.store(e.load(e.offset(source, byte), bits), e.offset(target, byte))
                with outside:
                    e.store(ir.Constant(bits, 0), e.offset(target, byte))
