"""Attention of single queries over pages: bound by reading the cache once.

A block takes one query, one kv head with up to 16 of the heads that share it, and one split of the
pages. Its warps take pages in turn, each with copies of its own in flight; what they found is
joined in shared memory. The last block of a query and head to arrive joins the splits, always in
the same order, so that results repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.host.attention_blocks import add
from llmc.codegen.host.attention_queries import Operand
from llmc.codegen.llvm import F32, I1, I32, I64, f32, i32, i64, splat_constant
from llmc.codegen.nvptx.attention_instructions import (
    WARP,
    add_floats,
    barrier,
    commit_copies,
    copy_async,
    count_arrival,
    global_memory,
    larger,
    maximum,
    over_lanes,
    shared_address,
    shared_memory,
    short_loop,
    smaller,
    thread_index,
    wait_copies,
    warp_barrier,
)
from llmc.codegen.nvptx.attention_places import (
    Geometry,
    PagedSource,
    Tile,
    single_query_sequences,
)
from llmc.codegen.nvptx.attention_store import store_pair
from llmc.codegen.nvptx.attention_tensor import (
    BAND,
    LOWEST,
    Lane,
    RowState,
    Softmax,
    add_values,
    flatten,
    hide,
    merge_if,
    row_bytes,
    scale_rows,
    score_tiles,
    unflatten,
    weigh,
    zero_sums,
)
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.ir.dims import Dim, ceildiv
from llmc.ir.dims import maximum as largest
from llmc.ir.dims import minimum as least
from llmc.ir.dtypes import DType
from llmc.ir.ops import PAGE

_RING_BYTES = 112 * 1024  # of shared memory: two blocks fit a processor of Hopper
_MOST_SPLITS = WARP  # a lane of the joining warp for each
CLUSTER = 8  # the most blocks of a cluster that every Hopper part takes
CLUSTER_PAGES = 128  # of a sequence: measured, clusters are faster below about twice that
VECTOR = 4  # components that a thread joins at a time
VECTOR_TYPE = ir.VectorType(F32, VECTOR)
_MOST_SIZE_IN_REGISTERS = 96  # of a head, for the queries to stay in registers
_BLOCKS_EACH = 2  # blocks that a multiprocessor holds at a time

Queries = Callable[[int, int], list[ir.Value]]  # step, band -> left operand


@dataclass(frozen=True)
class Ring:
    """Warps of a block, and pages that each holds at a time: one in use, others on their way."""

    warps: int
    pages: int
    page_bytes: int

    @classmethod
    def of(cls, size: int, value_size: int) -> Ring:
        page_bytes = PAGE * (row_bytes(size) + row_bytes(value_size))
        slots = _RING_BYTES // page_bytes
        warps = max(1, min(4, slots // 3))
        return cls(warps, max(2, min(4, slots // warps)), page_bytes)


class DecodeKernel:
    """One launch. by_token: every token is a query of its own; else sequences with one query are
    answered, and the others left to another kernel. processors: of the target. clusters_first: a
    ClusterDecodeKernel stands beside this one, for the shapes that it suits."""

    cluster = 1  # blocks of a split

    def __init__(self, source: PagedSource, geometry: Geometry, softmax: Softmax, dtype: DType,
                 result: Operand, by_token: bool, processors: int, clusters_first: bool = False):
        self.source, self.geometry, self.softmax = source, geometry, softmax
        self.dtype, self.result, self.by_token = dtype, result, by_token
        self.ring = Ring.of(geometry.size, geometry.value_size)
        self.threads = self.ring.warps * WARP
        self.chunks = -(-geometry.group // BAND)
        self.most_blocks = _BLOCKS_EACH * processors
        warp_floats = BAND * (geometry.value_size + 2)
        self.weights_at = 4 * self.ring.warps * warp_floats  # after the warps' results
        self.queries_at = max(self.ring.warps * self.ring.pages * self.ring.page_bytes,
                              self.weights_at + 4 * BAND * WARP)
        self.queries_in_registers = geometry.size <= _MOST_SIZE_IN_REGISTERS
        self.answer_at = self.queries_at + (
            0 if self.queries_in_registers else BAND * 2 * geometry.size)
        self.shared_bytes = self.answer_at + 16
        queries = source.tokens if by_token else source.packing.sequences
        self.queries = queries if by_token else single_query_sequences(source.tokens, queries)
        self.splits = self._split_bound(queries * geometry.kv_heads * self.chunks)
        self.used = self._use(clusters_first)

    def _split_bound(self, places: Dim) -> Dim:
        """Splits of each of `places` queries, heads and chunks, as launched."""
        return least(largest(self.most_blocks // places, 1), _MOST_SPLITS,
                     ceildiv(self.source.table_width, self.ring.warps))

    def _use(self, clusters_first: bool) -> Dim:
        """1 for shapes that this kernel is launched for, 0 for others."""
        return 1 - self.suits_clusters() if clusters_first else 1

    def suits_clusters(self) -> Dim:
        """1 where all blocks of clusters fit the processors at a time and contexts are short, so
        that joining takes longer than reading; else 0."""
        places = self.queries * self.geometry.kv_heads * self.chunks
        short = least(1, largest(0, CLUSTER_PAGES + 1 - self.source.table_width))
        return least(1, self.most_blocks // (places * CLUSTER)) * short

    def blocks(self) -> Dim:
        places = self.queries * self.geometry.kv_heads * self.chunks
        return places * self.splits * self.cluster * self.used

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        work = Work.of(self, e, frame)
        with e.b.if_then(work.exists):
            self.block(e, frame, work).emit()

    def block(self, e: DeviceEmitter, frame: DeviceFrame, work: Work) -> Block:
        return Block(self, e, frame, work)


@dataclass(frozen=True)
class Work:
    """What a block does; i32 values but for the tile's."""

    exists: ir.Value
    tile: Tile  # of one query; `first` is the first of the up to 16 heads
    low: ir.Value  # first visible key
    high: ir.Value  # last visible key + 1
    begin: ir.Value  # first page of the block
    end: ir.Value  # last page + 1
    rank: ir.Value  # of the block in its cluster
    split: ir.Value
    splits: ir.Value  # that find something to do
    place: ir.Value  # number of query, head and chunk
    slot: ir.Value  # number of the place's first split among all

    @classmethod
    def of(cls, kernel: DecodeKernel, e: DeviceEmitter, frame: DeviceFrame) -> Work:
        b, geometry, source = e.b, kernel.geometry, kernel.source
        splits = b.trunc(frame.dim(kernel.splits), I32)
        block = b.trunc(e.block, I32)
        members = b.mul(splits, i32(kernel.cluster))
        place, member = b.udiv(block, members), b.urem(block, members)
        chunk, rest = b.urem(place, i32(kernel.chunks)), b.udiv(place, i32(kernel.chunks))
        head = b.urem(rest, i32(geometry.kv_heads))
        query = b.zext(b.udiv(rest, i32(geometry.kv_heads)), I64)
        if kernel.by_token:
            token, single = query, ir.Constant(I1, 1)
            sequence = source.sequence.index(e, frame, token)
        else:
            sequence, token = query, source.offsets.index(e, frame, query)
            end = source.offsets.index(e, frame, b.add(query, i64(1)))
            single = b.icmp_signed("==", b.sub(end, token), i64(1))
        first_row = b.zext(b.mul(chunk, i32(BAND)), I64)
        tile = Tile(single, sequence, b.zext(head, I64), token, first_row, i64(geometry.group))
        position = source.positions.index(e, frame, e.b.select(single, token, i64(0)))
        low, high = (b.trunc(bound, I32) for bound in geometry.visible(
            e, position, b.add(position, i64(1))))
        first_page = b.lshr(low, i32(5))
        pages = b.sub(b.lshr(b.add(high, i32(PAGE - 1)), i32(5)), first_page)
        rounds = b.udiv(b.add(pages, i32(kernel.ring.warps - 1)), i32(kernel.ring.warps))
        used = larger(e, smaller(e, splits, rounds), i32(1))
        active = larger(e, smaller(e, b.mul(used, i32(kernel.cluster)), rounds), i32(1))
        each = b.udiv(b.add(pages, b.sub(active, i32(1))), active)
        begin = b.add(first_page, b.mul(member, each))
        end_page = smaller(e, b.add(begin, each), b.add(first_page, pages))
        split = b.udiv(member, i32(kernel.cluster))
        exists = b.and_(single, b.icmp_unsigned("<", split, used))
        return cls(exists, tile, low, high, begin, end_page, b.urem(member, i32(kernel.cluster)),
                   split, used, place, b.mul(place, splits))


class Block:
    """Emits the work of one block."""

    def __init__(self, kernel: DecodeKernel, e: DeviceEmitter, frame: DeviceFrame, work: Work):
        self.kernel, self.e, self.frame, self.work = kernel, e, frame, work
        self.geometry, self.ring = kernel.geometry, kernel.ring
        self.lane = Lane.of(e)
        self.thread = thread_index(e)
        self.warp = e.b.lshr(self.thread, i32(5))
        pages = e.b.mul(self.warp, i32(self.ring.pages * self.ring.page_bytes))
        self.base = e.b.add(shared_address(e), pages)

    def emit(self) -> None:
        e, ring, work = self.e, self.ring, self.work
        queries = self._queries()
        if not self.kernel.queries_in_registers:
            queries = self._queries_in_shared(queries)
        start = e.b.add(work.begin, self.warp)
        ahead = ring.pages - 1
        for turn in range(ahead):
            page = e.b.add(start, i32(turn * ring.warps))
            self._copy(page, self._number(page), i32(turn * ring.page_bytes))
        number = self._number(e.b.add(start, i32(ahead * ring.warps)))
        state = [*RowState.start(1).flat(), *zero_sums(1, self.geometry.value_size)]
        with short_loop(e, start, work.end, ring.warps, [i32(0), number, *state]) as (
                page, (slot, number, *state), results):
            wait_copies(e, ahead - 1)
            warp_barrier(e)
            whole = i32(ring.pages * ring.page_bytes)
            free = e.b.sub(e.b.select(e.b.icmp_signed("==", slot, i32(0)), whole, slot),
                           i32(ring.page_bytes))
            following = e.b.add(page, i32(ahead * ring.warps))
            self._copy(following, number, free)
            number = self._number(e.b.add(following, i32(ring.warps)))
            state = self._step(page, slot, state, queries)
            after = e.b.add(slot, i32(ring.page_bytes))
            after = e.b.select(e.b.icmp_signed("==", after, whole), i32(0), after)
            results += [after, number, *state]
        wait_copies(e, 0)
        barrier(e)
        self._share(results[2:])
        barrier(e)
        self._join_warps()

    # ---- copies --------------------------------------------------------------------------------

    def _number(self, page: ir.Value) -> ir.Value:
        """The pool page of a page of the sequence (of the last one, beyond the end)."""
        e, work = self.e, self.work
        within = larger(e, smaller(e, page, e.b.sub(work.end, i32(1))), i32(0))
        return e.b.trunc(self.kernel.source.page(
            e, self.frame, work.tile.sequence, e.b.sext(within, I64)), I32)

    def _copy(self, page: ir.Value, number: ir.Value, slot: ir.Value) -> None:
        """Starts the warp's copies of a page, if the split has it; closes a group in any case."""
        e, geometry, source = self.e, self.geometry, self.kernel.source
        with e.b.if_then(e.b.icmp_signed("<", page, self.work.end)):
            target = e.b.add(self.base, slot)
            for of_values, size in ((False, geometry.size), (True, geometry.value_size)):
                base = source.page_address(e, self.frame, e.b.sext(number, I64),
                                           self.work.tile.head, of_values)
                own = e.offset(base, e.b.zext(e.b.shl(self.lane.number, i32(4)), I64))
                self._copy_rows(own, target, size, page if of_values else None)
                target = e.b.add(target, i32(PAGE * row_bytes(size)))
        commit_copies(e)

    def _copy_rows(self, source: ir.Value, target: ir.Value, size: int, page: ir.Value | None
                   ) -> None:
        """The page's rows of `size`; with page, rows that the query does not see become zeros."""
        e, chunks = self.e, size // 8
        for turn in range(chunks):
            row, chunk, start = self._part(turn, chunks)
            place = e.b.add(e.b.mul(row, i32(row_bytes(size))), e.b.shl(chunk, i32(4)))
            wanted = None
            if page is not None:
                key = e.b.add(e.b.add(e.b.shl(page, i32(5)), row), i32(start))
                wanted = e.b.and_(e.b.icmp_signed(">=", key, self.work.low),
                                  e.b.icmp_signed("<", key, self.work.high))
            copy_async(e, e.b.add(target, place), start * row_bytes(size), source, wanted,
                       at=turn * WARP * 16)

    def _part(self, turn: int, chunks: int) -> tuple[ir.Value, ir.Value, int]:
        """(row, chunk, start) of what the lane copies in a turn: a chunk of row + start."""
        e, number = self.e, self.lane.number
        start = turn * WARP // chunks if WARP % chunks == 0 else 0
        if WARP % chunks:
            number = e.b.add(number, i32(turn * WARP))
        return e.b.udiv(number, i32(chunks)), e.b.urem(number, i32(chunks)), start

    def _queries(self) -> Queries:
        """Left operands of all steps, from memory; rows beyond the last head repeat it."""
        e, operand, tile = self.e, self.kernel.source.query, self.work.tile
        pointer = global_memory(e, self.frame.pointer(operand.buffer))
        rows = []
        for half in range(2):
            row = tile.row(e, e.b.zext(e.b.add(self.lane.row, i32(8 * half)), I64))
            offset = operand.offset(e, self.frame, *self.kernel.source.place(e, tile, row))
            offset = add(e, offset, e.b.zext(self.lane.column, I64))
            rows.append(e.offset(pointer, e.b.shl(offset, i64(1))))
        loaded = [[e.load(e.offset(rows[half], 2 * (BAND * step + 8 * upper)), I32, 4)
                   for upper in range(2) for half in range(2)]
                  for step in range(self.geometry.size // BAND)]
        return lambda step, band: loaded[step]

    def _queries_in_shared(self, queries: Queries) -> Queries:
        """The same operands in shared memory, where each lane finds its own again."""
        e = self.e
        lane = e.b.zext(e.b.shl(self.lane.number, i32(4)), I64)
        base = e.offset(e.offset(shared_memory(e), self.kernel.queries_at), lane)
        with e.b.if_then(e.b.icmp_signed("==", self.warp, i32(0))):
            for step in range(self.geometry.size // BAND):
                for index, value in enumerate(queries(step, 0)):
                    e.store(value, e.offset(base, 16 * WARP * step + 4 * index))
        barrier(e)
        vector = ir.VectorType(I32, 4)

        def again(step: int, band: int) -> list[ir.Value]:
            own = e.load(e.offset(base, 16 * WARP * step), vector, 16)
            return [e.b.extract_element(own, i32(i)) for i in range(4)]

        return again

    # ---- a page --------------------------------------------------------------------------------

    def _step(self, page: ir.Value, slot: ir.Value, state: list[ir.Value], queries: Queries
              ) -> list[ir.Value]:
        e, kernel, geometry = self.e, self.kernel, self.geometry
        rows, sums = RowState.of_flat(state[:4]), unflatten(state[4:], 1)
        base = e.b.add(self.base, slot)
        keys = self.lane.key_address(e, base, geometry.size)
        values = self.lane.value_address(
            e, e.b.add(base, i32(PAGE * row_bytes(geometry.size))), geometry.value_size)
        scores = score_tiles(e, kernel.dtype, queries, keys, 1, PAGE, geometry.size)
        scores = kernel.softmax.scores(e, scores)
        first = e.b.shl(page, i32(5))
        edge = e.b.or_(
            e.b.icmp_signed(">", e.b.add(first, i32(PAGE)), self.work.high),
            e.b.icmp_signed("<", first, self.work.low))
        own = e.b.add(first, self.lane.column)

        def masked(tiles) -> None:
            low = e.b.sub(self.work.low, own) if geometry.window else None
            for row in range(2):
                hide(e, tiles[0], row, low, e.b.sub(self.work.high, own))

        scores = merge_if(e, edge, scores, masked)
        rows, factors = weigh(e, kernel.softmax, scores, rows)
        sums = add_values(e, kernel.dtype, scores, values, scale_rows(e, sums, factors),
                          geometry.value_size)
        return [*rows.flat(), *flatten(sums)]

    # ---- joining -------------------------------------------------------------------------------

    def _warp_floats(self, warp, field: str) -> ir.Value:
        """A warp's results in shared memory: sums f32 [16][value size], maxima and totals [16]."""
        e, size = self.e, self.geometry.value_size
        start = {"sums": 0, "maxima": BAND * size, "totals": BAND * (size + 1)}[field]
        warp = i32(warp) if isinstance(warp, int) else warp
        place = e.b.add(e.b.mul(warp, i32(BAND * (size + 2))), i32(start))
        return e.offset(shared_memory(e), e.b.zext(place, I64), F32)

    def _share(self, state: list[ir.Value]) -> None:
        e, size = self.e, self.geometry.value_size
        rows, (tiles,) = RowState.of_flat(state[:4]), unflatten(state[4:], 1)
        base = self._warp_floats(self.warp, "sums")
        for half in range(2):
            row = e.b.add(self.lane.row, i32(8 * half))
            own = e.b.add(e.b.mul(row, i32(size)), self.lane.column)
            place = e.offset(base, e.b.zext(own, I64), F32)
            for index, tile in enumerate(tiles):
                for i in range(2):
                    e.store(tile[2 * half + i], e.offset(place, 8 * index + i, F32))
            total = over_lanes(e, rows.totals[half], add_floats, 4)
            for field, value in (("maxima", rows.maxima[half]), ("totals", total)):
                e.store(value, e.offset(self._warp_floats(self.warp, field),
                                        e.b.zext(row, I64), F32))

    def _warp_shares(self, row: ir.Value) -> tuple[list[ir.Value], ir.Value, ir.Value]:
        """(what rescales each warp's sums, maximum, total) of a row."""
        e, warps = self.e, range(self.ring.warps)

        def of(field: str) -> list[ir.Value]:
            return [e.load(e.offset(self._warp_floats(warp, field), row, F32), F32)
                    for warp in warps]

        maxima, totals = of("maxima"), of("totals")
        high = maxima[0]
        for another in maxima[1:]:
            high = maximum(e, high, another)
        factors = [self.kernel.softmax.rescale(e, each, high) for each in maxima]
        total = f32(0.0)
        for factor, each in zip(factors, totals, strict=True):
            total = e.fma(factor, each, total)
        return factors, high, total

    def _heads(self) -> ir.Value:
        """Rows of the block that are heads, i64."""
        e, tile = self.e, self.work.tile
        return e.minimum(e.b.sub(tile.rows, tile.first), i64(BAND))

    def _each_vector(self, emit) -> None:
        """emit(row, component) for every 4th component of the block's heads; threads side by
        side, so that what one reads is coalesced."""
        e, vectors = self.e, self.geometry.value_size // VECTOR
        count = e.b.mul(self._heads(), i64(vectors))
        with e.loop(e.b.zext(self.thread, I64), count, self.kernel.threads, "place") as index:
            short = e.b.trunc(index, I32)
            component = e.b.mul(e.b.urem(short, i32(vectors)), i32(VECTOR))
            emit(e.b.zext(e.b.udiv(short, i32(vectors)), I64), e.b.zext(component, I64))

    def _join_warps(self) -> None:
        """The warps' results together: the result itself, or a part of it if there are splits."""
        e, work = self.e, self.work
        alone = e.b.icmp_unsigned("==", work.splits, i32(1))
        with e.b.if_else(alone) as (whole, part):
            with whole:
                self._each_vector(lambda row, component: self._store(
                    row, component, self._joined(row, component, whole=True)))
            with part:
                spare = Spare(self.kernel, e, work)

                def save(row, component) -> None:
                    e.store(self._joined(row, component, whole=False),
                            spare.sum_at(work.split, row, component), 16)

                self._each_vector(save)
                row = e.b.zext(self.thread, I64)
                with e.b.if_then(e.b.icmp_signed("<", row, self._heads())):
                    _, high, total = self._warp_shares(row)
                    e.store(high, spare.maximum_at(work.split, row))
                    e.store(total, spare.total_at(work.split, row))
                self._join_splits(spare)

    def _joined(self, row: ir.Value, component: ir.Value, whole: bool) -> ir.Value:
        """4 components of the warps' sums together; whole: divided by the total."""
        e, size = self.e, self.geometry.value_size
        factors, _, total = self._warp_shares(row)
        place = e.b.add(e.b.mul(row, i64(size)), component)
        result = splat_constant(VECTOR_TYPE, 0.0)
        for warp, factor in enumerate(factors):
            base = e.offset(self._warp_floats(warp, "sums"), place, F32)
            result = e.fma(e.load(base, VECTOR_TYPE, 16), e.splat(factor, VECTOR), result)
        if not whole:
            return result
        return e.b.fmul(result, e.splat(e.b.fdiv(f32(1.0), total), VECTOR))

    def _store(self, row: ir.Value, component: ir.Value, value: ir.Value) -> None:
        e, result, tile = self.e, self.kernel.result, self.work.tile
        place = self.kernel.source.place(e, tile, tile.row(e, row))
        offset = add(e, result.offset(e, self.frame, *place), component)
        pointer = global_memory(e, self.frame.pointer(result.buffer))
        elements = [e.b.extract_element(value, i32(i)) for i in range(VECTOR)]
        for i in range(0, VECTOR, 2):
            store_pair(e, result, pointer, e.b.add(offset, i64(i)), *elements[i:i + 2])

    def _join_splits(self, spare: Spare) -> None:
        """The last block of a place to arrive adds up what all have left."""
        e, work = self.e, self.work
        place = e.offset(shared_memory(e), self.kernel.answer_at)
        old = count_arrival(e, self.thread, spare.counter(), place)
        last = e.b.icmp_unsigned("==", old, e.b.sub(work.splits, i32(1)))
        with e.b.if_then(last):
            self._split_weights(spare)
            barrier(e)
            self._each_vector(lambda row, component: self._store(
                row, component, self._sum_of_splits(spare, row, component)))
            with e.b.if_then(e.b.icmp_signed("==", self.thread, i32(0))):
                e.store(i32(0), spare.counter())  # for the next launch

    def _split_weight_at(self, row: ir.Value, split: ir.Value) -> ir.Value:
        e = self.e
        base = e.offset(shared_memory(e), self.kernel.weights_at)
        return e.offset(base, e.b.add(e.b.mul(row, i64(WARP)), split), F32)

    def _split_weights(self, spare: Spare) -> None:
        """What multiplies each split's sums, into shared memory: a warp for a row, a lane for a
        split; 0 for splits that there are not."""
        e, softmax = self.e, self.kernel.softmax
        exists = e.b.icmp_unsigned("<", self.lane.number, self.work.splits)
        split = e.b.select(exists, self.lane.number, i32(0))
        with e.loop(e.b.zext(self.warp, I64), self._heads(), self.ring.warps, "row") as row:
            own = e.load(spare.maximum_at(split, row), F32)
            own = e.b.select(exists, own, f32(LOWEST))
            total = e.b.select(exists, e.load(spare.total_at(split, row), F32), f32(0.0))
            factor = softmax.rescale(e, own, over_lanes(e, own, maximum))
            whole = over_lanes(e, e.b.fmul(total, factor), add_floats)
            weight = e.b.select(exists, e.b.fdiv(factor, whole), f32(0.0))
            e.store(weight, self._split_weight_at(row, e.b.zext(self.lane.number, I64)))

    def _sum_of_splits(self, spare: Spare, row: ir.Value, component: ir.Value) -> ir.Value:
        """4 components of all splits together, the loads of 8 splits in flight at a time."""
        e, ahead = self.e, 8
        splits = e.b.zext(self.work.splits, I64)
        zero = splat_constant(VECTOR_TYPE, 0.0)
        with e.fold(0, splits, [zero], ahead, "split") as (split, (total,), finish):
            numbers = [e.b.add(split, i64(i)) for i in range(ahead)]
            last = e.b.sub(splits, i64(1))
            values = [e.load(spare.sum_at(e.b.trunc(e.minimum(number, last), I32), row, component),
                             VECTOR_TYPE, 16) for number in numbers]
            for number, value in zip(numbers, values, strict=True):
                weight = e.load(self._split_weight_at(row, number), F32)
                total = e.fma(value, e.splat(weight, VECTOR), total)
            finish([total])
        return finish.results[0]


class Spare:
    """Device memory of the kernel's own, zero when it is loaded: the results of splits and, for
    each place, how many have arrived. Splits are only made as long as all blocks fit the processors
    at a time, which bounds it."""

    def __init__(self, kernel: DecodeKernel, e: DeviceEmitter, work: Work):
        self.e, self.work, self.size = e, work, kernel.geometry.value_size
        blocks = kernel.most_blocks
        self.sums = _own_memory(e, F32, blocks * BAND * self.size)
        self.maxima = _own_memory(e, F32, blocks * BAND)
        self.totals = _own_memory(e, F32, blocks * BAND)
        self.counters = _own_memory(e, I32, blocks)

    def _row(self, split: ir.Value, row: ir.Value) -> ir.Value:
        number = self.e.b.zext(self.e.b.add(self.work.slot, split), I64)
        return self.e.b.add(self.e.b.mul(number, i64(BAND)), row)

    def sum_at(self, split: ir.Value, row: ir.Value, component: ir.Value) -> ir.Value:
        place = self.e.b.mul(self._row(split, row), i64(self.size))
        return self.e.offset(self.sums, self.e.b.add(place, component), F32)

    def maximum_at(self, split: ir.Value, row: ir.Value) -> ir.Value:
        return self.e.offset(self.maxima, self._row(split, row), F32)

    def total_at(self, split: ir.Value, row: ir.Value) -> ir.Value:
        return self.e.offset(self.totals, self._row(split, row), F32)

    def counter(self) -> ir.Value:
        return self.e.offset(self.counters, self.e.b.zext(self.work.place, I64), I32)


def _own_memory(e: DeviceEmitter, element: ir.Type, count: int) -> ir.Value:
    type_ = ir.ArrayType(element, count)
    memory = ir.GlobalVariable(e.module, type_, e.module.get_unique_name("attention_splits"),
                               addrspace=1)
    memory.linkage = "internal"
    memory.initializer = ir.Constant(type_, None)
    memory.align = 256
    memory.type = ir.PointerType(addrspace=1)
    return memory
