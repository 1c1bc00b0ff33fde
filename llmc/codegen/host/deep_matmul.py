"""Many rows by a panel that no L2 cache holds: k is cut, and the sums of a tile wait in scratch.

Uncut, each row block would stream the whole panel from L3 or memory: 14 bytes a cycle for f32 at
the speed of AVX-512. A piece of a panel stays in L2 while all row blocks of a group pass it.
"""

from __future__ import annotations

from dataclasses import replace

import llvmlite.ir as ir

from llmc.codegen.host.coded_weight import LeftCodes
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.host.matmul import (
    PANEL_GROUP_BYTES,
    BlockedMatmul,
    Product,
    Turn,
    body_sizes,
    choose_body,
)
from llmc.codegen.host.packed_weight import PackedWeight, Panel
from llmc.codegen.llvm import Emitter, i64
from llmc.ir.program import Buffer, Program


def pieces(weight: PackedWeight) -> int:
    """Into how many equal pieces of k a weight's panels are cut; 1: not at all."""
    count = 1
    while (weight.panel_bytes > count * PANEL_GROUP_BYTES
           and weight.k % (2 * count * 16) == 0):
        count *= 2
    return count if type(weight) is PackedWeight else 1


class DeepMatmul(BlockedMatmul):
    """A tile is a group of row blocks x one panel; k is the outermost loop."""

    def __init__(self, product: Product, blocks: Buffer, program: Program):
        super().__init__(product, blocks, program)
        self.pieces = pieces(product.weight)
        self.sums_bytes = (self.layout.rows * product.reader.layout.columns
                           * (8 if product.left_dtype.bits == 64 else 4))
        self.scratch_bytes = self.row_group * self.sums_bytes

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """Every row block of a group past each piece of a panel in turn."""
        panel, first, last = self._groups_of(e, frame, tile)
        piece_bytes = self.product.weight.panel_bytes // self.pieces
        columns = self.product.weight.panel(e, frame, panel)
        with (e.loop(0, self.pieces, name="piece") as piece,
              e.loop(first, last, name="block") as block):
            number = e.b.sub(block, first)
            start = e.offset(columns.weights, e.b.mul(piece, i64(piece_bytes)))
            sums = e.offset(worker.scratch, e.b.mul(number, i64(self.sums_bytes)))
            self._add_piece(e, frame, sums, Turn(block, first, last), piece,
                            replace(columns, weights=start))
            with e.b.if_then(e.b.icmp_signed("==", piece, i64(self.pieces - 1))):
                first_row, count = self._rows_of(e, frame, block)
                self.epilogue.emit(e, frame, sums, first_row, count, panel)

    def _add_piece(self, e: Emitter, frame: Frame, sums: ir.Value, turn: Turn,
                   piece: ir.Value, part: Panel) -> None:
        """sums (+)= a row block @ a piece of the panel."""
        product, rows, block = self.product, self.layout.rows, turn.block
        start = e.offset(frame.pointer(self.blocks), e.b.mul(block, i64(self.block_bytes)))
        start = e.offset(start, e.b.mul(piece, i64(self.block_bytes // self.pieces)))
        _, count = self._rows_of(e, frame, block)
        depth = product.k // self.pieces
        size = product.weight.panel_bytes // self.pieces
        reading = self._reading(e, turn, part.weights, size, size)
        fresh = e.b.icmp_signed("==", piece, i64(0))
        for body in choose_body(e, count, body_sizes(rows, product.rows)):
            left = self._left(e, start, body, reading)
            assert not isinstance(left, LeftCodes)
            product.weight.add_product(e, left, part, sums, depth, fresh)
