"""Products of activations as int8 codes and quantised weights: integers within a block of k.

Of a block of k with one scale of activations, whose k share one scale of the weight too,

    sum of a * s * (code - zero) * t = s * t * (sum of a * byte - (zero + offset) * sum of a)

where bytes are codes + offset. The first sum is one of products of bytes; the second is known when
the activations are coded, once per row. Of a weight without zeros it is what the integers start
from, so that a block costs a conversion and two multiplications per vector and row.

Where t has 16 bits, the conversion is none: integers i start from the bits of F = 1.5 * 2**23,
round which the steps of f32 are 1, and so are F + i as f32. F t is exact, and (F + i) t - F t,
fused, is i t rounded once. (F t overflows where t is beyond 2**103.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir

from llmc.codegen.host.byte_dot import STEPS, ByteDot, ByteReader
from llmc.codegen.host.microkernel import (
    FROM_CACHE,
    Reading,
    Tile,
    flatten,
    splat_constant,
    tile_places,
    unflatten,
)
from llmc.codegen.host.packed_weight import Panel, QuantizedWeight
from llmc.codegen.llvm import F32, I32, I64, POINTER, Emitter, i64, vector
from llmc.ir.layouts import CodedRows
from llmc.ir.quantized import FLOAT_START_VALUE

PREFETCHING_ROWS = 4  # with more, a panel is read from the cache


@dataclass(frozen=True)
class LeftCodes:
    """Coded rows of a tile; pointers: one per row, at the row's first scale; reading: how the panel
    is read beside them."""

    pointers: tuple[ir.Value, ...]
    layout: CodedRows
    reading: Reading = FROM_CACHE

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


class _SumsInMemory:
    """A tile of f32 sums; between blocks it is in memory."""

    def __init__(self, reader: ByteReader, pointer: ir.Value):
        self.reader, self.pointer, self.hidden = reader, pointer, pointer

    def begin(self, e: Emitter) -> None:
        """A block begins. The no-op asm keeps LLVM from holding all sums in registers over the
        loop: they would push out the integers."""
        self.hidden = e.b.asm(ir.FunctionType(POINTER, [POINTER]), "", "=r,0", [self.pointer], True)

    def add(self, e: Emitter, row: int, v: int, a: ir.Value, b: ir.Value) -> None:
        """The sum at (row, vector) += a * b."""
        place = e.offset(self.hidden, (row * self.reader.vectors + v) * self.reader.lanes, F32)
        e.store(e.multiply_add(a, b, e.load(place, a.type)), place)


@dataclass
class _SumsInRegisters:
    """A tile of f32 sums, as the values of a loop."""

    tile: Tile

    def begin(self, e: Emitter) -> None:
        """A block begins."""

    def add(self, e: Emitter, row: int, v: int, a: ir.Value, b: ir.Value) -> None:
        """The sum at (row, vector) += a * b."""
        self.tile[row][v] = e.multiply_add(a, b, self.tile[row][v])


_Sums = _SumsInMemory | _SumsInRegisters


@dataclass(frozen=True)
class CodedWeight(QuantizedWeight):
    """w[k, n] = (codes - zeros) * scales, multiplied by coded activations; `block`: k that share
    a scale of activations."""

    reader: ByteReader
    dot: ByteDot
    block: int

    streams = True  # whether a panel may come from memory

    def store_product(self, e: Emitter, left: LeftCodes, panel: Panel, sums: ir.Value) -> None:
        """left @ panel over all k, in the tile of sums."""
        rows = len(left.pointers)
        whole, rest = divmod(self.k, self.block)
        self.clear(e, sums, rows)
        self.add_blocks(e, left, panel, sums, i64(whole))
        if rest:
            self.add_rest(e, left, panel, sums, i64(whole))
        self.finish(e, panel, sums, rows)

    def clear(self, e: Emitter, sums: ir.Value, rows: int) -> None:
        """A tile of zeros."""
        zero = splat_constant(vector(F32, self.reader.lanes), 0.0)
        for place in tile_places(e, self.reader, sums, rows):
            e.store(zero, place)

    def add_blocks(self, e: Emitter, left: LeftCodes, panel: Any, sums: ir.Value,
                   count: ir.Value, beside: Callable[[ir.Value], None] = lambda block: None
                   ) -> None:
        """sums += the products of the first `count` blocks of left and panel; `beside` emits what
        else is done for each."""
        rows, reader = len(left.pointers), self.reader
        if rows > self.rows_in_registers:
            with e.loop(0, count, name="block") as block:
                beside(block)
                self._add_block(e, left, panel, _SumsInMemory(reader, sums), block, self.block)
            return
        places = tile_places(e, reader, sums, rows)
        held = [e.load(place, vector(F32, reader.lanes)) for place in places]
        with e.fold(0, count, held, name="block") as (block, flat, finish):
            beside(block)
            tile = _SumsInRegisters(unflatten(flat, reader.vectors))
            self._add_block(e, left, panel, tile, block, self.block)
            finish(flatten(tile.tile))
        for value, place in zip(finish.results, places, strict=True):
            e.store(value, place)

    @property
    def rows_in_registers(self) -> int:
        """Rows of a tile whose sums and integers fit the registers together."""
        registers = 16 if self.reader.lanes == 8 else 32
        # Columns, a factor, scales, what they make of where integers start; NEON multiplies by no
        # operand in memory.
        others = 9 if self.reader.lanes == 4 else 7
        return (registers - others) // (2 * self.reader.vectors)

    def add_rest(self, e: Emitter, left: LeftCodes, panel: Any, sums: ir.Value,
                 block: ir.Value) -> None:
        """sums += the products of the k behind the last whole block, whose number is `block`."""
        tile = _SumsInMemory(self.reader, sums)
        self._add_block(e, left, panel, tile, block, self.k % self.block)

    def finish(self, e: Emitter, panel: Panel, sums: ir.Value, rows: int) -> None:
        """Scale the sums, where a column has one scale."""
        if not self._whole_columns:
            return
        type_ = vector(F32, self.reader.lanes)
        scales = self._row(e, panel.scales, self.scales, i64(0))
        for number, place in enumerate(tile_places(e, self.reader, sums, rows)):
            total = e.load(place, type_)
            e.store(e.b.fmul(total, scales[number % self.reader.vectors]), place)

    @property
    def _whole_columns(self) -> bool:
        """Whether a column has one scale."""
        return self.group >= self.k

    def _add_block(self, e: Emitter, left: LeftCodes, panel: Any, sums: _Sums,
                   block: ir.Value, size: int) -> None:
        """sums += the products of a block's first `size` k."""
        sums.begin(e)
        distance = e.b.mul(block, i64(self.lanes_of(self.block) * self.reader.group_bytes))
        codes = _Codes(block, e.offset(panel.weights, distance))
        rows, steps = len(left.pointers), -(-size // 4)
        width = self.dot.vectors_at_once(self.reader.vectors, steps, rows)
        for first in range(0, self.reader.vectors, width):
            columns = range(first, first + width)
            tile = self._integers(e, left, codes, size, columns)
            self._scaled(e, left, panel, tile, block, columns, sums)

    def lanes_of(self, size: int) -> int:
        """32-bit lanes of codes that hold `size` k."""
        return -(-size // self.reader.layout.interleave)

    def group_of(self, e: Emitter, block: ir.Value) -> ir.Value:
        """Number of the group of a block: of its row of scales and of zeros."""
        if self._whole_columns:
            return i64(0)
        return e.b.udiv(block, i64(self.group // self.block))

    def row_number(self, e: Emitter, panel: Any, block: ir.Value) -> ir.Value:
        """Which of a panel's rows of scales belongs to a block."""
        return self.group_of(e, block)

    def _scaled(self, e: Emitter, left: LeftCodes, panel: Any, tile: Tile, block: ir.Value,
                columns: range, sums: _Sums) -> None:
        """sums += the integers of a block times its scales."""
        lanes, number = self.reader.lanes, self.row_number(e, panel, block)
        scales = [] if self._whole_columns else self._row(e, panel.scales, self.scales, number)
        zeros = self._zeros(e, panel, number)
        float_start = splat_constant(vector(F32, lanes), -FLOAT_START_VALUE)
        starts = [e.b.fmul(scale, float_start) for scale in scales]
        for row, integers in enumerate(tile):
            own = e.splat(left.scale(e, row, block), lanes)
            plain = e.splat(e.b.sitofp(left.sum(e, row, block), F32), lanes) if zeros else None
            for v, value in zip(columns, integers, strict=True):
                if left.layout.start:
                    product = e.b.bitcast(value, float_start.type)
                    product = e.multiply_add(product, scales[v], starts[v]) if scales else \
                        e.b.fadd(product, float_start)
                else:
                    product = e.b.sitofp(value, float_start.type)
                    product = e.multiply_add(zeros[v], plain, product) if zeros else product
                    product = e.b.fmul(product, scales[v]) if scales else product
                sums.add(e, row, v, product, own)

    def _zeros(self, e: Emitter, panel: Any, number: ir.Value) -> list[ir.Value]:
        """-(zero + offset) of a group, a vector of f32 each; none without zeros."""
        if self.zeros is None:
            return []
        offset = splat_constant(vector(F32, self.reader.lanes), -float(self.reader.offset))
        return [e.b.fsub(offset, zero) for zero in self._row(e, panel.zeros, self.zeros, number)]

    # ---- integers ---------------------------------------------------------------------------

    def _integers(self, e: Emitter, left: LeftCodes, codes: _Codes, size: int,
                  columns: range) -> Tile:
        """Sums of the products of bytes over a block's first `size` k, STEPS steps at a time, for
        some vectors of columns."""
        lanes = self.lanes_of(size)
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
            return [[splat_constant(type_, left.layout.start)] * vectors for _ in left.pointers]
        # Loaded anew for every vector (the no-op asm keeps LLVM from merging the loads): a copy
        # of a register would wait for the ports of products.
        again = e.b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [block], False)
        return [[e.splat(left.sum(e, row, again if v else block), self.reader.lanes)
                 for v in range(vectors)] for row in range(len(left.pointers))]

    def _add_lanes(self, e: Emitter, left: LeftCodes, codes: _Codes, tile: Tile, first: ir.Value,
                   count: int, columns: range) -> Tile:
        """tile + the products of `count` lanes of codes from lane `first` of the block on."""
        reader = self.reader
        start = e.offset(codes.address, e.b.mul(first, i64(reader.group_bytes)))
        if columns.start == 0 and len(left.pointers) <= PREFETCHING_ROWS and self.streams:
            left.reading.prefetch(e, start, 0, count * reader.group_bytes)
        steps = [step[columns.start:columns.stop] for lane in range(count)
                 for step in reader.group(e, start, lane * reader.group_bytes)]
        first_step = e.b.mul(first, i64(reader.steps))
        rows = [left.codes(e, row, codes.block, first_step) for row in range(len(left.pointers))]

        def factor(row: int, step: int) -> ir.Value:
            place = e.offset(rows[row], step * left.layout.rows, I32)
            return e.splat(e.load(place, I32), reader.lanes)

        return self.dot.add(e, tile, steps, factor)
