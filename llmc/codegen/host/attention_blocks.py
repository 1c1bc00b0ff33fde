"""Building blocks of host attention: rows in and out of f32, transposes, small matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import llvmlite.ir as ir

from llmc.codegen.elements import convert, load, store
from llmc.codegen.llvm import F32, I32, VOID, Emitter, f32, i32, i64, splat_constant, vector
from llmc.ir.dtypes import DType
from llmc.ir.dtypes import f32 as single
from llmc.ir.dtypes import i64 as long

CACHE_LINE = 64
BLOCK_ROWS = 6  # height of the blocks that matrix products are made of

Rows: TypeAlias = int | ir.Value  # a number of rows, known at compile time or not


def load_float(e: Emitter, pointer, index, dtype: DType, lanes: int = 1) -> ir.Value:
    """`lanes` consecutive elements from pointer + index elements, as f32."""
    return convert(e, load(e, pointer, index, dtype, lanes), dtype, single)


def load_index(e: Emitter, pointer, index, dtype: DType) -> ir.Value:
    """One integer as i64."""
    return convert(e, load(e, pointer, index, dtype), dtype, long)


def store_float(e: Emitter, value, pointer, index, dtype: DType) -> None:
    """Stores f32 values to pointer + index elements, rounded to dtype."""
    store(e, convert(e, value, single, dtype), pointer, index, dtype)


def for_each_chunk(count: int, lanes: int, emit: Callable[[int, int], None]) -> None:
    """emit(start, lanes) for whole vectors of count elements, emit(start, 1) for what is left."""
    whole = count // lanes * lanes
    for start in range(0, whole, lanes):
        emit(start, lanes)
    for start in range(whole, count):
        emit(start, 1)


def add(e: Emitter, a, b):
    """a + b of ints and i64 values, folded where both are ints."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    a, b = (i64(v) if isinstance(v, int) else v for v in (a, b))
    return e.b.add(a, b, flags=["nsw"])


def multiply(e: Emitter, a, b):
    """a * b of ints and i64 values, folded where possible."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if 0 in (a, b) and (isinstance(a, int) or isinstance(b, int)):
        return 0
    a, b = (i64(v) if isinstance(v, int) else v for v in (a, b))
    return e.b.mul(a, b, flags=["nsw"])


def transpose(e: Emitter, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Transposes n vectors of n lanes (n a power of two) by swapping ever larger blocks."""
    n = len(rows)
    rows = list(rows)
    step = 1
    while step < n:
        low = [i if not i & step else n + i - step for i in range(n)]
        high = [i + step if not i & step else n + i for i in range(n)]
        for i in range(n):
            if not i & step:
                first, second = rows[i], rows[i + step]
                rows[i] = _shuffle(e, first, second, low)
                rows[i + step] = _shuffle(e, first, second, high)
        step *= 2
    return rows


def _shuffle(e: Emitter, a, b, lanes: list[int]) -> ir.Value:
    return e.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


@dataclass(frozen=True)
class Matrix:
    """Rows of `stride` elements from a pointer; elements are widened to f32 when loaded.

    ahead: a matrix like this one that will be read next, to be fetched into the cache meanwhile.
    """

    pointer: ir.Value
    dtype: DType
    stride: int | ir.Value
    ahead: ir.Value | None = None

    def load(self, e: Emitter, row, column, lanes: int = 1) -> ir.Value:
        return load_float(e, self.pointer, add(e, multiply(e, row, self.stride), column),
                          self.dtype, lanes)

    def prefetch(self, e: Emitter, row, column, count: int) -> None:
        """Fetches the lines of `count` elements of the matrix ahead."""
        if self.ahead is None:
            return
        size = self.dtype.bits // 8
        place = multiply(e, add(e, multiply(e, row, self.stride), column), size)
        for line in range(0, count * size, CACHE_LINE):
            address = e.offset(self.ahead, add(e, place, line))
            e.call("llvm.prefetch.p0", VOID, address, i32(0), i32(3), i32(1))

    def store(self, e: Emitter, value, row, column) -> None:
        store_float(e, value, self.pointer, add(e, multiply(e, row, self.stride), column),
                    self.dtype)


@dataclass(frozen=True)
class Multiplier:
    """C = A B for few rows, with accumulators in registers; lanes columns fill a register.

    Height and width of a block hide the FMA's latency (8 independent accumulators or more) and
    leave registers for the block's row of B and one broadcast element of A, with one to spare.
    """

    lanes: int

    @property
    def registers(self) -> int:
        """Vector registers: AVX2 has 16; AVX-512 and NEON have 32."""
        return 16 if self.lanes == 8 else 32

    def heights(self, rows: Rows) -> tuple[int, ...]:
        """Block heights to try, largest first; few, known rows get the height that divides best."""
        if isinstance(rows, int) and rows % BLOCK_ROWS:
            return (4, 3, 2, 1) if rows % 4 in (0, 3) else (3, 2, 1)
        return (BLOCK_ROWS, 3, 2, 1)

    def vectors(self, height: int, available: int) -> int:
        """Width of a block of that height, in vectors."""
        fit = (self.registers - 2) // (height + 1)
        return min(1 << (fit.bit_length() - 1), available)

    def run(self, e: Emitter, c: Matrix, a: Matrix, b: Matrix, rows: Rows, columns: int,
            depth: tuple, factors: ir.Value | None = None) -> None:
        """C[rows, columns] = A[:, depth] B[depth, :], plus factors[row] * C where given.

        columns is a multiple of lanes; depth = (first, last + 1); factors points to one f32 a row.
        """
        start: Rows = 0
        for height in self.heights(rows):
            if isinstance(rows, int):
                assert isinstance(start, int)
                stop = start + (rows - start) // height * height
                for row in range(start, stop, height):
                    self._rows(e, c, a, b, row, height, columns, depth, factors)
                start = stop
                continue
            left = e.b.sub(rows, i64(start) if isinstance(start, int) else start)
            end = e.b.sub(rows, e.b.urem(left, i64(height)))
            with e.loop(start, end, height, "row") as row:
                self._rows(e, c, a, b, row, height, columns, depth, factors)
            start = end

    def _rows(self, e, c, a, b, row, height, columns, depth, factors) -> None:
        available = columns // self.lanes
        vectors = self.vectors(height, available)
        whole = available // vectors * vectors
        with e.loop(0, whole * self.lanes, vectors * self.lanes, "column") as column:
            self._block(e, c, a, b, row, height, column, vectors, depth, factors)
        if whole < available:
            self._block(e, c, a, b, row, height, whole * self.lanes, available - whole, depth,
                        factors)

    def _block(self, e, c, a, b, row, height, column, vectors, depth, factors) -> None:
        places = [(add(e, row, i), add(e, column, j * self.lanes))
                  for i in range(height) for j in range(vectors)]
        if factors is None:
            initial = [splat_constant(vector(F32, self.lanes), 0.0)] * len(places)
        else:
            scales = [e.splat(e.load(e.offset(factors, add(e, row, i), F32), F32), self.lanes)
                      for i in range(height)]
            initial = [e.b.fmul(c.load(e, *place, self.lanes), scales[index // vectors])
                       for index, place in enumerate(places)]
        def turn(k, sums) -> list[ir.Value]:
            if row == 0:  # known rows only: the first block fetches for all
                b.prefetch(e, k, column, vectors * self.lanes)
            right = [b.load(e, k, add(e, column, j * self.lanes), self.lanes)
                     for j in range(vectors)]
            left = [e.splat(a.load(e, add(e, row, i), k), self.lanes) for i in range(height)]
            return [e.fma(left[index // vectors], right[index % vectors], total)
                    for index, total in enumerate(sums)]

        results = _fold_unrolled(e, depth, initial, turn)
        for place, total in zip(places, results, strict=True):
            c.store(e, total, *place)


def _fold_unrolled(e: Emitter, depth: tuple, initial: list[ir.Value],
                   turn: Callable[..., list[ir.Value]], unroll: int = 2) -> list[ir.Value]:
    """turn(k, sums) for k in range(*depth), `unroll` of them in each round of the loop."""
    first, last = (i64(v) if isinstance(v, int) else v for v in depth)
    rounds = e.b.udiv(e.b.sub(last, first), i64(unroll))
    whole = e.b.add(first, e.b.mul(rounds, i64(unroll)))
    with e.fold(first, whole, initial, unroll, "depth") as (k, sums, finish):
        for step in range(unroll):
            sums = turn(add(e, k, step), sums)
        finish(sums)
    if isinstance(depth[0], int) and isinstance(depth[1], int) \
            and (depth[1] - depth[0]) % unroll == 0:
        return finish.results
    with e.fold(whole, last, finish.results, 1, "depth.rest") as (k, sums, finish):
        finish(turn(k, sums))
    return finish.results


def copy_row(e: Emitter, source: ir.Value, offset, stride, dtype: DType, target: ir.Value,
             count: int, lanes: int, scale: float = 1.0) -> None:
    """target[0 : count] (f32) = source[offset + i * stride] * scale."""
    def scaled(value: ir.Value) -> ir.Value:
        return value if scale == 1.0 else e.b.fmul(value, splat_constant(value.type, scale))

    if stride == 1:
        for_each_chunk(count, lanes, lambda start, width: e.store(
            scaled(load_float(e, source, add(e, offset, start), dtype, width)),
            e.offset(target, start, F32)))
        return
    with e.loop(0, count) as i:
        value = load_float(e, source, add(e, offset, multiply(e, i, stride)), dtype)
        e.store(scaled(value), e.offset(target, i, F32))


def fill(e: Emitter, target: ir.Value, count: int | ir.Value, value: float, lanes: int) -> None:
    """target[0 : count] = value; count is a multiple of lanes."""
    with e.loop(0, count, lanes) as i:
        e.store(splat_constant(vector(F32, lanes), value), e.offset(target, i, F32))


def lane_numbers(lanes: int, first: int) -> ir.Constant:
    """<first, first + 1, ...> as i32 lanes."""
    return ir.Constant(ir.VectorType(I32, lanes), [first + i for i in range(lanes)])


def reduce_max(e: Emitter, values: Sequence[ir.Value]) -> ir.Value:
    """The largest lane of all vectors (NaN lanes are passed over), as a scalar."""
    values = list(values)
    while len(values) > 1:
        values = [_larger(e, values[i], values[i + 1]) if i + 1 < len(values) else values[i]
                  for i in range(0, len(values), 2)]
    value = values[0]
    while isinstance(value.type, ir.VectorType) and value.type.count > 2:
        value = _larger(e, *e.halves(value))
    return _larger(e, e.b.extract_element(value, i32(0)), e.b.extract_element(value, i32(1)))


def _larger(e: Emitter, a, b) -> ir.Value:
    return e.b.select(e.b.fcmp_ordered(">", a, b), a, b)


LOWEST = f32(-3.4028234663852886e38)
