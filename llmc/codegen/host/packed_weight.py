"""The right operand of a matmul as it lies in memory: panels of floats, or of codes and scales.

Of a quantised weight, sum over k of x * (code - zero) * scale is computed group by group: the codes
are widened in registers, and the sum of a group is scaled once. No dequantised copy exists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.host.kernel import Frame
from llmc.codegen.host.microkernel import (
    LeftRows,
    PanelReader,
    Tile,
    flatten,
    store_tile,
    tile_places,
    tile_product,
    unflatten,
    zeros_of,
)
from llmc.codegen.llvm import F32, I32, Emitter, i64, splat_constant, vector
from llmc.ir.dims import evaluate
from llmc.ir.dtypes import f32
from llmc.ir.program import Buffer


@dataclass(frozen=True)
class Panel:
    """A panel at run time: addresses of its weights and, if they are codes, scales and zeros."""

    weights: ir.Value
    scales: ir.Value | None = None
    zeros: ir.Value | None = None


@dataclass(frozen=True)
class PackedWeight:
    """w[k, n] of floats in panels."""

    buffer: Buffer
    reader: PanelReader

    @property
    def k(self) -> int:
        return evaluate(self.buffer.type.shape[0], {})

    @property
    def panels(self) -> int:
        return evaluate(self.reader.layout.panels(self.buffer.type.shape), {})

    @property
    def panel_bytes(self) -> int:
        return -(-self.k // self.reader.layout.interleave) * self.reader.group_bytes

    def panel(self, e: Emitter, frame: Frame, index: ir.Value) -> Panel:
        """Where a panel lies."""
        return Panel(_panel_at(e, frame, self.buffer, index, self.panel_bytes))

    def product(self, e: Emitter, left: LeftRows, panel: Panel) -> Tile:
        """left @ panel over all k."""
        return tile_product(e, self.reader, left, panel.weights, self.k)

    def store_product(self, e: Emitter, left: Any, panel: Panel, sums: ir.Value) -> None:
        """left @ panel over all k, as the first rows of a tile of sums in memory."""
        store_tile(e, self.reader, sums, self.product(e, left, panel))


    def add_product(self, e: Emitter, left: LeftRows, part: Panel, sums: ir.Value, k: int,
                    fresh: ir.Value) -> None:
        """left @ part over k, a piece of all k, added to a tile of sums (none yet if `fresh`)."""
        tile = tile_product(e, self.reader, left, part.weights, k)
        places = tile_places(e, self.reader, sums, len(tile))
        with e.b.if_then(fresh):
            store_tile(e, self.reader, sums, zeros_of(self.reader, len(tile)))
        for value, place in zip(flatten(tile), places, strict=True):
            e.store(self.reader.add(e, value, e.load(place, value.type)), place)


@dataclass(frozen=True)
class QuantizedWeight(PackedWeight):
    """w[k, n] = (codes - zeros) * scales, with scales and zeros[k / group, n] in panels of the
    same columns; group: a multiple of the codes in a 32-bit lane."""

    reader: Any  # a CodeReader; of other classes, their own
    scales: Buffer
    zeros: Buffer | None
    group: int

    def panel(self, e: Emitter, frame: Frame, index: ir.Value) -> Panel:
        """Where a panel and its scales and zeros lie."""
        weights, scales, *zeros = (
            _panel_at(e, frame, buffer, index, size) for buffer, size in (
                (self.buffer, self.panel_bytes),
                *((each, self._row_bytes(each) * -(-self.k // self.group))
                  for each in (self.scales, self.zeros) if each is not None)))
        return Panel(weights, scales, zeros[0] if zeros else None)

    def product(self, e: Emitter, left: LeftRows, panel: Panel) -> Tile:
        """The sum over groups of (left @ codes of the group) * scales of the group."""
        rows, whole = len(left.pointers), self.k // self.group
        totals = zeros_of(self.reader, rows)
        if whole:
            with e.fold(0, whole, flatten(totals), name="group") as (group, flat, finish):
                tile = unflatten(flat, self.reader.vectors)
                finish(flatten(self._add_group(e, left, panel, tile, group, self.group)))
            totals = unflatten(finish.results, self.reader.vectors)
        if self.k % self.group:
            totals = self._add_group(e, left, panel, totals, i64(whole), self.k % self.group)
        return totals

    def _add_group(self, e: Emitter, left: LeftRows, panel: Panel, totals: Tile, group: ir.Value,
                   size: int) -> Tile:
        """totals + the products of the group's first `size` k."""
        lanes = self.group // self.reader.layout.interleave
        reader = self.reader
        if self.zeros is not None:
            zeros = self._row(e, panel.zeros, self.zeros, group)
            reader = replace(reader, zeros=tuple(zeros))
        codes = e.offset(panel.weights, e.b.mul(group, i64(lanes * reader.group_bytes)))
        sums = tile_product(e, reader, left.advanced(e, group, lanes), codes, size)
        scales = self._row(e, panel.scales, self.scales, group)
        return [[e.multiply_add(value, scale, total)
                 for value, scale, total in zip(*row, strict=True)]
                for row in ((s, scales, t) for s, t in zip(sums, totals, strict=True))]

    def _row(self, e: Emitter, panel: ir.Value, buffer: Buffer, group: ir.Value) -> list[ir.Value]:
        """The scales or zeros of a group, as vectors of f32 over the panel's columns."""
        lanes, dtype = self.reader.lanes, buffer.type.dtype
        row = e.offset(panel, e.b.mul(group, i64(self._row_bytes(buffer))))
        return [elements.convert(e, elements.load(e, row, i64(v * lanes), dtype, lanes), dtype, f32)
                for v in range(self.reader.vectors)]

    def _row_bytes(self, buffer: Buffer) -> int:
        return self.reader.layout.columns * buffer.type.dtype.bits // 8


@dataclass(frozen=True)
class CodeReader(PanelReader):
    """Reads panels of 2-, 4- or 8-bit codes, as f32 less the zeros (a vector each, or none)."""

    zeros: tuple[ir.Value, ...] = ()

    def group(self, e: Emitter, pointer: ir.Value, offset: int) -> Tile:
        """The vectors [step][vector] of the group at pointer + offset bytes: every 32-bit lane
        holds `interleave` codes of its column, the first in the low bits."""
        words = self._load(e, pointer, offset, I32)
        return [[self._widened(e, word, step, v) for v, word in enumerate(words)]
                for step in range(self.steps)]

    def _widened(self, e: Emitter, word: ir.Value, step: int, v: int) -> ir.Value:
        bits, wide = self.dtype.bits, vector(F32, self.lanes)

        def number(x: int) -> ir.Constant:
            return splat_constant(word.type, x)

        if self.dtype.kind == "int":
            top = e.b.shl(word, number(32 - bits * (step + 1)))
            value = e.b.sitofp(e.b.ashr(top, number(32 - bits)), wide)
        else:
            low = e.b.lshr(word, number(bits * step))
            value = e.b.sitofp(e.b.and_(low, number((1 << bits) - 1)), wide)
        return e.b.fsub(value, self.zeros[v]) if self.zeros else value


def _panel_at(e: Emitter, frame: Frame, buffer: Buffer, index: ir.Value, size: int) -> ir.Value:
    return e.offset(frame.pointer(buffer), e.b.mul(index, i64(size)))
