"""Many rows of codes by a coded weight: pieces of a panel are unpacked once for all row blocks.

A piece is bytes as dot products take them and scales as f32, in the worker's scratch. It stays in
L1 while the row blocks of a group pass, some hundred k of each; their sums wait in scratch.
Per vector and row, a block of k costs its dot products and two multiplications.

Floor: 4 products per lane and dot product; with blocks of 32 k and two vectors of 16 lanes by 6
rows 0.79 of that, with blocks of 128 k 0.94.
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.host.coded_weight import CodedWeight, LeftCodes
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.host.matmul import BlockedMatmul, Product, body_sizes, choose_body
from llmc.codegen.host.packed_weight import Panel
from llmc.codegen.host.unpacked_weight import Piece, UnpackedWeight
from llmc.codegen.llvm import F32, I32, Emitter, i64
from llmc.ir.layouts import CodedRows
from llmc.ir.program import Buffer, Program

FETCHING_BLOCKS = 2  # so many row blocks ask for the next piece while they pass one
LEAST_PART = 4  # rows that are multiplied together: fewer would wait for each other
# With more k to a block, sums go to memory so seldom that it is better to multiply all rows of a
# row block together: 8 rows, of 16, are a tenth faster so on Emerald Rapids.
LARGEST_HELD_BLOCK = 64
SUMS_BYTES = 256 << 10  # of the sums that wait: half of an L2 cache of 512 KB


@dataclass(frozen=True)
class _Turn:
    """A piece of a panel, which the row blocks from `first` on pass."""

    panel: Panel
    piece: Piece
    first: ir.Value


class CodedMatmul(BlockedMatmul):
    """A tile is a group of row blocks x one panel."""

    def __init__(self, product: Product, blocks: Buffer, program: Program):
        super().__init__(product, blocks, program)
        assert isinstance(product.weight, CodedWeight) and isinstance(self.layout, CodedRows)
        self.group_words = self.layout.group_words
        self.weight = UnpackedWeight.of(product.weight)
        self.panel_group, self.panel_groups = 1, product.weight.panels
        self.part, together = self.layout.rows, self.weight.rows_in_registers
        if LEAST_PART <= together < self.part and self.weight.block <= LARGEST_HELD_BLOCK:
            self.part = together
        self.parts = -(-self.layout.rows // self.part)
        self.sums_bytes = self.layout.rows * product.reader.layout.columns * 4
        self.piece_bytes = -(-self.weight.bytes // 64) * 64
        self.row_group = min(self.row_group, max(1, SUMS_BYTES // self.sums_bytes))
        waiting = self.row_group if self.weight.pieces > 1 else 1
        self.scratch_bytes = self.piece_bytes + waiting * self.sums_bytes

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """Every row block of a group past each piece of a panel in turn."""
        number, first, last = self._groups_of(e, frame, tile)
        panel = self.product.weight.panel(e, frame, number)
        all_sums = e.offset(worker.scratch, self.piece_bytes)
        with e.loop(0, self.weight.pieces, name="piece") as index:
            turn = _Turn(panel, self.weight.piece(e, index, worker.scratch), first)
            self.weight.unpack(e, panel, turn.piece)
            with e.loop(first, last, name="block") as block:
                waiting = e.b.sub(block, first) if self.weight.pieces > 1 else i64(0)
                sums = e.offset(all_sums, e.b.mul(waiting, i64(self.sums_bytes)))
                self._add_piece(e, frame, sums, block, turn)
                with e.b.if_then(e.b.icmp_signed("==", index, i64(self.weight.pieces - 1))):
                    first_row, count = self._rows_of(e, frame, block)
                    self.epilogue.emit(e, frame, sums, first_row, count, number)

    def _add_piece(self, e: Emitter, frame: Frame, sums: ir.Value, block: ir.Value,
                   turn: _Turn) -> None:
        """sums (+)= a row block @ a piece, as many rows at a time as fit the registers."""
        start = e.offset(frame.pointer(self.blocks), e.b.mul(block, i64(self.block_bytes)))
        start = e.offset(start, e.b.mul(turn.piece.first_block, i64(self.group_words)), I32)
        _, count = self._rows_of(e, frame, block)
        own = e.ceildiv(count, e.ceildiv(count, i64(self.part)))
        columns = self.product.reader.layout.columns
        passed = e.b.mul(e.b.sub(block, turn.first), i64(self.parts))
        with e.loop(0, count, own, name="part") as row:
            self._add_part(e, e.offset(start, row, I32), own, turn,
                           e.offset(sums, e.b.mul(row, i64(columns)), F32),
                           e.b.add(passed, e.b.udiv(row, own)))

    def _add_part(self, e: Emitter, start: ir.Value, count: ir.Value, turn: _Turn, sums: ir.Value,
                  passed: ir.Value) -> None:
        """sums (+)= `count` rows from an address on @ a piece, which `passed` parts have passed."""
        weight, piece, k = self.weight, turn.piece, self.product.k
        whole = i64(k // weight.block)
        blocks = e.minimum(i64(weight.blocks), e.b.sub(whole, piece.first_block))
        begins = e.b.icmp_signed("==", piece.first_block, i64(0))
        behind = e.b.add(piece.first_block, i64(weight.blocks))
        ends = e.b.icmp_signed(">=", behind, i64(-(-k // weight.block)))
        done = e.b.mul(passed, i64(weight.blocks))
        for size in choose_body(e, count, self._part_sizes()):
            left = self._left(e, start, size)
            assert isinstance(left, LeftCodes)
            with e.b.if_then(begins):
                weight.clear(e, sums, size)
            weight.add_blocks(e, left, piece, sums, blocks, lambda block: weight.fetch_next(
                e, turn.panel, piece, e.b.add(done, block), FETCHING_BLOCKS * self.parts))
            with e.b.if_then(ends):
                if k % weight.block:
                    weight.add_rest(e, left, piece, sums, blocks)
                weight.packed.finish(e, turn.panel, sums, size)

    def _part_sizes(self) -> list[int]:
        """Rows that code is made for."""
        rows = self.product.rows
        if not isinstance(rows, int) or rows < 1:
            return body_sizes(self.part, rows)
        own = -(-rows // -(-rows // self.layout.rows))
        return sorted({size for count in (own, (rows - 1) % own + 1)
                       for size in body_sizes(self.part, count)})
