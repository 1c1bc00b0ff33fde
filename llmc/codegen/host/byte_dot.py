"""Products of bytes added up in 32 bits, as each CPU has them, and the bytes that weights hold.

| byte_dot | instructions for 32-bit lanes of four products | floor, per vector and row |
|---|---|---|
| vnni | vpdpbusd: unsigned weights x signed activations | 1 |
| maddubs, below 8 bits | vpmaddubsw, vpaddw; after 8 steps vpmaddwd, vpaddd | 2.25 |
| maddubs, 8 bits | vpsignb, vpmaddubsw, vpmaddwd, vpaddd: abs(w) x (sign(w) a) fits 16 bits | 4 |
| sdot | sdot: signed x signed | 1 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.host.microkernel import PanelReader, Tile
from llmc.codegen.llvm import I1, I8, I16, I32, Emitter, splat_constant, vector

STEPS = 8  # sums of so many products of codes below 8 bits stay within 16 bits
# Bits of weights -> so few rows leave registers for all vectors at once, and then lines of weights
# are read once, in order: 1 row by 8 bits, blocks of 128 k, takes 0.89 of the time with one or two
# threads of Zen 3, 0.97 with four; by 4 bits 0.87 and 0.93. More rows spill.
ROWS_TOGETHER = {8: 2, 4: 1}
_MASKS = {4: 0x0F0F0F0F, 2: 0x03030303}
_TOP_BITS = {8: 0x80808080, 4: 0x88888888, 2: 0xAAAAAAAA}

Factor = Callable[[int, int], ir.Value]  # (row, step) -> four codes of activations in each lane


@dataclass(frozen=True)
class ByteReader(PanelReader):
    """Reads panels of 2-, 4- or 8-bit codes as bytes, each `offset` more than its code."""

    offset: int = 0

    @property
    def steps(self) -> int:
        """Words of four bytes that a 32-bit lane of codes unpacks to."""
        return 8 // self.dtype.bits

    def group(self, e: Emitter, pointer: ir.Value, offset: int) -> Tile:
        """The vectors [step][vector] of the lanes at pointer + offset bytes: byte j of step s is
        code j * steps + s of its lane."""
        words = self._load(e, pointer, offset, I32)
        bits = self.dtype.bits
        if self.offset:
            words = [e.b.xor(word, splat_constant(word.type, _TOP_BITS[bits])) for word in words]
        if bits == 8:
            return [words]
        return [[self._masked(e, word, step * bits) for word in words]
                for step in range(self.steps)]

    def _masked(self, e: Emitter, word: ir.Value, shift: int) -> ir.Value:
        low = e.b.lshr(word, splat_constant(word.type, shift)) if shift else word
        return e.b.and_(low, splat_constant(word.type, _MASKS[self.dtype.bits]))


@dataclass(frozen=True)
class IntegerBytes(PanelReader):
    """Reads panels of signed bytes, `interleave` = 4, to be multiplied by left bytes of
    `Capabilities.byte_activation`: integers all the way, added up in i32."""

    name: str = ""

    @property
    def element(self) -> ir.Type:
        return I32

    @property
    def steps(self) -> int:
        return 1

    def group(self, e: Emitter, pointer: ir.Value, offset: int) -> Tile:
        """One step: vectors of words of four bytes."""
        return [self._load(e, pointer, offset, I32)]

    def multiply_add(self, e: Emitter, accumulator: ir.Value, factor: ir.Value,
                     column: ir.Value) -> ir.Value:
        return ByteDot(self.name, self.lanes, 8).dot(e, accumulator, factor, column)

    def add(self, e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        return e.b.add(a, b)


@dataclass(frozen=True)
class ByteDot:
    """name: `Capabilities.byte_dot`. lanes: 32-bit lanes of a vector. bits: of the weights."""

    name: str
    lanes: int
    bits: int

    def vectors_at_once(self, vectors: int, steps: int, rows: int) -> int:
        """Vectors of a tile whose sums over `steps` steps fit the registers together."""
        apart = self.name == "maddubs" and (self.bits == 8 or self.lanes == 8 or steps > STEPS)
        return 1 if apart and rows > ROWS_TOGETHER.get(self.bits, 0) else vectors

    def add(self, e: Emitter, tile: Tile, steps: Sequence[Sequence[ir.Value]],
            factor: Factor) -> Tile:
        """tile[row][vector] + the products of at most STEPS steps of weights."""
        if self.name == "maddubs":
            return self._add_pairs(e, tile, steps, factor)
        for step, columns in enumerate(steps):
            for row, sums in enumerate(tile):
                bytes_ = factor(row, step)
                tile[row] = [self.dot(e, total, column, bytes_)
                             for total, column in zip(sums, columns, strict=True)]
        return tile

    def dot(self, e: Emitter, total: ir.Value, column: ir.Value, bytes_: ir.Value) -> ir.Value:
        """total + the sums of four products, in one instruction; column: bytes without a sign
        where it is vpdpbusd."""
        type_ = vector(I8, 4 * self.lanes)
        name = "aarch64.neon.sdot.v4i32.v16i8" if self.name == "sdot" else \
            f"x86.avx512.vpdpbusd.{32 * self.lanes}"
        return e.call(f"llvm.{name}", total.type, total, e.b.bitcast(column, type_),
                      e.b.bitcast(bytes_, type_))

    def _add_pairs(self, e: Emitter, tile: Tile, steps: Sequence[Sequence[ir.Value]],
                   factor: Factor) -> Tile:
        """Row by row, so that few products wait in registers to be added up."""
        if self.bits == 8:
            for step, columns in enumerate(steps):
                signed = [e.b.bitcast(column, self._bytes) for column in columns]
                sizes = [e.call(f"llvm.abs.v{4 * self.lanes}i8", self._bytes, column,
                                ir.Constant(I1, 0)) for column in signed]
                for row, totals in enumerate(tile):
                    bytes_ = e.b.bitcast(factor(row, step), self._bytes)
                    tile[row] = self._widened(e, totals, [
                        self._pairs(e, size, self._with_sign(e, bytes_, column))
                        for size, column in zip(sizes, signed, strict=True)])
            return tile
        sums: Tile = [[] for _ in tile]
        for step, columns in enumerate(steps):
            for row, own in enumerate(sums):
                bytes_ = factor(row, step)
                pairs = [self._pairs(e, column, bytes_) for column in columns]
                sums[row] = [e.b.add(a, b) for a, b in zip(own, pairs, strict=True)] \
                    if own else pairs
        return [self._widened(e, *rows) for rows in zip(tile, sums, strict=True)]

    @property
    def _bytes(self) -> ir.Type:
        return vector(I8, 4 * self.lanes)

    def _with_sign(self, e: Emitter, bytes_: ir.Value, column: ir.Value) -> ir.Value:
        """bytes negated where the column is negative; anything where it is 0."""
        if self.lanes == 8:
            return e.call("llvm.x86.avx2.psign.b", bytes_.type, bytes_, column)
        zero = splat_constant(column.type, 0)
        negative = e.b.icmp_signed("<", column, zero)
        return e.b.select(negative, e.b.sub(zero, bytes_), bytes_)

    def _pairs(self, e: Emitter, column: ir.Value, bytes_: ir.Value) -> ir.Value:
        """Sums of two products, unsigned x signed, in 16 bits."""
        type_ = vector(I8, 4 * self.lanes)
        name = "avx2.pmadd.ub.sw" if self.lanes == 8 else "avx512.pmaddubs.w.512"
        return e.call(f"llvm.x86.{name}", vector(I16, 2 * self.lanes), e.b.bitcast(column, type_),
                      e.b.bitcast(bytes_, type_))

    def _widened(self, e: Emitter, totals: Sequence[ir.Value],
                 pairs: Sequence[ir.Value]) -> list[ir.Value]:
        """totals + pairs of 16-bit sums."""
        name = "avx2.pmadd.wd" if self.lanes == 8 else "avx512.pmaddw.d.512"
        ones = splat_constant(vector(I16, 2 * self.lanes), 1)
        return [e.b.add(total, e.call(f"llvm.x86.{name}", total.type, pair, ones))
                for total, pair in zip(totals, pairs, strict=True)]
