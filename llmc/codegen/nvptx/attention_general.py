"""Attention for every form, type, mask and head size on a GPU, in f32 on the plain cores.

A block of 128 threads takes 32 rows and 32 keys at a time. A thread holds 2 rows x 4 keys of the
scores, and of the result the same 2 rows x every 8th component; the 8 threads of the same rows are
neighbours in a warp, so that maxima and sums need no shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen import math as codegen_math
from llmc.codegen.host.attention_blocks import add, load_float, multiply, store_float
from llmc.codegen.host.attention_queries import Operand
from llmc.codegen.llvm import F32, I1, I32, I64, Emitter, f32, i64
from llmc.codegen.nvptx.attention_instructions import (
    WARP,
    add_floats,
    barrier,
    exp2,
    global_memory,
    maximum,
    over_lanes,
    shared_memory,
    thread_index,
)
from llmc.codegen.nvptx.attention_places import Geometry, Source, Tile
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType, bool_

ROWS, KEYS, THREADS = 32, 32, 128
_ROWS_EACH, _LANES = 2, 8  # rows of a thread; threads of the same rows
_KEYS_EACH = KEYS // _LANES
_LOWEST = -3.4028234663852886e38
_LOG2_E = math.log2(math.e)
_UNROLL = 4
_MANY_COLUMNS = 16  # of a thread: from here on registers are short


@dataclass(frozen=True)
class Scoring:
    """What becomes of a product of query and key: scaled, capped; unit: 1 for natural units (an
    additive mask of -FLT_MAX would overflow in others), log2(e) for powers of 2."""

    scale: float
    softcap: float
    natural: bool

    @property
    def unit(self) -> float:
        return 1.0 if self.natural else _LOG2_E

    def score(self, e: Emitter, product: ir.Value) -> ir.Value:
        if not self.softcap:
            return e.b.fmul(product, f32(self.scale * self.unit))
        inner = e.b.fmul(product, f32(self.scale / self.softcap))
        return e.b.fmul(codegen_math.tanh(e, inner), f32(self.softcap * self.unit))

    def weight(self, e: Emitter, difference: ir.Value) -> ir.Value:
        """The weight of a score that is this much above the maximum."""
        if self.natural:
            difference = e.b.fmul(difference, f32(_LOG2_E))
        return exp2(e, difference)


class GeneralKernel:
    """One launch: all tiles of all kv heads. mask: an operand over [b, h, s, t], or None."""

    threads = THREADS

    def __init__(self, source: Source, geometry: Geometry, scoring: Scoring, key_dtype: DType,
                 result: Operand, mask: Operand | None):
        self.source, self.geometry, self.scoring = source, geometry, scoring
        self.key_dtype, self.result, self.mask = key_dtype, result, mask
        self.columns = -(-geometry.value_size // _LANES)
        # Odd, so that the same component of neighbouring keys lies in different banks.
        self.stride = max(geometry.size, self.columns * _LANES) | 1
        self.keys_at = ROWS * geometry.size
        self.weights_at = self.keys_at + KEYS * self.stride
        self.shared_bytes = 4 * (self.weights_at + ROWS * (KEYS + 1))

    def blocks(self) -> Dim:
        return self.source.tile_bound(ROWS) * self.geometry.kv_heads

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        tiles, heads = frame.dim(self.source.tile_bound(ROWS)), i64(self.geometry.kv_heads)
        # Late tiles see the most keys where attention is causal: they go first.
        number = e.b.sub(e.b.sub(tiles, i64(1)), e.b.udiv(e.block, heads))
        tile = self.source.tile(e, frame, number, e.b.urem(e.block, heads), ROWS)
        with e.b.if_then(tile.exists):
            _Block(self, e, frame, tile).emit()


class _Block:
    """Emits the work of one block."""

    def __init__(self, kernel: GeneralKernel, e: DeviceEmitter, frame: DeviceFrame, tile: Tile):
        self.kernel, self.e, self.frame, self.tile = kernel, e, frame, tile
        self.geometry, self.source = kernel.geometry, kernel.source
        shared = shared_memory(e)
        self.queries = shared
        self.keys = e.offset(shared, kernel.keys_at, F32)
        self.weights = e.offset(shared, kernel.weights_at, F32)
        thread = e.b.zext(thread_index(e), I64)
        self.lane = e.b.and_(thread, i64(WARP - 1))
        self.warp = e.b.lshr(thread, i64(5))
        self.neighbour = e.b.and_(thread, i64(_LANES - 1))
        first = e.b.mul(e.b.udiv(thread, i64(_LANES)), i64(_ROWS_EACH))
        self.rows = [e.b.add(first, i64(i)) for i in range(_ROWS_EACH)]

    def emit(self) -> None:
        e = self.e
        self._load_queries()
        bounds = [self.source.visible(e, self.frame, self.tile, self.tile.row(e, row))
                  for row in self.rows]
        low, high = self._range()
        barrier(e)
        start = e.b.sub(low, e.b.urem(low, i64(KEYS)))
        state = [f32(_LOWEST), f32(0.0)] * _ROWS_EACH
        sums = [f32(0.0)] * (_ROWS_EACH * self.kernel.columns)
        with e.fold(start, high, [*state, *sums], KEYS, "keys") as (key, carried, finish):
            self._load_rows(key, low, high, of_values=False)
            barrier(e)
            scores = self._scores(key, bounds)
            state, factors = self._weigh(scores, carried[:2 * _ROWS_EACH])
            barrier(e)
            self._load_rows(key, low, high, of_values=True)
            barrier(e)
            sums = [e.b.fmul(value, factors[index // self.kernel.columns])
                    for index, value in enumerate(carried[2 * _ROWS_EACH:])]
            sums = self._add_values(sums)
            barrier(e)
            finish([*state, *sums])
        self._store(finish.results)

    # ---- rows in -----------------------------------------------------------------------------

    def _range(self) -> tuple:
        """(first, last + 1) of the keys that any row of the tile sees; each lane looks at one."""
        e = self.e
        row = self.tile.row(e, self.lane)
        low, high = (e.b.trunc(bound, I32)
                     for bound in self.source.visible(e, self.frame, self.tile, row))
        low = e.across_warp(low, lambda a, b: e.b.select(e.b.icmp_signed("<", a, b), a, b))
        high = e.across_warp(high, lambda a, b: e.b.select(e.b.icmp_signed(">", a, b), a, b))
        return e.b.sext(low, I64), e.b.sext(high, I64)

    def _each_row(self, emit) -> None:
        """emit(row) for the 8 rows that each warp copies."""
        e = self.e
        with e.loop(self.warp, ROWS, THREADS // WARP, "row") as row:
            emit(row)

    def _copy_row(self, source: ir.Value, stride, dtype: DType, target: ir.Value, size: int,
                  wanted: ir.Value | None = None) -> None:
        """A row of `size` elements widened into shared memory by a warp; zeros if not wanted."""
        e = self.e
        source = global_memory(e, source)
        loaded = []
        for start in range(0, size, WARP):
            column = e.b.add(self.lane, i64(start))
            within = column if start + WARP <= size else e.minimum(column, i64(size - 1))
            value = load_float(e, source, multiply(e, within, stride), dtype)
            if wanted is not None:
                value = e.b.select(wanted, value, f32(0.0))
            loaded.append((start, column, value))
        for start, column, value in loaded:
            place = e.offset(target, column, F32)
            if start + WARP <= size:
                e.store(value, place)
                continue
            with e.b.if_then(e.b.icmp_signed("<", column, i64(size))):
                e.store(value, place)

    def _load_queries(self) -> None:
        e, operand, size = self.e, self.source.query, self.geometry.size

        def one(row) -> None:
            place = self.source.place(e, self.tile, self.tile.row(e, row))
            offset = multiply(e, operand.offset(e, self.frame, *place), operand.dtype.bits // 8)
            source = e.offset(self.frame.pointer(operand.buffer), offset)
            target = e.offset(self.queries, e.b.mul(row, i64(size)), F32)
            self._copy_row(source, operand.stride(self.frame, -1), operand.dtype, target, size)

        self._each_row(one)

    def _load_rows(self, key: ir.Value, low: ir.Value, high: ir.Value, of_values: bool) -> None:
        """32 keys or values; those that no row sees become zeros, whatever lies there."""
        e = self.e
        size = self.geometry.value_size if of_values else self.geometry.size
        stride = self.source.component_stride(self.frame, of_values)

        def one(row) -> None:
            number = e.b.add(key, row)
            wanted = e.b.and_(e.b.icmp_signed(">=", number, low),
                              e.b.icmp_signed("<", number, high))
            within = e.minimum(e.maximum(number, low), e.b.sub(high, i64(1)))
            source = self.source.key_row(e, self.frame, self.tile, of_values, within)
            target = e.offset(self.keys, e.b.mul(row, i64(self.kernel.stride)), F32)
            self._copy_row(source, stride, self.kernel.key_dtype, target, size, wanted)

        self._each_row(one)

    # ---- scores ------------------------------------------------------------------------------

    def _products(self) -> list[list[ir.Value]]:
        """Products of the thread's rows and keys (neighbour, neighbour + 8, ...)."""
        e, size = self.e, self.geometry.size
        query_rows = [e.offset(self.queries, e.b.mul(row, i64(size)), F32) for row in self.rows]
        key_rows = [e.offset(self.keys, e.b.mul(e.b.add(self.neighbour, i64(_LANES * i)),
                                                i64(self.kernel.stride)), F32)
                    for i in range(_KEYS_EACH)]

        def step(component, sums: list[ir.Value]) -> list[ir.Value]:
            queries = [e.load(e.offset(row, component, F32), F32) for row in query_rows]
            keys = [e.load(e.offset(row, component, F32), F32) for row in key_rows]
            pairs = [(query, key) for query in queries for key in keys]
            return [e.fma(query, key, total)
                    for (query, key), total in zip(pairs, sums, strict=True)]

        unroll = _UNROLL if self.kernel.columns <= _MANY_COLUMNS else 1
        whole = size // unroll * unroll
        zeros = [f32(0.0)] * (_ROWS_EACH * _KEYS_EACH)
        with e.fold(0, whole, zeros, unroll, "component") as (component, sums, finish):
            for i in range(unroll):
                sums = step(e.b.add(component, i64(i)), sums)
            finish(sums)
        results = finish.results
        for component in range(whole, size):
            results = step(i64(component), results)
        return [results[i * _KEYS_EACH:(i + 1) * _KEYS_EACH] for i in range(_ROWS_EACH)]

    def _scores(self, key: ir.Value, bounds: list) -> list[list[ir.Value]]:
        e, kernel = self.e, self.kernel
        result = []
        for row, products, (low, high) in zip(self.rows, self._products(), bounds, strict=True):
            scores = []
            for i, product in enumerate(products):
                number = e.b.add(e.b.add(key, self.neighbour), i64(_LANES * i))
                score = kernel.scoring.score(e, product)
                seen = e.b.icmp_signed("<", number, high)
                if self.geometry.window:
                    seen = e.b.and_(seen, e.b.icmp_signed(">=", number, low))
                if kernel.mask is not None:
                    score, seen = self._masked(score, seen, row, e.minimum(
                        number, e.b.sub(high, i64(1))))
                scores.append(e.b.select(seen, score, f32(-math.inf)))
            result.append(scores)
        return result

    def _masked(self, score: ir.Value, seen: ir.Value, row: ir.Value, key: ir.Value) -> tuple:
        e, mask = self.e, self.kernel.mask
        assert mask is not None
        place = self.source.place(e, self.tile, self.tile.row(e, row))
        offset = mask.offset(e, self.frame, *place, e.maximum(key, i64(0)))
        pointer = global_memory(e, self.frame.pointer(mask.buffer))
        value = load_float(e, pointer, add(e, i64(0), offset), mask.dtype)
        if mask.dtype is bool_:
            return score, e.b.and_(seen, e.b.fcmp_unordered("!=", value, f32(0.0)))
        return e.b.fadd(score, value), seen

    def _weigh(self, scores: list[list[ir.Value]], state: list[ir.Value]) -> tuple:
        """Weights into shared memory; ((maximum, sum) of each row, what rescales its sums)."""
        e, scoring = self.e, self.kernel.scoring
        new_state, factors = [], []
        for i, row in enumerate(self.rows):
            old, total = state[2 * i], state[2 * i + 1]
            high = old
            for score in scores[i]:
                high = maximum(e, high, score)
            high = over_lanes(e, high, maximum, _LANES)
            factor = scoring.weight(e, e.b.fsub(old, high))
            weights = [scoring.weight(e, e.b.fsub(score, high)) for score in scores[i]]
            part = weights[0]
            for weight in weights[1:]:
                part = e.b.fadd(part, weight)
            total = e.fma(total, factor, over_lanes(e, part, add_floats, _LANES))
            base = e.offset(self.weights, e.b.mul(row, i64(KEYS + 1)), F32)
            for index, weight in enumerate(weights):
                column = e.b.add(self.neighbour, i64(_LANES * index))
                e.store(weight, e.offset(base, column, F32))
            new_state += [high, total]
            factors.append(factor)
        return new_state, factors

    # ---- values ------------------------------------------------------------------------------

    def _add_values(self, sums: list[ir.Value]) -> list[ir.Value]:
        """sums + weights times values, key by key."""
        e, kernel = self.e, self.kernel
        weight_rows = [e.offset(self.weights, e.b.mul(row, i64(KEYS + 1)), F32)
                       for row in self.rows]
        with e.fold(0, KEYS, sums, name="value") as (key, sums, finish):
            weights = [e.load(e.offset(row, key, F32), F32) for row in weight_rows]
            base = e.offset(self.keys, e.b.add(e.b.mul(key, i64(kernel.stride)), self.neighbour),
                            F32)
            values = [e.load(e.offset(base, _LANES * i, F32), F32) for i in range(kernel.columns)]
            pairs = [(weight, value) for weight in weights for value in values]
            finish([e.fma(weight, value, total)
                    for (weight, value), total in zip(pairs, sums, strict=True)])
        return finish.results

    def _store(self, carried: list[ir.Value]) -> None:
        e, kernel, result = self.e, self.kernel, self.kernel.result
        stride = result.stride(self.frame, -1)
        pointer = global_memory(e, self.frame.pointer(result.buffer))
        for i, row in enumerate(self.rows):
            total = carried[2 * i + 1]
            # A row that sees no key gives zeros.
            inverse = e.b.select(e.b.fcmp_ordered("==", total, f32(0.0)), f32(0.0),
                                 e.b.fdiv(f32(1.0), total))
            exists = e.b.icmp_signed("<", e.b.add(self.tile.first, row), self.tile.rows)
            with e.b.if_then(exists):
                place = self.source.place(e, self.tile, self.tile.row(e, row))
                base = result.offset(e, self.frame, *place)
                for column in range(kernel.columns):
                    index = 2 * _ROWS_EACH + i * kernel.columns + column
                    component = e.b.add(self.neighbour, i64(_LANES * column))
                    within = (e.b.icmp_signed("<", component, i64(self.geometry.value_size))
                              if (column + 1) * _LANES > self.geometry.value_size
                              else ir.Constant(I1, 1))
                    with e.b.if_then(within):
                        store_float(e, e.b.fmul(carried[index], inverse), pointer,
                                    add(e, base, multiply(e, component, stride)), result.dtype)


