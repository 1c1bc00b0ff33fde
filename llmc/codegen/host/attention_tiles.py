"""A tile of host attention: a block of queries of one sequence times one kv head.

It takes the keys block by block: scores (a small matrix product), the new maximum and the weights
of each row, and what was summed so far rescaled while the weighted values are added (another small
product). All sums are in f32. Where the CPU multiplies pairs of bf16, bf16 queries and keys are
multiplied as they are, and so are values by weights that are rounded to bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llvmlite.ir as ir

from llmc.codegen import math as codegen_math
from llmc.codegen.host import attention_blocks
from llmc.codegen.host.attention_blocks import (
    LOWEST,
    UNIT,
    Matrix,
    Pairs,
    Rows,
    add,
    copy_row,
    fill,
    for_each_chunk,
    lane_numbers,
    larger,
    load_float,
    multiply,
    reduce_max,
    store_float,
)
from llmc.codegen.host.attention_queries import Block, Operand
from llmc.codegen.host.attention_sources import KEYS, Geometry, KeyBlock, PagedSource
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.llvm import F32, I16, I32, Emitter, i64, splat_constant, vector
from llmc.codegen.llvm import f32 as float_constant
from llmc.ir.dtypes import bool_, f32
from llmc.ir.ops import PAGE

if TYPE_CHECKING:
    from llmc.codegen.host.attention import AttentionKernel

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Scratch:
    """Byte offsets in a worker's scratch; the table of blocks comes last."""

    queries: int  # f32 [rows][size], scaled; or pairs
    scores: int  # f32 [rows][KEYS], then weights
    sums: int  # f32 [rows][padded]
    totals: int  # f32 [rows][lanes]: sums of weights, lane by lane
    maxima: int  # f32 [rows]
    factors: int  # f32 [rows]: what rescales the sums
    first: int  # i32 [rows]: first visible key
    last: int  # i32 [rows]: last visible key + 1
    keys: int  # f32 [size][KEYS]; or pairs
    values: int  # f32 [KEYS][padded]; or pairs
    mask: int  # f32 [KEYS]
    key_scales: int  # f32 [KEYS]
    value_scales: int  # f32 [KEYS]
    table: int

    @classmethod
    def of(cls, g: Geometry) -> Scratch:
        sizes = [g.rows * g.size, g.rows * KEYS, g.rows * g.padded, g.rows * g.lanes, g.rows,
                 g.rows, g.rows, g.rows, g.size * KEYS, KEYS * g.padded, KEYS, KEYS, KEYS]
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + -(-size // 16) * 64)
        return cls(*offsets)


class _Tile:
    """What both kinds of tile do: queries in, sums out."""

    def __init__(self, kernel: AttentionKernel, e: Emitter, frame: Frame, worker: Worker,
                 block: Block, rows: Rows):
        self.kernel, self.e, self.frame, self.block, self.rows = kernel, e, frame, block, rows
        self.g = g = kernel.geometry
        layout = kernel.layout

        def part(offset: int) -> ir.Value:
            return e.offset(worker.scratch, offset)

        self.queries: Matrix | Pairs = Matrix(part(layout.queries), f32, g.size)
        self.scores = Matrix(part(layout.scores), f32, KEYS)
        self.sums = Matrix(part(layout.sums), f32, g.padded)
        self.totals = Matrix(part(layout.totals), f32, g.lanes)
        self.maxima = Matrix(part(layout.maxima), f32, 1)
        self.factors = Matrix(part(layout.factors), f32, 1)
        self.first, self.last = part(layout.first), part(layout.last)
        self.key_scratch, self.value_scratch = part(layout.keys), part(layout.values)
        self.mask_row = Matrix(part(layout.mask), f32, KEYS)
        self.scale_scratch = part(layout.key_scales), part(layout.value_scales)

    def _clear(self) -> None:
        e, rows = self.e, self.rows
        fill(e, self.sums.pointer, multiply(e, rows, self.g.padded), 0.0, self.g.lanes)
        fill(e, self.totals.pointer, multiply(e, rows, self.g.lanes), 0.0, self.g.lanes)
        with e.loop(0, rows) as row:
            self.maxima.store(e, LOWEST, row, 0)

    # ---- queries ----------------------------------------------------------------------------

    def _place(self, query, member) -> tuple:
        """Index of a query's row for a head of the group."""
        e = self.e
        head = e.b.add(e.b.mul(self.block.head, i64(self.g.group)), member)
        return self.kernel.source.packing.place(self.block, e.b.add(self.block.first, query), head)

    def _query_scale(self) -> float:
        """What products of queries and keys are multiplied by, before anything else."""
        scale: float = self.kernel.node["scale"]
        return scale / self.kernel.softcap if self.kernel.softcap else scale * self.kernel.unit

    def _load_query(self, query, member, row) -> None:
        """A query's row in scratch: scaled, or as it is if it is to be multiplied in pairs."""
        e, g, operand = self.e, self.g, self.kernel.source.query
        offset = operand.offset(e, self.frame, *self._place(query, member))
        pointer = self.frame.pointer(operand.buffer)
        if isinstance(self.queries, Matrix):
            target = e.offset(self.queries.pointer, e.b.mul(row, i64(g.size)), F32)
            copy_row(e, pointer, offset, operand.stride(self.frame, -1), operand.dtype, target,
                     g.size, g.lanes, self._query_scale())
            return
        source = e.offset(pointer, offset, I16)
        target = e.offset(self.queries.pointer, e.b.mul(row, i64(g.size)), I16)
        for_each_chunk(g.size, 2 * g.lanes, lambda start, width: e.store(
            e.load(e.offset(source, start, I16), vector(I16, width)),
            e.offset(target, start, I16)))

    # ---- weights ----------------------------------------------------------------------------

    def _capped(self, score: ir.Value) -> ir.Value:
        e, softcap = self.e, self.kernel.softcap
        if not softcap:
            return score
        cap = splat_constant(score.type, softcap * self.kernel.unit)
        return e.b.fmul(codegen_math.tanh(e, score), cap)

    def _seen(self, numbers: ir.Value, first: ir.Value, last: ir.Value) -> ir.Value:
        """Which keys a row sees; numbers, first and last count from the same key."""
        e, lanes = self.e, self.g.lanes
        seen = e.b.icmp_signed("<", numbers, e.splat(last, lanes))
        if self.g.window:
            after = e.b.icmp_signed(">=", numbers, e.splat(first, lanes))
            seen = e.b.and_(seen, after)
        return seen

    def _limits(self, row, start: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first and last + 1 of the keys that a row sees, counted from `start`; i32."""
        e = self.e
        return tuple(e.b.sub(e.load(e.offset(limit, row, I32), I32), e.b.trunc(start, I32))
                     for limit in (self.first, self.last))

    def _exponential(self, difference, coarse: bool = False) -> ir.Value:
        if self.kernel.unit == 1.0:
            scale = splat_constant(difference.type, _LOG2_E)
            difference = self.e.b.fmul(difference, scale)
        return codegen_math.exp2_nonpositive(self.e, difference, coarse)

    def _move_on(self, row, old: ir.Value, new: ir.Value, total: ir.Value) -> None:
        """Rescales a row's total and adds to it; its sums are rescaled by the next product."""
        e, lanes = self.e, self.g.lanes
        factor = self._exponential(e.b.fsub(old, new))
        self.maxima.store(e, new, row, 0)
        self.factors.store(e, factor, row, 0)
        before = self.totals.load(e, row, 0, lanes)
        self.totals.store(e, e.fma(before, e.splat(factor, lanes), total), row, 0)

    # ---- result -----------------------------------------------------------------------------

    def _query_and_member(self, row) -> tuple:
        group = i64(self.g.group)
        return self.e.b.udiv(row, group), self.e.b.urem(row, group)

    def _store_result(self) -> None:
        e, g, operand = self.e, self.g, self.kernel.result
        pointer, stride = self.frame.pointer(operand.buffer), operand.stride(self.frame, -1)
        with e.loop(0, self.rows, name="row") as row:
            total = e.reduce_add(self.totals.load(e, row, 0, g.lanes))
            # A query that sees no key gives zeros.
            nothing = e.b.fcmp_ordered("==", total, float_constant(0.0))
            total = e.b.select(nothing, float_constant(1.0), total)
            inverse = e.b.fdiv(float_constant(1.0), total)
            base = operand.offset(e, self.frame, *self._place(*self._query_and_member(row)))

            def write(column, width, row=row, inverse=inverse, base=base) -> None:
                value = self.sums.load(e, row, column, width)
                place = add(e, base, multiply(e, column, stride))
                store_float(e, e.b.fmul(value, e.splat(inverse, width)), pointer, place,
                            operand.dtype)

            if stride == 1:
                for_each_chunk(g.value_size, g.lanes, write)
            else:
                with e.loop(0, g.value_size) as column:
                    write(column, 1)


class SingleQuery(_Tile):
    """One query of a paged sequence, in the heads of a group: bound by reading the cache, which is
    widened in registers, page by page."""

    source: PagedSource

    def emit(self) -> None:
        """The whole tile."""
        e, source = self.e, self.kernel.source
        assert isinstance(source, PagedSource)
        self.source = source
        low, high = source.visible(e, self.frame, self.block, i64(0))
        with e.loop(0, self.g.group, name="head") as member:
            e.store(e.b.trunc(low, I32), e.offset(self.first, member, I32))
            e.store(e.b.trunc(high, I32), e.offset(self.last, member, I32))
            self._load_query(i64(0), member, member)
        self._clear()
        first_page = e.b.sub(low, e.b.urem(low, i64(PAGE)))
        with e.loop(first_page, high, PAGE, "page") as start:
            following = e.b.add(start, i64(PAGE))
            more = e.b.icmp_signed("<", following, high)
            self._page(KeyBlock(
                start, e.b.select(more, following, start),
                e.maximum(e.b.sub(low, start), i64(0)),
                e.minimum(e.b.sub(high, start), i64(PAGE))))
        self._store_result()

    def _page(self, needed: KeyBlock) -> None:
        e, g, multiplier = self.e, self.g, self.kernel.multiplier
        place = e, self.frame, self.block, needed
        multiplier.run(e, self.scores, self.queries, self.source.keys_in_place(*place), self.rows,
                       PAGE, (0, g.size))
        scales = self.source.scales(*place)
        with e.loop(0, self.rows, name="row") as row:
            self._weights(row, needed, scales)
        values = self.source.values_in_place(*place, self.value_scratch)
        multiplier.run(e, self.sums, self.scores, values, self.rows, g.padded,
                       (needed.low, needed.high), self.factors.pointer)

    def _weights(self, row, needed: KeyBlock, scales: Sequence[Matrix]) -> None:
        """Scores of a row become weights; its maximum, total and factor move on. scales: of the
        keys and the values, where these are codes."""
        e, lanes = self.e, self.g.lanes
        columns = range(0, PAGE, lanes)
        first, last = self._limits(row, needed.start)
        hidden = splat_constant(vector(F32, lanes), -math.inf)
        scores = []
        for column in columns:
            score = self.scores.load(e, row, column, lanes)
            for each in scales[:1]:
                score = e.b.fmul(score, each.load(e, 0, column, lanes))
            seen = self._seen(lane_numbers(lanes, column), first, last)
            scores.append(e.b.select(seen, self._capped(score), hidden))
        old = self.maxima.load(e, row, 0)
        new = reduce_max(e, [*scores, e.splat(old, lanes)])
        total = None
        for score, column in zip(scores, columns, strict=True):
            weight = self._exponential(e.b.fsub(score, e.splat(new, lanes)))
            total = weight if total is None else e.b.fadd(total, weight)
            for each in scales[1:]:
                weight = e.b.fmul(weight, each.load(e, 0, column, lanes))
            self.scores.store(e, weight, row, column)
        self._move_on(row, old, new, total)


class ManyQueries(_Tile):
    """A block of queries, KEYS keys at a time: bound by multiply-adds. Keys and values are brought
    into scratch as the products want them."""

    def __init__(self, kernel: AttentionKernel, e: Emitter, frame: Frame, worker: Worker,
                 block: Block, rows: Rows):
        super().__init__(kernel, e, frame, worker, block, rows)
        g = self.g
        self.weights: Matrix | Pairs = self.scores
        self.keys: Matrix | Pairs = Matrix(self.key_scratch, f32, KEYS)
        if kernel.pairs:
            self.queries = Pairs(self.queries.pointer, g.size // 2)
            self.weights = Pairs(self.scores.pointer, KEYS)
            self.keys = Pairs(self.key_scratch, KEYS)

    def emit(self) -> None:
        """The whole tile."""
        e = self.e
        low, high, all_from, all_to = self._load_queries()
        self._clear()
        start_of_page = e.b.sub(low, e.b.urem(low, i64(PAGE)))
        with e.loop(start_of_page, high, KEYS, "keys") as start:
            stop = e.minimum(e.b.sub(high, start), i64(KEYS))
            needed = KeyBlock(start, start, e.maximum(e.b.sub(low, start), i64(0)), stop)
            width = e.b.mul(e.ceildiv(stop, i64(UNIT)), i64(UNIT))
            whole = e.b.and_(e.b.icmp_signed("<=", all_from, start),
                             e.b.icmp_signed(">=", all_to, e.b.add(start, width)))
            self._key_block(needed, width, whole)
        self._store_result()

    def _load_queries(self) -> tuple:
        """Brings the queries into scratch; returns the first and last + 1 of the keys that any of
        them sees, and of those that all see."""
        e, source, group = self.e, self.kernel.source, self.g.group
        far = i64((1 << 31) - 1)
        with e.fold(0, self.block.count, [far, i64(0), i64(0), far], name="query") as (
                query, (low, high, all_from, all_to), finish):
            first, last = source.visible(e, self.frame, self.block, query)
            with e.loop(0, group, name="head") as member:
                row = e.b.add(e.b.mul(query, i64(group)), member)
                e.store(e.b.trunc(first, I32), e.offset(self.first, row, I32))
                e.store(e.b.trunc(last, I32), e.offset(self.last, row, I32))
                self._load_query(query, member, row)
            finish([e.minimum(low, first), e.maximum(high, last), e.maximum(all_from, first),
                    e.minimum(all_to, last)])
        return tuple(finish.results)

    # ---- keys -------------------------------------------------------------------------------

    def _key_block(self, needed: KeyBlock, width: ir.Value, whole: ir.Value) -> None:
        e, g, kernel = self.e, self.g, self.kernel
        place = e, self.frame, self.block, needed
        pairs = kernel.pairs
        kernel.source.keys(*place, self.keys)
        kernel.multiplier.run(e, self.scores, self.queries, self.keys, self.rows, width,
                              (0, g.size // 2 if pairs else g.size),
                              scale=self._query_scale() if pairs else 1.0)
        scales = kernel.source.copy_scales(*place, self.scale_scratch)
        mask = kernel.mask
        if mask is not None and _is_shared(mask):
            self._load_mask(mask, needed, i64(0), i64(0))
        with e.b.if_else(whole) as (all_see_all, otherwise):
            with all_see_all, e.loop(0, self.rows, name="row") as row:
                self._weights(row, needed, width, scales, hide=False)
            with otherwise, e.loop(0, self.rows, name="row") as row:
                self._weights(row, needed, width, scales, hide=True)
        values = kernel.source.values(*place, self.value_scratch, pairs)
        depth = needed.low, needed.high
        if pairs:
            depth = (e.b.lshr(needed.low, i64(1)),
                     e.b.lshr(e.b.add(needed.high, i64(1)), i64(1)))
        kernel.multiplier.run(e, self.sums, self.weights, values, self.rows, g.padded, depth,
                              self.factors.pointer)

    def _weights(self, row, needed: KeyBlock, width: ir.Value, scales: Sequence[Matrix],
                 hide: bool) -> None:
        """Scores of a row become weights; its maximum, total and factor move on. scales: of the
        keys and the values, where these are codes. hide: the row does not see every key."""
        e, lanes = self.e, self.g.lanes
        old = self.maxima.load(e, row, 0)
        new = self._finish_scores(row, needed, width, scales[:1], hide, old)
        zeros = [splat_constant(vector(F32, lanes), 0.0)] * (UNIT // lanes)
        with e.fold(0, width, zeros, UNIT, "column") as (column, totals, finish):
            totals = list(totals)
            for index in range(UNIT // lanes):
                place = e.b.add(column, i64(index * lanes))
                score = self.scores.load(e, row, place, lanes)
                weight = self._exponential(e.b.fsub(score, e.splat(new, lanes)),
                                           coarse=self.kernel.pairs)
                totals[index] = e.b.fadd(totals[index], weight)
                for each in scales[1:]:
                    weight = e.b.fmul(weight, each.load(e, 0, place, lanes))
                self._store_weight(weight, row, place)
            finish(totals)
        total = finish.results[0]
        for other in finish.results[1:]:
            total = e.b.fadd(total, other)
        self._move_on(row, old, new, total)

    def _store_weight(self, weight: ir.Value, row, column) -> None:
        e = self.e
        if isinstance(self.weights, Matrix):
            self.weights.store(e, weight, row, column)
            return
        # Halves of words: they never reach scores that are yet to be read.
        place = add(e, multiply(e, row, 2 * KEYS), column)
        e.store(attention_blocks.rounded_to_bf16(e, weight),
                e.offset(self.weights.pointer, place, I16), 2)

    def _finish_scores(self, row, needed: KeyBlock, width: ir.Value, scales: Sequence[Matrix],
                       hide: bool, old: ir.Value) -> ir.Value:
        """Stores what is left to do to the scores of a row; returns their maximum, and old."""
        e, lanes, mask = self.e, self.g.lanes, self.kernel.mask
        if mask is not None and not _is_shared(mask):
            self._load_mask(mask, needed, *self._query_and_member(row))
        first, last = self._limits(row, needed.start)
        hidden = splat_constant(vector(F32, lanes), -math.inf)
        changed = hide or scales or mask is not None or self.kernel.softcap
        initial = [e.splat(old, lanes)] * (UNIT // lanes)
        with e.fold(0, width, initial, UNIT, "column") as (column, largest, finish):
            largest = list(largest)
            for index in range(UNIT // lanes):
                place = e.b.add(column, i64(index * lanes))
                score = self.scores.load(e, row, place, lanes)
                for each in scales:
                    score = e.b.fmul(score, each.load(e, 0, place, lanes))
                score = self._capped(score)
                if mask is not None:
                    score = e.b.fadd(score, self.mask_row.load(e, 0, place, lanes))
                if hide:
                    numbers = e.b.add(e.splat(e.b.trunc(place, I32), lanes),
                                      lane_numbers(lanes, 0))
                    score = e.b.select(self._seen(numbers, first, last), score, hidden)
                if changed:
                    self.scores.store(e, score, row, place)
                largest[index] = larger(e, score, largest[index])
            finish(largest)
        return reduce_max(e, finish.results)

    # ---- masks ------------------------------------------------------------------------------

    def _load_mask(self, mask: Operand, needed: KeyBlock, query, member) -> None:
        """A row of the mask for this block of keys, in additive form, into scratch."""
        e, lanes = self.e, self.g.lanes
        base = mask.offset(e, self.frame, *self._place(query, member), needed.start)
        stride = mask.stride(self.frame, 3)
        pointer = self.frame.pointer(mask.buffer)
        is_bool = self.kernel.node.inputs[3].dtype is bool_

        def copy(column, width: int) -> None:
            place = add(e, base, multiply(e, column, stride))
            value = load_float(e, pointer, place, mask.dtype, width)
            if is_bool:
                zero = splat_constant(value.type, 0.0)
                shown = e.b.fcmp_unordered("!=", value, zero)
                value = e.b.select(shown, zero, splat_constant(value.type, -math.inf))
            self.mask_row.store(e, value, 0, column)

        whole = e.b.sub(needed.high, e.b.urem(needed.high, i64(lanes))) if stride == 1 else i64(0)
        with e.loop(0, whole, lanes) as column:
            copy(column, lanes)
        with e.loop(whole, needed.high) as column:
            copy(column, 1)


def _is_shared(mask: Operand) -> bool:
    """Whether all queries and heads of a sequence see the same mask."""
    return mask.view.strides[1:3] == (0, 0)
