"""Products of activations as int8 codes and quantised weights: integers within a block of k.

Of a block of k with one scale of activations, whose k share one scale of the weight too,

    sum of a * s * (code - zero) * t = s * t * (sum of a * byte - (zero + offset) * sum of a)

where bytes are codes + offset. The first sum is one of products of bytes; the second is known when
the activations are coded, once per row. Of a weight without zeros it is what the integers start
from, so that a block costs one conversion and two multiplications per vector and row.
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.host.byte_dot import STEPS, ByteDot, ByteReader
from llmc.codegen.host.microkernel import (
    PREFETCH_BYTES,
    Tile,
    flatten,
    prefetch,
    splat_constant,
    tile_places,
    unflatten,
)
from llmc.codegen.host.packed_weight import Panel, QuantizedWeight
from llmc.codegen.llvm import F32, I32, POINTER, Emitter, i64, vector
from llmc.ir.layouts import CodedRows

PREFETCHING_ROWS = 4  # with more, a panel is read from the cache


@dataclass(frozen=True)
class LeftCodes:
    """Coded rows of a tile; pointers: one per row, at the row's first scale."""

    pointers: tuple[ir.Value, ...]
    layout: CodedRows

    def scale(self, e: Emitter, row: int, block: ir.Value) -> ir.Value:
        """Of a block of a row, f32."""
        return e.load(self._at(e, row, block, 0), F32)

    def sum(self, e: Emitter, row: int, block: ir.Value) -> ir.Value:
        """What the layout calls the sum of a block's codes, i32."""
        return e.load(self._at(e, row, block, 1), I32)

    def codes(self, e: Emitter, row: int, block: ir.Value, step: ir.Value) -> ir.Value:
        """Address of a step's four codes."""
        start = self._at(e, row, block, 2)
        return e.offset(start, e.b.mul(step, i64(self.layout.rows)), I32)

    def _at(self, e: Emitter, row: int, block: ir.Value, line: int) -> ir.Value:
        words = e.b.mul(block, i64(self.layout.group_words))
        return e.offset(self.pointers[row], e.b.add(words, i64(line * self.layout.rows)), I32)


@dataclass(frozen=True)
class _Codes:
    """The codes of a panel that belong to a block of k."""

    block: ir.Value
    address: ir.Value


@dataclass(frozen=True)
class CodedWeight(QuantizedWeight):
    """w[k, n] = (codes - zeros) * scales, multiplied by coded activations; `block`: k that share
    a scale of activations."""

    reader: ByteReader
    dot: ByteDot
    block: int

    def store_product(self, e: Emitter, left: LeftCodes, panel: Panel, sums: ir.Value) -> None:
        """left @ panel over all k, in the tile of sums."""
        rows = len(left.pointers)
        zero = splat_constant(vector(F32, self.reader.lanes), 0.0)
        for place in tile_places(e, self.reader, sums, rows):
            e.store(zero, place)
        whole, rest = divmod(self.k, self.block)
        with e.loop(0, whole, name="block") as block:
            self._add_block(e, left, panel, sums, block, self.block)
        if rest:
            self._add_block(e, left, panel, sums, i64(whole), rest)
        if self._whole_columns:
            scales = self._row(e, panel.scales, self.scales, i64(0))
            for number, place in enumerate(tile_places(e, self.reader, sums, rows)):
                total = e.load(place, zero.type)
                e.store(e.b.fmul(total, scales[number % self.reader.vectors]), place)

    @property
    def _whole_columns(self) -> bool:
        """Whether a column has one scale."""
        return self.group >= self.k

    def _add_block(self, e: Emitter, left: LeftCodes, panel: Panel, sums: ir.Value,
                   block: ir.Value, size: int) -> None:
        """sums += the products of a block's first `size` k.

        The no-op asm keeps LLVM from holding all sums in registers over the loop: they would push
        out the integers.
        """
        hidden = e.b.asm(ir.FunctionType(POINTER, [POINTER]), "", "=r,0", [sums], True)
        lanes = self.block // self.reader.layout.interleave
        distance = e.b.mul(block, i64(lanes * self.reader.group_bytes))
        codes = _Codes(block, e.offset(panel.weights, distance))
        width = self.dot.vectors_at_once(self.reader.vectors, -(-size // 4))
        for first in range(0, self.reader.vectors, width):
            columns = range(first, first + width)
            tile = self._integers(e, left, codes, size, columns)
            self._scaled(e, left, panel, tile, block, columns, hidden)

    def _scaled(self, e: Emitter, left: LeftCodes, panel: Panel, tile: Tile, block: ir.Value,
                columns: range, sums: ir.Value) -> None:
        """sums += the integers of a block times its scales."""
        lanes, group = self.reader.lanes, e.b.udiv(block, i64(max(1, self.group // self.block)))
        scales = [] if self._whole_columns else self._row(e, panel.scales, self.scales, group)
        zeros = self._zeros(e, panel, group)
        wide = vector(F32, lanes)
        for row, integers in enumerate(tile):
            own = e.splat(left.scale(e, row, block), lanes)
            plain = e.splat(e.b.sitofp(left.sum(e, row, block), F32), lanes) if zeros else None
            for v, value in zip(columns, integers, strict=True):
                place = e.offset(sums, (row * self.reader.vectors + v) * lanes, F32)
                product = e.b.sitofp(value, wide)
                if zeros:
                    product = e.multiply_add(zeros[v], plain, product)
                if scales:
                    product = e.b.fmul(product, scales[v])
                e.store(e.multiply_add(product, own, e.load(place, wide)), place)

    def _zeros(self, e: Emitter, panel: Panel, group: ir.Value) -> list[ir.Value]:
        """-(zero + offset) of a group, a vector of f32 each; none without zeros."""
        if self.zeros is None:
            return []
        offset = splat_constant(vector(F32, self.reader.lanes), -float(self.reader.offset))
        return [e.b.fsub(offset, zero) for zero in self._row(e, panel.zeros, self.zeros, group)]

    # ---- integers ---------------------------------------------------------------------------

    def _integers(self, e: Emitter, left: LeftCodes, codes: _Codes, size: int,
                  columns: range) -> Tile:
        """Sums of the products of bytes over a block's first `size` k, STEPS steps at a time, for
        some vectors of columns."""
        lanes = -(-size // self.reader.layout.interleave)
        at_once = STEPS // self.reader.steps
        whole = lanes // at_once
        tile = self._start(e, left, codes.block, len(columns))
        if whole > 1:
            with e.fold(0, whole, flatten(tile), name="steps") as (turn, flat, finish):
                first = e.b.mul(turn, i64(at_once))
                tile = unflatten(flat, len(columns))
                tile = self._add_lanes(e, left, codes, tile, first, at_once, columns)
                finish(flatten(tile))
            tile = unflatten(finish.results, len(columns))
        elif whole:
            tile = self._add_lanes(e, left, codes, tile, i64(0), at_once, columns)
        if lanes % at_once:
            tile = self._add_lanes(e, left, codes, tile, i64(whole * at_once),
                                   lanes % at_once, columns)
        return tile

    def _start(self, e: Emitter, left: LeftCodes, block: ir.Value, vectors: int) -> Tile:
        type_ = vector(I32, self.reader.lanes)
        if self.zeros is not None or not self.reader.offset:
            return [[splat_constant(type_, 0)] * vectors for _ in left.pointers]
        return [[e.splat(left.sum(e, row, block), self.reader.lanes)] * vectors
                for row in range(len(left.pointers))]

    def _add_lanes(self, e: Emitter, left: LeftCodes, codes: _Codes, tile: Tile, first: ir.Value,
                   count: int, columns: range) -> Tile:
        """tile + the products of `count` lanes of codes from lane `first` of the block on."""
        reader = self.reader
        start = e.offset(codes.address, e.b.mul(first, i64(reader.group_bytes)))
        if columns.start == 0 and len(left.pointers) <= PREFETCHING_ROWS:
            prefetch(e, e.offset(start, PREFETCH_BYTES), count * reader.group_bytes)
        steps = [step[columns.start:columns.stop] for lane in range(count)
                 for step in reader.group(e, start, lane * reader.group_bytes)]
        first_step = e.b.mul(first, i64(reader.steps))
        rows = [left.codes(e, row, codes.block, first_step) for row in range(len(left.pointers))]

        def factor(row: int, step: int) -> ir.Value:
            place = e.offset(rows[row], step * left.layout.rows, I32)
            return e.splat(e.load(place, I32), reader.lanes)

        return self.dot.add(e, tile, steps, factor)
