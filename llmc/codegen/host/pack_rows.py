"""Rows that a matmul reads, copied into row blocks: words of several rows change places in
registers. Stored element by element, as maps do, they would take several times as long.
Floats of 16 bits that a matmul reads as f32 are widened on the way.

A tile is a piece of a row block. Floor: a load for each vector of a row, and a store or two for
each column of a block; beyond the caches, reading and writing.
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.host.attention_blocks import transpose
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.llvm import I32, Emitter, i64, vector
from llmc.ir.dims import product
from llmc.ir.dtypes import f32
from llmc.ir.graph import Node
from llmc.ir.layouts import RowBlocks, Rows
from llmc.ir.program import Buffer, Program, Stage

PIECE = 512  # words of a row in a tile
WORD_BITS = 32


@dataclass(frozen=True)
class PackRows:
    """A stage that copies rows into row blocks of whole 32-bit words."""

    source: Buffer
    blocks: Buffer
    lanes: int

    scratch_bytes = 0

    @classmethod
    def of(cls, stage: Stage, program: Program) -> PackRows | None:
        """The kernel of a map stage; None if it does anything else."""
        if len(stage.results) != 1 or len(stage.operands) != 1:
            return None
        source = program.buffers[stage.operands[0]]
        blocks = program.buffers[stage.results[0]]
        layout, own = blocks.layout, source.type.dtype
        widened = blocks.type.dtype is f32 and own.name in ("f16", "bf16")
        value = _without_reshapes(stage.body.outputs[0][1])
        if widened and value.op == "cast":
            value = _without_reshapes(value.inputs[0])
        width = blocks.type.shape[-1] if blocks.type.shape else None
        if (value.op != "input" or source.layout != Rows() or not isinstance(layout, RowBlocks)
                or source.packed or not (own is blocks.type.dtype or widened)
                or layout.interleave * blocks.type.dtype.bits != WORD_BITS
                or not isinstance(width, int) or width % layout.interleave):
            return None
        return cls(source, blocks, program.capabilities.vector_lanes)

    @property
    def layout(self) -> RowBlocks:
        assert isinstance(self.blocks.layout, RowBlocks)
        return self.blocks.layout

    @property
    def words(self) -> int:
        """Of a row."""
        width = self.blocks.type.shape[-1]
        assert isinstance(width, int)
        return width // self.layout.interleave

    @property
    def pieces(self) -> int:
        return -(-self.words // PIECE)

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Pieces of all row blocks."""
        return e.b.mul(self._blocks(e, frame), i64(self.pieces))

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing is shared by a worker's tiles."""

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """A piece of a block, some words of all its rows at a time."""
        block = e.b.udiv(tile, i64(self.pieces))
        piece = e.b.sub(tile, e.b.mul(block, i64(self.pieces)))
        start = e.b.mul(piece, i64(PIECE))
        stop = e.minimum(e.b.add(start, i64(PIECE)), i64(self.words))
        whole = e.b.sub(stop, e.b.urem(e.b.sub(stop, start), i64(self.lanes)))
        rows = self._rows(e, frame, block)
        size = self.layout.rows
        target = e.offset(frame.pointer(self.blocks),
                          e.b.mul(block, i64(self.words * size)), I32)
        with e.loop(start, whole, self.lanes, "word") as word:
            self._exchange(e, rows, word, target)
        with e.loop(whole, stop, name="word") as word:
            for number, row in enumerate(rows):
                place = e.b.add(e.b.mul(word, i64(size)), i64(number))
                e.store(self._load(e, row, word, 1), e.offset(target, place, I32))

    def _exchange(self, e: Emitter, rows: list[ir.Value], word: ir.Value,
                  target: ir.Value) -> None:
        """`lanes` words of each row: as many rows at a time as a vector has lanes."""
        size = self.layout.rows
        for first in range(0, size, self.lanes):
            own = rows[first:first + self.lanes]
            vectors = [self._load(e, row, word, self.lanes) for row in own]
            unused = ir.Constant(vectors[0].type, ir.Undefined)
            columns = transpose(e, vectors + [unused] * (self.lanes - len(own)))
            for number, column in enumerate(columns):
                line = e.b.mul(e.b.add(word, i64(number)), i64(size))
                self._store(e, column, len(own), e.offset(target, e.b.add(line, i64(first)), I32))

    def _load(self, e: Emitter, row: ir.Value, word: ir.Value, count: int) -> ir.Value:
        """`count` words of a row."""
        type_ = vector(I32, count)
        if self.source.type.dtype is self.blocks.type.dtype:
            return e.load(e.offset(row, word, I32), type_, 1)
        return e.b.bitcast(elements.load(e, row, word, self.source.type.dtype, count), type_)

    def _store(self, e: Emitter, column: ir.Value, count: int, place: ir.Value) -> None:
        """The first `count` words of a vector: parts of a power of two, the largest first."""
        start = 0
        while start < count:
            width = 1 << (count - start).bit_length() - 1
            part = column
            if width < self.lanes:
                numbers = ir.Constant(ir.VectorType(I32, width), list(range(start, start + width)))
                part = e.b.shuffle_vector(column, column, numbers)
            e.store(part, e.offset(place, start, I32))
            start += width

    def _rows(self, e: Emitter, frame: Frame, block: ir.Value) -> list[ir.Value]:
        """Where the rows of a block lie; those beyond its own stand for its last one again."""
        total = frame.dim(product(self.blocks.type.shape[:-1]))
        own = e.ceildiv(total, e.maximum(i64(1), self._blocks(e, frame)))
        first = e.b.mul(block, own)
        last = e.b.sub(e.minimum(e.b.add(first, own), total), i64(1))
        base = frame.pointer(self.source)
        row_bytes = self.words * self.layout.interleave * self.source.type.dtype.bits // 8
        return [e.offset(base, e.b.mul(e.minimum(e.b.add(first, i64(number)), last),
                                       i64(row_bytes)))
                for number in range(self.layout.rows)]

    def _blocks(self, e: Emitter, frame: Frame) -> ir.Value:
        rows = frame.dim(product(self.blocks.type.shape[:-1]))
        return e.ceildiv(rows, i64(self.layout.rows))


def _without_reshapes(value: Node) -> Node:
    while value.op == "reshape":
        value = value.inputs[0]
    return value
