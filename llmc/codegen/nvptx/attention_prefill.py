"""Attention of many queries on tensor cores, flash style: scores never leave registers.

A block takes a tile of rows; each warp bands of 16 of them. Keys and values come 64 at a time into
shared memory, two stages, so that the copies of one overlap the arithmetic of the other. Blocks of
keys that no row sees are skipped; only those at an edge of what is visible are masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.host.attention_blocks import add, multiply
from llmc.codegen.host.attention_queries import Operand
from llmc.codegen.llvm import I32, I64, i32, i64
from llmc.codegen.nvptx.attention_instructions import (
    WARP,
    barrier,
    commit_copies,
    copy_async,
    larger,
    load_matrices,
    over_lanes,
    shared_address,
    shared_memory,
    short_loop,
    smaller,
    thread_index,
    wait_copies,
)
from llmc.codegen.nvptx.attention_places import (
    DenseSource,
    Geometry,
    PackedSource,
    PagedSource,
    Tile,
)
from llmc.codegen.nvptx.attention_store import store_rows
from llmc.codegen.nvptx.attention_tensor import (
    BAND,
    Lane,
    RowState,
    Softmax,
    add_values,
    flatten,
    hide,
    inverse_totals,
    merge_if,
    row_bytes,
    scale_rows,
    score_tiles,
    unflatten,
    weigh,
    zero_sums,
)
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType
from llmc.ir.ops import PAGE


@dataclass(frozen=True)
class Shape:
    """How a block is cut: warps, bands of 16 rows in each, keys of a stage of copies, and of those
    the keys whose scores are held at a time."""

    warps: int
    bands: int
    keys: int
    part: int
    queries_in_registers: bool = False

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def rows(self) -> int:
        return self.warps * self.bands * BAND


def choose_shape(geometry: Geometry, hopper: bool) -> Shape:
    """128 rows; two bands a warp where their sums fit into registers, so that what is read of keys
    and values from shared memory serves both.

    The bounds are where the assembler begins to spill: before Hopper it needs more registers.
    """
    size = _largest_size(geometry)
    if size <= 64:
        return Shape(4, 2, 64, 64)
    if hopper and size <= 128:
        return Shape(4, 2, 32, 32)
    if size <= 128:
        return Shape(8, 1, 64, 64)
    return Shape(8, 1, 32, 32)


def choose_low_shape(geometry: Geometry, hopper: bool) -> Shape | None:
    """64 rows, for few tiles; None where they do not gain, or were not measured.

    With as many tiles as multiprocessors the one that sees the most keys takes as long as all:
    halves of it end sooner. One band leaves the registers for the queries, so that shared memory
    is read for keys and values alone. On an H100, 32 heads of 128, 512 tokens: 23 to 19 us; with
    2,048 tokens 64 rows are slower by 20 %, for they read keys and values twice as often.
    """
    if hopper and _largest_size(geometry) <= 128:
        return Shape(4, 1, 64, 64, queries_in_registers=True)
    return None


def _largest_size(geometry: Geometry) -> int:
    return max(geometry.size, geometry.value_size)


class PrefillKernel:
    """One launch: all tiles of all kv heads, those that see the most keys first.

    wanted: 0 for the dims to which another shape is better suited, else 1.
    """

    def __init__(self, source: PagedSource | PackedSource | DenseSource, geometry: Geometry,
                 softmax: Softmax, dtype: DType, result: Operand, shape: Shape,
                 wanted: Dim = 1):
        self.wanted = wanted
        self.source, self.geometry, self.softmax = source, geometry, softmax
        self.dtype, self.result, self.shape = dtype, result, shape
        self.threads = shape.threads
        self.query_bytes = shape.rows * row_bytes(geometry.size)
        self.key_bytes = shape.keys * row_bytes(geometry.size)
        self.stage_bytes = self.key_bytes + shape.keys * row_bytes(geometry.value_size)
        self.bounds_at = self.query_bytes + 2 * self.stage_bytes  # i32 [rows][first, last + 1]
        self.tile_at = self.bounds_at + 8 * shape.rows  # i32 [4]: the tile, for the end
        self.shared_bytes = self.tile_at + 16

    def blocks(self) -> Dim:
        return self.source.tile_bound(self.shape.rows) * self.geometry.kv_heads * self.wanted

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        tiles = frame.dim(self.source.tile_bound(self.shape.rows))
        heads = i64(self.geometry.kv_heads)
        number = e.b.sub(e.b.sub(tiles, i64(1)), e.b.udiv(e.block, heads))
        head = e.b.urem(e.block, heads)
        tile = self.source.tile(e, frame, number, head, self.shape.rows)
        with e.b.if_then(tile.exists):
            _Block(self, e, frame, tile).emit()


class _Block:
    """Emits the work of one block."""

    def __init__(self, kernel: PrefillKernel, e: DeviceEmitter, frame: DeviceFrame, tile: Tile):
        self.kernel, self.e, self.frame, self.tile = kernel, e, frame, tile
        self.shape, self.geometry = kernel.shape, kernel.geometry
        self.lane = Lane.of(e)
        self.warp = e.b.lshr(thread_index(e), i32(5))
        self.shared = shared_address(e)
        self.stages = e.b.add(self.shared, i32(kernel.query_bytes))
        rows = i32(self.shape.bands * BAND)
        self.first_row = e.b.mul(self.warp, rows)  # the warp's, in the tile
        base = e.b.add(self.shared, e.b.mul(self.first_row, i32(row_bytes(self.geometry.size))))
        self.query_address = self.lane.left_address(e, base, self.geometry.size)

    def emit(self) -> None:
        e, shape, geometry = self.e, self.shape, self.geometry
        low, high = self._block_range()
        self._warp_bounds()
        start = e.b.sub(low, e.b.urem(low, i32(shape.keys)))
        loader = (_PageLoader if isinstance(self.kernel.source, PagedSource) else _RowLoader)(
            self, low, high)
        self._load_queries()
        self._put_tile_aside()
        pages = loader.pages(start)
        loader.copy(start, pages, i32(0))
        commit_copies(e)
        pages = loader.pages(e.b.add(start, i32(shape.keys)))
        queries = None
        if shape.queries_in_registers:
            wait_copies(e, 0)
            barrier(e)
            queries = self._query_fragments()
        state = [*RowState.start(shape.bands).flat(),
                 *zero_sums(shape.bands, geometry.value_size)]
        with short_loop(e, start, high, shape.keys, [i32(0), *pages, *state]) as (
                key, carried, results):
            stage, pages = carried[0], carried[1:1 + len(pages)]
            wait_copies(e, 0)
            barrier(e)
            other = e.b.sub(i32(self.kernel.stage_bytes), stage)
            following = e.b.add(key, i32(shape.keys))
            with e.b.if_then(e.b.icmp_signed("<", following, high)):
                loader.copy(following, pages, other)
                commit_copies(e)
            pages = loader.pages(e.b.add(following, i32(shape.keys)))
            state = carried[1 + len(pages):]
            for part in range(0, shape.keys, shape.part):
                state = self._step(e.b.add(key, i32(part)), stage, part, state, queries)
            results += [other, *pages, *state]
        rows, sums = self._split(results[1 + len(pages):])
        sums = scale_rows(e, sums, inverse_totals(e, rows))
        store_rows(e, self.frame, self.kernel.source, self.kernel.result, self._tile_again(),
                   self.lane, self.first_row, sums)

    def _put_tile_aside(self) -> None:
        """What only the end needs leaves the registers, all of which the steps need."""
        e, tile = self.e, self.tile
        place = e.offset(shared_memory(e), self.kernel.tile_at)
        for index, value in enumerate((tile.sequence, tile.start, tile.first, tile.rows)):
            e.store(e.b.trunc(value, I32), e.offset(place, 4 * index))

    def _tile_again(self) -> Tile:
        e = self.e
        place = e.offset(shared_memory(e), self.kernel.tile_at)
        sequence, start, first, rows = (
            e.b.zext(e.load(e.offset(place, 4 * index), I32), I64) for index in range(4))
        return Tile(self.tile.exists, sequence, self.tile.head, start, first, rows)

    # ---- what is visible -----------------------------------------------------------------------

    def _row_bounds(self, row: ir.Value) -> tuple:
        e = self.e
        bounds = self.kernel.source.visible(e, self.frame, self.tile,
                                            self.tile.row(e, e.b.zext(row, I64)))
        return tuple(e.b.trunc(bound, I32) for bound in bounds)

    def _block_range(self) -> tuple:
        """(first, last + 1) of the keys that any row sees: each warp looks at all rows."""
        e = self.e
        lows, highs = [], []
        for start in range(0, self.shape.rows, WARP):
            low, high = self._row_bounds(e.b.add(self.lane.number, i32(start)))
            lows.append(low)
            highs.append(high)
        low, high = lows[0], highs[0]
        for another_low, another_high in zip(lows[1:], highs[1:], strict=True):
            low, high = smaller(e, low, another_low), larger(e, high, another_high)
        low, high = over_lanes(e, low, smaller), over_lanes(e, high, larger)
        return low, high

    def _warp_bounds(self) -> None:
        """Each row's bounds into shared memory, and which keys all rows of the warp see."""
        e = self.e
        within = e.b.and_(self.lane.number, i32(min(WARP, self.shape.bands * BAND) - 1))
        row = e.b.add(self.first_row, within)
        low, high = self._row_bounds(row)
        place = self._bounds_of(row)
        e.store(low, place)
        e.store(high, e.offset(place, 4))
        self.all_from = over_lanes(e, low, larger) if self.geometry.window else None
        self.all_until = over_lanes(e, high, smaller)

    def _bounds_of(self, row: ir.Value) -> ir.Value:
        e = self.e
        place = e.b.add(i32(self.kernel.bounds_at), e.b.shl(row, i32(3)))
        return e.offset(shared_memory(e), e.b.zext(place, I64))

    def _own_row(self, band: int, half: int) -> ir.Value:
        """The tile's row that a lane holds as half `half` of a band."""
        e = self.e
        return e.b.add(e.b.add(self.first_row, self.lane.row), i32(band * BAND + 8 * half))

    # ---- queries -------------------------------------------------------------------------------

    def _load_queries(self) -> None:
        e, operand, size = self.e, self.kernel.source.query, self.geometry.size
        chunks = size // 8
        for turn in range(self.shape.rows * chunks // self.shape.threads):
            index = e.b.add(thread_index(e), i32(turn * self.shape.threads))
            row, chunk = e.b.udiv(index, i32(chunks)), e.b.urem(index, i32(chunks))
            place = self.kernel.source.place(e, self.tile, self.tile.row(e, e.b.zext(row, I64)))
            offset = add(e, operand.offset(e, self.frame, *place),
                         e.b.zext(e.b.shl(chunk, i32(3)), I64))
            source = e.offset(self.frame.pointer(operand.buffer), multiply(e, offset, 2))
            target = e.b.add(e.b.mul(row, i32(row_bytes(size))), e.b.shl(chunk, i32(4)))
            copy_async(e, e.b.add(self.shared, target), 0, source)

    def _query(self, step: int, band: int) -> list[ir.Value]:
        offset = band * BAND * row_bytes(self.geometry.size) + 2 * BAND * step
        return load_matrices(self.e, self.query_address, offset)

    def _query_fragments(self) -> list[list[list[ir.Value]]]:
        return [[self._query(step, band) for band in range(self.shape.bands)]
                for step in range(self.geometry.size // BAND)]

    # ---- a step ----------------------------------------------------------------------------------

    def _split(self, values: list[ir.Value]) -> tuple:
        rows = 4 * self.shape.bands
        return RowState.of_flat(values[:rows]), unflatten(values[rows:], self.shape.bands)

    def _step(self, key: ir.Value, stage: ir.Value, part: int, carried: list[ir.Value], queries
              ) -> list[ir.Value]:
        """A part of a stage of keys: scores, weights, and their values added."""
        e, kernel, shape, geometry = self.e, self.kernel, self.shape, self.geometry
        rows, sums = self._split(carried)
        base = e.b.add(self.stages, stage)
        keys = self.lane.key_address(
            e, e.b.add(base, i32(part * row_bytes(geometry.size))), geometry.size)
        values = self.lane.value_address(
            e, e.b.add(base, i32(kernel.key_bytes + part * row_bytes(geometry.value_size))),
            geometry.value_size)

        def query(step: int, band: int) -> list[ir.Value]:
            return queries[step][band] if queries else self._query(step, band)

        scores = score_tiles(e, kernel.dtype, query, keys, shape.bands, shape.part, geometry.size)
        scores = self._masked(kernel.softmax.scores(e, scores), key)
        rows, factors = weigh(e, kernel.softmax, scores, rows)
        sums = add_values(e, kernel.dtype, scores, values, scale_rows(e, sums, factors),
                          geometry.value_size)
        return [*rows.flat(), *flatten(sums)]

    def _masked(self, scores, key: ir.Value):
        """Hides what rows must not see, if there is anything: most blocks skip this."""
        e = self.e
        edge = e.b.icmp_signed(">", e.b.add(key, i32(self.shape.part)), self.all_until)
        if self.all_from is not None:
            edge = e.b.or_(edge, e.b.icmp_signed("<", key, self.all_from))

        def masked(tiles) -> None:
            own = e.b.add(key, self.lane.column)
            for index in range(2 * self.shape.bands):
                place = self._bounds_of(self._own_row(index // 2, index % 2))
                high = e.load(e.offset(place, 4), I32)
                first = e.b.sub(e.load(place, I32), own) if self.geometry.window else None
                hide(e, tiles[index // 2], index % 2, first, e.b.sub(high, own))

        return merge_if(e, edge, scores, masked)


class _Loader:
    """Copies of 16 bytes by which a block brings keys and values into a stage of shared memory."""

    def __init__(self, block: _Block, low: ir.Value, high: ir.Value):
        self.block, self.low, self.high = block, low, high
        self.e, self.frame, self.kernel = block.e, block.frame, block.kernel

    def pages(self, key: ir.Value) -> list[ir.Value]:
        """Numbers of the pages of a block of keys, loaded a step before they are needed."""
        return []

    def copy(self, key: ir.Value, pages: list[ir.Value], stage: ir.Value) -> None:
        """Starts all copies of a block of keys."""
        e, kernel = self.e, self.kernel
        geometry = kernel.geometry
        base = e.b.add(self.block.stages, stage)
        self._copy(key, pages, base, geometry.size, of_values=False)
        self._copy(key, pages, e.b.add(base, i32(kernel.key_bytes)), geometry.value_size,
                   of_values=True)

    def _copy(self, key, pages, base: ir.Value, size: int, of_values: bool) -> None:
        e, shape = self.e, self.kernel.shape
        chunks = size // 8
        thread = thread_index(e)
        each = shape.threads // chunks  # rows of a turn
        row, chunk = e.b.udiv(thread, i32(chunks)), e.b.urem(thread, i32(chunks))
        target = e.b.add(base, e.b.add(e.b.mul(row, i32(row_bytes(size))), e.b.shl(chunk, i32(4))))
        sources = self.sources(key, pages, of_values)
        for turn in range(-(-shape.keys // each)):
            number = e.b.add(row, i32(turn * each))
            exists = None
            if each * chunks < shape.threads or (turn + 1) * each > shape.keys:
                exists = e.b.and_(e.b.icmp_unsigned("<", row, i32(each)),
                                  e.b.icmp_unsigned("<", number, i32(shape.keys)))
            wanted = self._wanted(key, number) if of_values else None
            source, at = sources(row, chunk, turn * each, each)
            copy_async(e, target, turn * each * row_bytes(size), source, wanted, exists, at)

    def _wanted(self, key: ir.Value, number: ir.Value) -> ir.Value:
        """Whether any row sees a key: what lies elsewhere may be NaN, and 0 * NaN is NaN."""
        e = self.e
        place = e.b.add(key, number)
        return e.b.and_(e.b.icmp_signed(">=", place, self.low),
                        e.b.icmp_signed("<", place, self.high))

    def sources(self, key, pages, of_values: bool):
        """source(row, chunk, start, each): (address, bytes after it) of 16 bytes of row + start;
        a turn brings `each` rows."""
        raise NotImplementedError


class _PageLoader(_Loader):
    def _source(self) -> PagedSource:
        assert isinstance(self.kernel.source, PagedSource)
        return self.kernel.source

    def pages(self, key: ir.Value) -> list[ir.Value]:
        e, source = self.e, self._source()
        last = e.b.lshr(larger(e, e.b.sub(self.high, i32(1)), i32(0)), i32(5))
        first = e.b.lshr(key, i32(5))
        numbers = [smaller(e, e.b.add(first, i32(i)), last)
                   for i in range(self.kernel.shape.keys // PAGE)]
        sequence = self.block.tile.sequence
        return [e.b.trunc(source.page(e, self.frame, sequence, e.b.zext(number, I64)), I32)
                for number in numbers]

    def sources(self, key, pages, of_values: bool):
        e, source, head = self.e, self._source(), self.block.tile.head
        bases = [source.page_address(e, self.frame, e.b.sext(page, I64), head, of_values)
                 for page in pages]
        geometry = self.kernel.geometry
        row_size = 2 * (geometry.value_size if of_values else geometry.size)

        def place(row, chunk) -> ir.Value:
            return e.b.zext(e.b.add(e.b.mul(row, i32(row_size)), e.b.shl(chunk, i32(4))), I64)

        def address(row, chunk, start: int, each: int) -> tuple[ir.Value, int]:
            if PAGE % each == 0:
                return e.offset(bases[start // PAGE], place(row, chunk)), start % PAGE * row_size
            number = e.b.add(row, i32(start))
            base = bases[0]
            for index, another in enumerate(bases[1:], 1):
                beyond = e.b.icmp_unsigned(">=", number, i32(index * PAGE))
                base = e.b.select(beyond, another, base)
            return e.offset(base, place(e.b.and_(number, i32(PAGE - 1)), chunk)), 0

        return address


class _RowLoader(_Loader):
    def sources(self, key, pages, of_values: bool):
        e, last = self.e, self.e.b.sub(self.high, i32(1))

        def address(row, chunk, start: int, each: int) -> tuple[ir.Value, int]:
            number = e.b.add(key, e.b.add(row, i32(start)))
            within = e.b.sext(smaller(e, larger(e, number, self.low), last), I64)
            base = self.kernel.source.key_row(e, self.frame, self.block.tile, of_values, within)
            return e.offset(base, e.b.zext(e.b.shl(chunk, i32(4)), I64)), 0

        return address
