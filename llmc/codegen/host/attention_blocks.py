"""Building blocks of host attention: rows in and out of f32, transposes, small matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import llvmlite.ir as ir

from llmc.codegen.elements import convert, load, store
from llmc.codegen.host.microkernel import dot_product
from llmc.codegen.llvm import (
    BF16,
    F32,
    I32,
    VOID,
    Emitter,
    f32,
    i32,
    i64,
    like,
    splat_constant,
    vector,
)
from llmc.ir.dtypes import DType
from llmc.ir.dtypes import f32 as single
from llmc.ir.dtypes import i64 as long

CACHE_LINE = 64
UNIT = 32  # columns that a number of columns found at run time is a multiple of
WIDEST = 64  # columns of a block, at most

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
class Pairs:
    """Rows of `stride` words from a pointer, each a pair of bf16 that one instruction multiplies
    and adds: of a left operand two neighbours in a row, of a right one two in a column."""

    pointer: ir.Value
    stride: int

    def load(self, e: Emitter, row, column, lanes: int = 1) -> ir.Value:
        return e.load(self._at(e, row, column), vector(I32, lanes))

    def store(self, e: Emitter, value, row, column) -> None:
        e.store(value, self._at(e, row, column))

    def prefetch(self, e: Emitter, row, column, count: int) -> None:
        """Nothing: pairs lie in a worker's scratch."""

    def _at(self, e: Emitter, row, column) -> ir.Value:
        return e.offset(self.pointer, add(e, multiply(e, row, self.stride), column), I32)


def pairs_of(e: Emitter, first: ir.Value, second: ir.Value) -> ir.Value:
    """Words that hold two values each; both are f32 that bf16 holds exactly."""
    low, high = (e.b.bitcast(value, like(value, I32)) for value in (first, second))
    return e.b.or_(e.b.lshr(low, splat_constant(low.type, 16)),
                   e.b.and_(high, splat_constant(low.type, 0xFFFF0000)))


def rounded_to_bf16(e: Emitter, value: ir.Value) -> ir.Value:
    """The nearest bf16, by the instruction of CPUs that multiply pairs."""
    return e.b.fptrunc(value, vector(BF16, value.type.count))


@dataclass(frozen=True)
class Multiplier:
    """C = A B for few rows, with accumulators in registers; lanes columns fill a register. A and B
    are matrices of f32, or of pairs.

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
        if isinstance(rows, int) and rows % 6:
            return (4, 3, 2, 1) if rows % 4 in (0, 3) else (3, 2, 1)
        if isinstance(rows, int) or self.registers == 16:
            return (6, 3, 2, 1)
        return (12, 4, 2, 1)

    def vectors(self, height: int, available: int) -> int:
        """Width of a block of that height, in vectors."""
        fit = (self.registers - 2) // (height + 1)
        return min(1 << (fit.bit_length() - 1), available)

    def run(self, e: Emitter, c: Matrix, a: Matrix | Pairs, b: Matrix | Pairs, rows: Rows,
            columns: Rows, depth: tuple, factors: ir.Value | None = None,
            scale: float = 1.0) -> None:
        """C[rows, columns] = A[:, depth] B[depth, :] scale, plus factors[row] * C where given.

        columns is a multiple of lanes, or of UNIT where it is known at run time only; depth =
        (first, last + 1), in words of pairs; factors points to one f32 a row.
        """
        product = _Product(self, c, a, b, columns, depth, factors, scale)
        start: Rows = 0
        for height in self.heights(rows):
            if isinstance(rows, int):
                assert isinstance(start, int)
                stop = start + (rows - start) // height * height
                for row in range(start, stop, height):
                    product.emit(e, row, height)
                start = stop
                continue
            left = e.b.sub(rows, i64(start) if isinstance(start, int) else start)
            end = e.b.sub(rows, e.b.urem(left, i64(height)))
            with e.loop(start, end, height, "row") as row:
                product.emit(e, row, height)
            start = end


@dataclass(frozen=True)
class _Product:
    """What `Multiplier.run` takes; emits it for `height` rows at a time."""

    multiplier: Multiplier
    c: Matrix
    a: Matrix | Pairs
    b: Matrix | Pairs
    columns: Rows
    depth: tuple
    factors: ir.Value | None
    scale: float

    def emit(self, e: Emitter, row, height: int) -> None:
        """All columns of the rows: wide blocks, then what is left."""
        lanes = self.multiplier.lanes
        if isinstance(self.columns, int):
            available = self.columns // lanes
            vectors = self.multiplier.vectors(height, available)
            whole = available // vectors * vectors
            with e.loop(0, whole * lanes, vectors * lanes, "column") as column:
                self._block(e, row, height, column, vectors)
            if whole < available:
                self._block(e, row, height, whole * lanes, available - whole)
            return
        vectors = self.multiplier.vectors(height, WIDEST // lanes)
        wide = e.b.sub(self.columns, e.b.urem(self.columns, i64(vectors * lanes)))
        with e.loop(0, wide, vectors * lanes, "column") as column:
            self._block(e, row, height, column, vectors)
        if vectors * lanes > UNIT:
            with e.loop(wide, self.columns, UNIT, "column") as column:
                self._block(e, row, height, column, UNIT // lanes)

    def _block(self, e: Emitter, row, height: int, column, vectors: int) -> None:
        lanes = self.multiplier.lanes
        places = [(add(e, row, i), add(e, column, j * lanes))
                  for i in range(height) for j in range(vectors)]
        initial = self._initial(e, row, height, places)

        def turn(k, sums) -> list[ir.Value]:
            if row == 0:  # known rows only: the first block fetches for all
                self.b.prefetch(e, k, column, vectors * lanes)
            right = [self.b.load(e, k, add(e, column, j * lanes), lanes) for j in range(vectors)]
            left = [e.splat(self.a.load(e, add(e, row, i), k), lanes) for i in range(height)]
            return [self._multiply_add(e, left[index // vectors], right[index % vectors], total)
                    for index, total in enumerate(sums)]

        results = _fold_unrolled(e, self.depth, initial, turn)
        for place, total in zip(places, results, strict=True):
            if self.scale != 1.0:
                total = e.b.fmul(total, splat_constant(total.type, self.scale))
            self.c.store(e, total, *place)

    def _multiply_add(self, e: Emitter, left, right, total) -> ir.Value:
        if isinstance(self.b, Pairs):
            return dot_product(e, total, left, right)
        return e.fma(left, right, total)

    def _initial(self, e: Emitter, row, height: int, places: Sequence[tuple]) -> list[ir.Value]:
        lanes = self.multiplier.lanes
        if self.factors is None:
            return [splat_constant(vector(F32, lanes), 0.0)] * len(places)
        scales = [e.splat(e.load(e.offset(self.factors, add(e, row, i), F32), F32), lanes)
                  for i in range(height)]
        per_row = len(places) // height
        return [e.b.fmul(self.c.load(e, line, column, lanes), scales[index // per_row])
                for index, (line, column) in enumerate(places)]


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
        values = [larger(e, values[i], values[i + 1]) if i + 1 < len(values) else values[i]
                  for i in range(0, len(values), 2)]
    value = values[0]
    while isinstance(value.type, ir.VectorType) and value.type.count > 2:
        value = larger(e, *e.halves(value))
    return larger(e, e.b.extract_element(value, i32(0)), e.b.extract_element(value, i32(1)))


def larger(e: Emitter, a, b) -> ir.Value:
    """The larger of two, lane by lane; b where a is NaN."""
    return e.b.select(e.b.fcmp_ordered(">", a, b), a, b)


LOWEST = f32(-3.4028234663852886e38)
