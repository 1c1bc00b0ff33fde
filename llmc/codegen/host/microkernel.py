"""The matmul's inner loop on CPUs: a tile of accumulators in registers, streamed over k.

A tile is `rows` x `vectors` accumulators of f32 lanes. Per k it loads the panel's vectors once and
one element per row, broadcast; per element and vector one fused multiply-add (or, on bf16 dot
hardware, one dot product of pairs). Floors: 2 FMA per cycle; 6 x 2 vectors of 8 lanes hide the
FMA's latency of 4 cycles, take 12 of the 16 registers of AVX2 and 7 loads per 6 cycles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import llvmlite.ir as ir

from llmc.codegen.llvm import (
    BF16,
    F16,
    F32,
    F64,
    I16,
    I32,
    POINTER,
    VOID,
    Emitter,
    i32,
    i64,
    splat_constant,
    vector,
)
from llmc.ir.dtypes import DType
from llmc.ir.layouts import Panels

# Ahead of the panel's reads; best of 0 to 8192 on Zen 3: few rows stream 1.2 x as fast as without.
PREFETCH_BYTES = 2560
CACHE_LINE = 64
PAGE_BYTES, SKEW = 4096, 1024

NEAR, FAR = 3, 2  # hints of prefetches: into L1, into L2

Tile = list[list[ir.Value]]  # [row][vector] -> <lanes x f32> (f64 for f64)


@dataclass(frozen=True)
class Later:
    """What will be read behind a panel: asked for into L2 while it is read, `stride` bytes, at most
    half a group, for each of its groups. Both are known at run time only; stride 0: nothing."""

    start: ir.Value
    stride: ir.Value

    def prefetch(self, e: Emitter, group: ir.Value, count: int) -> None:
        """Ask for what goes with the `count` bytes of groups from number `group` on."""
        prefetch(e, e.offset(self.start, e.b.mul(group, self.stride)), -(-count // 2), FAR)


@dataclass(frozen=True)
class Reading:
    """How a panel is read. places: at once, in equal pieces of k; near, far: bytes ahead of each
    place at which lines are asked for, into L1 and into L2 (0: not); later: asked for besides."""

    places: int
    near: int
    far: int = 0
    later: Later | None = None

    def prefetch(self, e: Emitter, pointer: ir.Value, offset: int, count: int) -> None:
        """Ask for what is read behind `count` bytes at pointer + offset."""
        for distance, hint in ((self.near, NEAR), (self.far, FAR)):
            if distance:
                prefetch(e, e.offset(pointer, offset + distance), count, hint)


FROM_CACHE = Reading(1, PREFETCH_BYTES)
# Codes from memory, where `Target.far_memory`: on Emerald Rapids they get 0.95 of the bandwidth of
# plain reads with one thread instead of 0.88.
ASKED_TWICE = Reading(1, 1536, 8192)


@dataclass(frozen=True)
class PanelReader:
    """Reads a packed weight's panels. A group is `interleave` consecutive k of all columns.

    lanes: of an accumulator. dot: bf16 pairs stay packed for the dot instruction; else every
    element is widened to f32 in registers.
    """

    dtype: DType
    layout: Panels
    lanes: int
    dot: bool = False

    @property
    def vectors(self) -> int:
        return self.layout.columns // self.lanes

    @property
    def element(self) -> ir.Type:
        """Type of accumulators and of the left operand."""
        return F64 if self.dtype.name == "f64" else F32

    @property
    def group_bytes(self) -> int:
        return self.layout.columns * self.layout.interleave * self.dtype.bits // 8

    @property
    def steps(self) -> int:
        """Multiply-adds per group and accumulator."""
        return 1 if self.dot else self.layout.interleave

    def group(self, e: Emitter, pointer: ir.Value, offset: int) -> Tile:
        """The vectors [step][vector] of the group at pointer + offset bytes."""
        if self.dtype.name in ("f32", "f64"):
            return [self._load(e, pointer, offset, self.element)]
        if self.dtype.name == "f16":
            return [self._halves(e, pointer, offset)]
        even = self._load(e, pointer, offset, I32)
        if self.dot:
            return [even]
        # Loading the odd elements anew (the no-op asm keeps LLVM from merging the loads) frees
        # the registers that would hold the pairs meanwhile: 6 x 2 tiles of AVX2 would spill.
        hidden = e.b.asm(ir.FunctionType(POINTER, [POINTER]), "", "=r,0", [pointer], False)
        odd = self._load(e, hidden, offset, I32)
        wide = vector(F32, self.lanes)
        sixteen = splat_constant(even[0].type, 16)
        high_half = splat_constant(even[0].type, 0xFFFF0000)
        return [[e.b.bitcast(e.b.shl(bits, sixteen), wide) for bits in even],
                [e.b.bitcast(e.b.and_(bits, high_half), wide) for bits in odd]]

    def multiply_add(self, e: Emitter, accumulator: ir.Value, factor: ir.Value,
                     column: ir.Value) -> ir.Value:
        """accumulator + factor * column, lane by lane; of pairs, their dot products."""
        if self.dot:
            return dot_product(e, accumulator, factor, column)
        return e.multiply_add(factor, column, accumulator)

    def add(self, e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        """The sum of two accumulators."""
        return e.b.fadd(a, b)

    def _load(self, e: Emitter, pointer, offset: int, element: ir.Type) -> list[ir.Value]:
        size = self.lanes * (8 if element is F64 else 4)
        return [e.load(e.offset(pointer, offset + v * size), vector(element, self.lanes))
                for v in range(self.vectors)]

    def _halves(self, e: Emitter, pointer, offset: int) -> list[ir.Value]:
        """Vectors of f16, widened."""
        loaded = [e.load(e.offset(pointer, offset + v * self.lanes * 2),
                         vector(F16, self.lanes)) for v in range(self.vectors)]
        return [e.b.fpext(value, vector(F32, self.lanes)) for value in loaded]


@dataclass(frozen=True)
class IntegerReader(PanelReader):
    """Reads panels of integers, `interleave` = 2: pairs of i16, whose dot products add up in i32.

    Floor on AVX2: a widening load, and per row one vpmaddwd and one addition for two k; what FMAs
    on f32 take, at a quarter of the bytes. x86: whether the instruction is there.
    """

    x86: bool = True

    @property
    def element(self) -> ir.Type:
        return I32

    def group(self, e: Emitter, pointer: ir.Value, offset: int) -> Tile:
        """One step: vectors of pairs of i16."""
        pairs, own = 2 * self.lanes, ir.IntType(self.dtype.bits)
        size = pairs * self.dtype.bits // 8
        loaded = [e.load(e.offset(pointer, offset + v * size), vector(own, pairs))
                  for v in range(self.vectors)]
        if self.dtype.bits == 16:
            return [loaded]
        widen = e.b.sext if self.dtype.kind == "int" else e.b.zext
        return [[widen(value, vector(I16, pairs)) for value in loaded]]

    def multiply_add(self, e: Emitter, accumulator: ir.Value, factor: ir.Value,
                     column: ir.Value) -> ir.Value:
        pairs = e.b.bitcast(factor, column.type)
        if self.x86:
            name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[self.lanes]
            return e.b.add(accumulator, e.call(f"llvm.x86.{name}", accumulator.type, pairs, column))
        for part in (_low_half, _high_half):
            product = e.b.mul(part(e, factor), part(e, e.b.bitcast(column, factor.type)))
            accumulator = e.b.add(accumulator, product)
        return accumulator

    def add(self, e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        return e.b.add(a, b)


def _low_half(e: Emitter, pair: ir.Value) -> ir.Value:
    sixteen = splat_constant(pair.type, 16)
    return e.b.ashr(e.b.shl(pair, sixteen), sixteen)


def _high_half(e: Emitter, pair: ir.Value) -> ir.Value:
    return e.b.ashr(pair, splat_constant(pair.type, 16))


@dataclass(frozen=True)
class LeftRows:
    """The left operand of a tile: element (row, k) as f32, or the pair at k as 32 bits for dot.

    pointers: one per row, at the first k. Per group of k they advance by group_bytes; step s of
    the group lies s * step_bytes further. reading: how the panel is read beside them.
    """

    pointers: tuple[ir.Value, ...]
    group_bytes: int
    step_bytes: int
    reading: Reading = FROM_CACHE

    def advanced(self, e: Emitter, index: ir.Value, groups: int) -> LeftRows:
        """The same rows from the k of group index * groups on."""
        distance = e.b.mul(index, i64(groups * self.group_bytes))
        return replace(self, pointers=tuple(e.offset(each, distance) for each in self.pointers))

    def broadcast(self, e: Emitter, row: int, base: ir.Value, offset: int, step: int,
                  reader: PanelReader, last_of_pair: bool = False) -> ir.Value:
        """last_of_pair: k ends inside this pair; what follows it in memory is not to be read."""
        address = e.offset(e.offset(self.pointers[row], base), offset + step * self.step_bytes)
        if not reader.dot:
            return e.splat(e.load(address, reader.element), reader.lanes)
        if last_of_pair:
            return e.splat(e.b.zext(e.load(address, I16), I32), reader.lanes)
        return e.splat(e.load(address, I32), reader.lanes)


def tile_product(e: Emitter, reader: PanelReader, left: LeftRows, panel: ir.Value,
                 k: int) -> Tile:
    """left @ panel over all k, accumulated in registers in a fixed order.

    A k that is no multiple of the unrolled
    groups ends in straight code, which reads the left operand up to k only: what lies behind it may
    be anything.
    """
    rows, interleave = len(left.pointers), reader.layout.interleave
    unroll = max(_unroll(reader, rows), left.reading.places)
    whole = k // interleave // unroll * unroll
    tile = zeros_of(reader, rows)
    if whole:
        tile = _stream(e, reader, left, panel, whole, unroll)
    for group in range(whole, -(-k // interleave)):
        steps = reader.group(e, panel, group * reader.group_bytes)
        for step, columns in enumerate(steps[:k - group * interleave]):
            half = reader.dot and k - group * interleave == 1
            factors = [left.broadcast(e, row, i64(0), group * left.group_bytes, step, reader, half)
                       for row in range(rows)]
            _accumulate(e, reader, tile, factors, columns)
    return tile


def _unroll(reader: PanelReader, rows: int) -> int:
    """Groups per turn of the loop: some 48 multiply-adds hide its overhead; 8 k at most."""
    wanted = 48 // (rows * reader.vectors * reader.steps)
    largest = max(1, 8 // reader.layout.interleave)
    return 1 << max(0, min(wanted, largest).bit_length() - 1)


def several_places(reader: PanelReader, rows: int) -> Reading:
    """How few rows read a panel that is in no cache.

    The CPU's own prefetchers begin anew at every page, and follow some places while others wait:
    Zen 3 gets 1.01 of the bandwidth of plain reads instead of 0.92. The left operand is read at as
    many places, row by row: with 16 registers more than 8 addresses cost more than they gain.
    """
    addresses = 32 // reader.steps if reader.lanes == 16 else 8
    places = 1 << max(0, min(4, addresses // (rows * reader.steps)).bit_length() - 1)
    return Reading(places, 1536) if places > 1 else FROM_CACHE


def many_places(rows: int) -> Reading:
    """How few rows read a panel where `Target.far_memory`.

    On Emerald Rapids one thread so gets 1.03 to 1.22 of the speed of one place asked for twice,
    4 threads 1.02 to 1.15, 8 rows by 4 places 1.10 to 1.23. 16 places are no faster, and nothing
    asked for ahead is slower.
    """
    return Reading(8 if rows <= 4 else 4, 1536)


def _stream(e: Emitter, reader: PanelReader, left: LeftRows, panel: ir.Value, groups: int,
            unroll: int) -> Tile:
    """The loops over k. Tiles of few accumulators get several chains per accumulator, so that 8
    additions are in flight; the chains are added up in the end."""
    size = len(left.pointers) * reader.vectors
    chains = max(1, min(unroll * reader.steps, 8 // size))
    piece = _piece(reader, left.reading.places, groups, unroll)
    end = piece * left.reading.places
    sums = flatten(zeros_of(reader, len(left.pointers) * chains))
    sums = _stream_pieces(e, reader, left, panel, (0, piece, unroll), sums)
    if end < groups:
        alone = replace(left, reading=FROM_CACHE)
        sums = _stream_pieces(e, reader, alone, panel, (end, groups - end, unroll), sums)
    total = sums[:size]
    for c in range(1, chains):
        chain = sums[c * size:(c + 1) * size]
        total = [reader.add(e, a, b) for a, b in zip(total, chain, strict=True)]
    return unflatten(total, reader.vectors)


def _piece(reader: PanelReader, places: int, groups: int, unroll: int) -> int:
    """Groups of each of the equal pieces that are read side by side. Places whole pages apart would
    meet in the same sets of the L1 cache: such pieces are shortened, and the rest is read alone."""
    piece = groups // places
    short = max(unroll, SKEW // reader.group_bytes)
    whole_pages = piece * reader.group_bytes % PAGE_BYTES == 0
    return piece - short if places > 1 and whole_pages and piece > 8 * short else piece


def _stream_pieces(e: Emitter, reader: PanelReader, left: LeftRows, panel: ir.Value,
                   span: tuple[int, int, int], sums: list[ir.Value]) -> list[ir.Value]:
    """sums + the products of some pieces side by side. span: the first group, the groups of a
    piece, and those of a turn of the loop, over all pieces."""
    (start, piece, unroll), places = span, left.reading.places
    rows, vectors = len(left.pointers), reader.vectors
    each = unroll // places
    turn = [start + place * piece + number for number in range(each) for place in range(places)]
    with e.fold(0, piece, sums, each, "k") as (group, flat, finish):
        tiles = [unflatten(flat[first:first + rows * vectors], vectors)
                 for first in range(0, len(flat), rows * vectors)]
        columns_at = e.offset(panel, e.b.mul(group, i64(reader.group_bytes)))
        base = e.b.mul(group, i64(left.group_bytes))
        for first in turn[:places]:
            left.reading.prefetch(e, columns_at, first * reader.group_bytes,
                                  each * reader.group_bytes)
        if left.reading.later is not None:
            left.reading.later.prefetch(e, group, unroll * reader.group_bytes)
        for number, u in enumerate(turn):
            for step, columns in enumerate(reader.group(e, columns_at, u * reader.group_bytes)):
                tile = tiles[(number * reader.steps + step) % len(tiles)]
                for row in range(rows):
                    factor = left.broadcast(e, row, base, u * left.group_bytes, step, reader)
                    _accumulate(e, reader, tile[row:row + 1], [factor], columns)
        finish([value for tile in tiles for value in flatten(tile)])
    return finish.results


def _accumulate(e: Emitter, reader: PanelReader, tile: Tile, factors: Sequence[ir.Value],
                columns: Sequence[ir.Value]) -> None:
    """tile[row][vector] += factors[row] * columns[vector], in place."""
    for accumulators, factor in zip(tile, factors, strict=True):
        for v, column in enumerate(columns):
            accumulators[v] = reader.multiply_add(e, accumulators[v], factor, column)


def dot_product(e: Emitter, accumulator: ir.Value, pairs: ir.Value,
                column: ir.Value) -> ir.Value:
    """accumulator + the dot products of bf16 pairs, lane by lane (32-bit lanes of two bf16)."""
    type_ = vector(BF16, 2 * accumulator.type.count)
    bits = 32 * accumulator.type.count
    return e.call(f"llvm.x86.avx512bf16.dpbf16ps.{bits}", accumulator.type, accumulator,
                  e.b.bitcast(pairs, type_), e.b.bitcast(column, type_))


def prefetch(e: Emitter, pointer: ir.Value, count: int, hint: int = NEAR) -> None:
    """Ask for `count` bytes from an address on, which may be none of ours."""
    for line in range(0, count, CACHE_LINE):
        e.call("llvm.prefetch.p0", VOID, e.offset(pointer, line), i32(0), i32(hint), i32(1))


def store_tile(e: Emitter, reader: PanelReader, sums: ir.Value, tile: Tile) -> None:
    """Store accumulators as rows of a tile in memory."""
    for value, place in zip(flatten(tile), tile_places(e, reader, sums, len(tile)), strict=True):
        e.store(value, place)


def tile_places(e: Emitter, reader: PanelReader, sums: ir.Value, rows: int) -> list[ir.Value]:
    """Where the vectors of a tile of sums lie, row by row."""
    return [e.offset(sums, number * reader.lanes, reader.element)
            for number in range(rows * reader.vectors)]


def zeros_of(reader: PanelReader, rows: int) -> Tile:
    """A tile of zeros."""
    zero = splat_constant(vector(reader.element, reader.lanes), 0 if reader.element == I32 else 0.0)
    return [[zero] * reader.vectors for _ in range(rows)]


def flatten(tile: Tile) -> list[ir.Value]:
    """The vectors of a tile, row by row."""
    return [value for row in tile for value in row]


def unflatten(values: Sequence[ir.Value], vectors: int) -> Tile:
    """The inverse of flatten."""
    return [list(values[i:i + vectors]) for i in range(0, len(values), vectors)]
