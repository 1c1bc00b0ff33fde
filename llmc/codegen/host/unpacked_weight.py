"""A coded weight as `CodedMatmul` multiplies it: unpacked into a worker's scratch by pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import llvmlite.ir as ir

from llmc.codegen.host.byte_dot import ByteReader
from llmc.codegen.host.coded_weight import CodedWeight
from llmc.codegen.host.microkernel import CACHE_LINE, FAR, Tile, prefetch
from llmc.codegen.host.packed_weight import Panel
from llmc.codegen.llvm import F32, I32, Emitter, i64
from llmc.ir.dtypes import dtype, f32
from llmc.ir.graph import TensorType
from llmc.ir.layouts import Panels
from llmc.ir.program import Buffer

PIECE_BYTES = 16 << 10  # of bytes ready to be multiplied: half of an L1 cache of 32 KB


@dataclass(frozen=True)
class Piece:
    """Some blocks of a panel in scratch: addresses of bytes, rows of scales and of zeros; numbers
    of the first block and the first row in the panel."""

    weights: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    first_block: ir.Value
    first_row: ir.Value


@dataclass(frozen=True)
class UnpackedReader(ByteReader):
    """Reads bytes that are ready to be multiplied."""

    def group(self, e: Emitter, pointer: ir.Value, offset: int) -> Tile:
        """One step: words of four bytes."""
        return [self._load(e, pointer, offset, I32)]


@dataclass(frozen=True)
class UnpackedWeight(CodedWeight):
    """A coded weight whose panels are pieces: bytes as they are multiplied, scales and zeros as
    f32. packed: the weight itself; blocks: of a piece."""

    packed: CodedWeight
    blocks: int

    streams = False

    @staticmethod
    def of(weight: CodedWeight) -> UnpackedWeight:
        """How a weight is unpacked."""
        packed = weight.reader
        reader = UnpackedReader(dtype("u8"), Panels(packed.layout.columns, 4, packed.layout.parts),
                                packed.lanes, offset=packed.offset)
        of_block = weight.lanes_of(weight.block) * packed.steps * reader.group_bytes
        zeros = None if weight.zeros is None else _as_f32(weight.zeros)
        return UnpackedWeight(weight.buffer, reader, _as_f32(weight.scales), zeros, weight.group,
                              weight.dot, weight.block, weight, max(1, PIECE_BYTES // of_block))

    @property
    def pieces(self) -> int:
        """Of a panel."""
        return -(-self.k // (self.blocks * self.block))

    @property
    def bytes(self) -> int:
        """Of a piece in scratch."""
        return self._codes_bytes + self._rows_bytes * (1 if self.zeros is None else 2)

    @property
    def _codes_bytes(self) -> int:
        return self.blocks * self.lanes_of(self.block) * self.reader.group_bytes

    @property
    def _rows_bytes(self) -> int:
        return self._rows * self._row_bytes(self.scales)

    @property
    def _rows(self) -> int:
        """Rows of scales that a piece may touch: it may begin and end inside a group."""
        return self.blocks // max(1, self.group // self.block) + 2

    def piece(self, e: Emitter, number: ir.Value, scratch: ir.Value) -> Piece:
        """A piece of a panel, to be unpacked to an address."""
        first = e.b.mul(number, i64(self.blocks))
        scales = e.offset(scratch, self._codes_bytes)
        zeros = None if self.zeros is None else e.offset(scales, self._rows_bytes)
        return Piece(scratch, scales, zeros, first, self.group_of(e, first))

    def unpack(self, e: Emitter, panel: Panel, piece: Piece) -> None:
        """Fill a piece from its panel."""
        reader, own_bytes = self.packed.reader, self.reader.group_bytes
        of_block = self.packed.lanes_of(self.block)
        first = e.b.mul(piece.first_block, i64(of_block))
        left = e.b.sub(i64(self.packed.lanes_of(self.k)), first)
        source = e.offset(panel.weights, e.b.mul(first, i64(reader.group_bytes)))
        with e.loop(0, e.minimum(i64(self.blocks * of_block), left), name="lane") as lane:
            at = e.offset(source, e.b.mul(lane, i64(reader.group_bytes)))
            to = e.offset(piece.weights, e.b.mul(lane, i64(reader.steps * own_bytes)))
            for step, words in enumerate(reader.group(e, at, 0)):
                for v, word in enumerate(words):
                    e.store(word, e.offset(to, step * own_bytes + v * 4 * reader.lanes))
        self._widen_rows(e, panel, piece)

    def _widen_rows(self, e: Emitter, panel: Panel, piece: Piece) -> None:
        """The rows of scales and zeros of a piece as f32."""
        left = e.b.sub(i64(-(-self.k // self.group)), piece.first_row)
        with e.loop(0, e.minimum(i64(self._rows), left), name="row") as row:
            for buffer, source, to in self._of_rows(panel, piece):
                values = self.packed._row(e, source, buffer, e.b.add(row, piece.first_row))
                place = e.offset(to, e.b.mul(row, i64(self._row_bytes(self.scales))))
                for v, value in enumerate(values):
                    e.store(value, e.offset(place, v * self.reader.lanes, F32))

    def _of_rows(self, panel: Panel, piece: Piece) -> Iterator[tuple[Buffer, ir.Value, ir.Value]]:
        """Buffer, address in a panel, and address in scratch, of scales and zeros."""
        yield self.packed.scales, panel.scales, piece.scales
        if self.packed.zeros is not None:
            yield self.packed.zeros, panel.zeros, piece.zeros

    def fetch_next(self, e: Emitter, panel: Panel, piece: Piece, turn: ir.Value,
                   passes: int) -> None:
        """Ask for a share of what lies behind a piece in memory: the next piece, or panel. turn:
        blocks of k that rows have been multiplied by since the piece was unpacked; after so many
        passes over the piece there is nothing left to ask for."""
        codes = self.packed.lanes_of(self.block) * self.packed.reader.group_bytes
        areas = [(panel.weights, piece.first_block, self.blocks, codes)]
        areas += [(start, piece.first_row, self._rows - 2, self.packed._row_bytes(buffer))
                  for buffer, start, _ in self._of_rows(panel, piece)]
        for start, first, count, size in areas:
            lines = -(-size * count // CACHE_LINE)
            share = -(-lines // (passes * self.blocks))
            behind = e.offset(start, e.b.mul(e.b.add(first, i64(count)), i64(size)))
            line = e.minimum(e.b.mul(turn, i64(share)), i64(lines))
            prefetch(e, e.offset(behind, e.b.mul(line, i64(CACHE_LINE))), share * CACHE_LINE, FAR)

    def row_number(self, e: Emitter, panel: Piece, block: ir.Value) -> ir.Value:
        return e.b.sub(self.group_of(e, e.b.add(panel.first_block, block)), panel.first_row)

    def lanes_of(self, size: int) -> int:
        return self.packed.lanes_of(size) * self.packed.reader.steps


def _as_f32(buffer: Buffer) -> Buffer:
    return replace(buffer, type=TensorType(f32, buffer.type.shape))
