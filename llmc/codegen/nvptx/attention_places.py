"""Where attention's rows and keys lie on a GPU: pages, packed sequences or dense batches.

A row is one query in one head. The rows of a sequence and a kv head are numbered query by query,
the heads that share the kv head side by side, so that keys are read once for all of them, whatever
their number. A tile is a run of rows of one sequence and kv head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import llvmlite.ir as ir

from llmc.codegen.host.attention_blocks import multiply
from llmc.codegen.host.attention_queries import Operand
from llmc.codegen.host.kernel import Frame, operand_buffers
from llmc.codegen.llvm import I32, I64, Emitter, i64
from llmc.codegen.nvptx.attention_instructions import WARP, count_lanes, thread_index
from llmc.ir.dims import Dim, ceildiv, maximum, minimum
from llmc.ir.graph import Node
from llmc.ir.layouts import ValuePages
from llmc.ir.ops import PAGE
from llmc.ir.program import Buffer, Program, Stage, unsupported


@dataclass(frozen=True)
class Geometry:
    """Sizes of one attention, and which keys a query sees by its position."""

    heads: int
    kv_heads: int
    size: int
    value_size: int
    window: int
    causal: bool

    @property
    def group(self) -> int:
        """Heads that share a kv head."""
        return self.heads // self.kv_heads

    def visible(self, e: Emitter, position: ir.Value, count: ir.Value) -> tuple:
        """(first, last + 1) of the keys, of `count`, that a query at a position sees; i64."""
        low, high = i64(0), count
        if self.window:
            low = e.maximum(e.b.sub(position, i64(self.window - 1)), low)
        if self.causal or self.window:
            reach = 1 if self.causal else self.window
            high = e.maximum(e.minimum(e.b.add(position, i64(reach)), count), i64(0))
        return low, high


def geometry_of(stage: Stage, node: Node) -> Geometry:
    """The geometry of an attention node; CompileError where a kernel needs constants."""
    query, key, value = node.inputs[:3]
    heads, size, value_size = query.shape[1], query.shape[-1], value.shape[-1]
    kv_heads = key.shape[2 if node.op == "paged_attention" else 1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int)
            and isinstance(value_size, int)):
        raise unsupported(stage, "the number of heads and their size must be constants")
    for tensor in (query, key, value):
        if tensor.dtype.bits > 32:
            raise unsupported(stage, f"attention sums in f32: no {tensor.dtype} operands")
    causal = node.op == "paged_attention" or node["causal"]
    return Geometry(heads, kv_heads, size, value_size, node["window"], causal)


@dataclass(frozen=True)
class Tile:
    """A run of rows of one sequence and kv head; i64 values."""

    exists: ir.Value  # i1: whether there is anything to do
    sequence: ir.Value
    head: ir.Value  # of the keys
    start: ir.Value  # the sequence's first query on the axis of queries
    first: ir.Value  # the tile's first row
    rows: ir.Value  # of the sequence: first + i may reach beyond

    def row(self, e: Emitter, index: ir.Value) -> ir.Value:
        """Number of the tile's row; the last one again beyond the end, so that it can be read."""
        return e.minimum(e.b.add(self.first, index), e.b.sub(self.rows, i64(1)))


class Source(Protocol):
    """Queries and keys of one kind of attention."""

    geometry: Geometry
    query: Operand

    def tile_bound(self, height: int) -> Dim:
        """Upper bound of tiles of `height` rows for one kv head."""
        ...

    def tile(self, e: Emitter, frame: Frame, number: ir.Value, head: ir.Value, height: int) -> Tile:
        """A tile by its number; all lanes of a warp must ask."""
        ...

    def place(self, e: Emitter, tile: Tile, row: ir.Value) -> tuple:
        """Index of a row's query in the query operand, and of its result."""
        ...

    def visible(self, e: Emitter, frame: Frame, tile: Tile, row: ir.Value) -> tuple:
        """(first, last + 1) of the keys that a row sees."""
        ...

    def key_row(self, e: Emitter, frame: Frame, tile: Tile, of_values: bool, key) -> ir.Value:
        """Address of a key's (or value's) row of components."""
        ...

    def component_stride(self, frame: Frame, of_values: bool):
        """Elements from one component of a row to the next."""
        ...


def _member(e: Emitter, geometry: Geometry, tile: Tile, row: ir.Value) -> tuple:
    """(query of the sequence, head of the queries) of a row."""
    group = i64(geometry.group)
    head = e.b.add(e.b.mul(tile.head, group), e.b.urem(row, group))
    return e.b.udiv(row, group), head


def address(e: Emitter, frame: Frame, operand: Operand, offset) -> ir.Value:
    """Address of an element of an operand."""
    bytes_ = operand.dtype.bits // 8
    return e.offset(frame.pointer(operand.buffer), multiply(e, offset, bytes_))


class PackedRows:
    """Tiles of packed sequences. Tile numbers of sequence s begin at start(s) = floor(rows before
    it / height) + s: no fewer than it has tiles, and found without any table."""

    def __init__(self, geometry: Geometry, offsets: Operand, tokens: Dim, skip_single: bool):
        self.geometry, self.offsets, self.tokens = geometry, offsets, tokens
        self.sequences: Dim = offsets.view.shape[0] - 1
        self.skip_single = skip_single

    def bound(self, height: int) -> Dim:
        tiles = self.tokens * self.geometry.group // height + self.sequences
        return tiles * minimum(1, self.tokens - self.sequences) if self.skip_single else tiles

    def find(self, e: Emitter, frame: Frame, number: ir.Value, head: ir.Value,
             height: int) -> Tile:
        group = i64(self.geometry.group)
        sequence = self._sequence(e, frame, number, height)
        start = self.offsets.index(e, frame, sequence)
        end = self.offsets.index(e, frame, e.b.add(sequence, i64(1)))
        count = e.b.sub(end, start)
        before = e.b.add(e.b.udiv(e.b.mul(start, group), i64(height)), sequence)
        first = e.b.mul(e.b.sub(number, before), i64(height))
        rows = e.b.mul(count, group)
        exists = e.b.and_(e.b.icmp_signed(">=", number, i64(0)),
                          e.b.icmp_signed("<", first, rows))
        if self.skip_single:
            exists = e.b.and_(exists, e.b.icmp_signed(">", count, i64(1)))
        return Tile(exists, sequence, head, start, first, rows)

    def _sequence(self, e: Emitter, frame: Frame, number: ir.Value, height: int) -> ir.Value:
        """The last sequence whose tiles begin at number or before: a warp looks at 32 at a time."""
        sequences = frame.dim(self.sequences)
        lane = e.b.zext(e.b.and_(thread_index(e), ir.Constant(I32, WARP - 1)), I64)
        last = e.b.sub(sequences, i64(1))
        with e.fold(0, sequences, [i64(-1)], WARP, "sequence") as (base, (found,), finish):
            index = e.b.add(base, lane)
            within = e.minimum(index, last)
            rows = e.b.mul(self.offsets.index(e, frame, within), i64(self.geometry.group))
            begin = e.b.add(e.b.udiv(rows, i64(height)), within)
            begun = e.b.and_(e.b.icmp_signed("<=", begin, number),
                             e.b.icmp_signed("<=", index, last))
            finish([e.b.add(found, e.b.zext(count_lanes(e, begun), I64))])
        return e.maximum(finish.results[0], i64(0))


class _PackedQueries:
    """Queries of sequences one after the other on the axis of tokens."""

    geometry: Geometry
    packing: PackedRows

    def tile_bound(self, height: int) -> Dim:
        return self.packing.bound(height)

    def tile(self, e: Emitter, frame: Frame, number: ir.Value, head: ir.Value, height: int) -> Tile:
        return self.packing.find(e, frame, number, head, height)

    def place(self, e: Emitter, tile: Tile, row: ir.Value) -> tuple:
        query, head = _member(e, self.geometry, tile, row)
        return e.b.add(tile.start, query), head


class PagedSource(_PackedQueries):
    """paged_attention: both caches as [page][kv head][PAGE][size]."""

    def __init__(self, stage: Stage, program: Program, node: Node, geometry: Geometry,
                 skip_single: bool = False):
        query, key, value, table, sequence, positions, offsets = node.inputs
        self.geometry = geometry
        self.query = Operand.of(stage, program, query)
        self.page_table = Operand.of(stage, program, table)
        self.sequence = Operand.of(stage, program, sequence)
        self.positions = Operand.of(stage, program, positions)
        self.offsets = Operand.of(stage, program, offsets)
        self.table_width: Dim = table.shape[1]
        self.tokens: Dim = query.shape[0]
        self.packing = PackedRows(geometry, self.offsets, self.tokens, skip_single)
        buffers = operand_buffers(stage, program)
        if key.op != "input" or value.op != "input":
            raise unsupported(stage, "caches must be operands as they are")
        self.key, self.value = buffers[key["name"]], buffers[value["name"]]
        if self.key.layout != ValuePages() or self.value.layout != ValuePages():
            raise unsupported(stage, "caches must lie in ValuePages")

    def visible(self, e: Emitter, frame: Frame, tile: Tile, row: ir.Value) -> tuple:
        token, _ = self.place(e, tile, row)
        position = self.positions.index(e, frame, token)
        return self.geometry.visible(e, position, e.b.add(position, i64(1)))

    def page(self, e: Emitter, frame: Frame, sequence: ir.Value, number: ir.Value) -> ir.Value:
        """The pool page that holds a sequence's page, i64."""
        return self.page_table.index(e, frame, sequence, number)

    def page_address(self, e: Emitter, frame: Frame, page: ir.Value, head: ir.Value,
                     of_values: bool) -> ir.Value:
        """Address of a kv head's rows in a pool page."""
        buffer = self.cache(of_values)
        place = e.b.add(e.b.mul(page, i64(self.geometry.kv_heads)), head)
        return e.offset(frame.pointer(buffer), e.b.mul(place, i64(PAGE * self._row_bytes(buffer))))

    def cache(self, of_values: bool) -> Buffer:
        return self.value if of_values else self.key

    def _row_bytes(self, buffer: Buffer) -> int:
        size = buffer.type.shape[3]
        assert isinstance(size, int)
        return size * buffer.type.dtype.bits // 8

    def key_row(self, e: Emitter, frame: Frame, tile: Tile, of_values: bool, key) -> ir.Value:
        number = e.b.udiv(key, i64(PAGE))
        page = self.page(e, frame, tile.sequence, number)
        base = self.page_address(e, frame, page, tile.head, of_values)
        row_bytes = self._row_bytes(self.cache(of_values))
        return e.offset(base, e.b.mul(e.b.urem(key, i64(PAGE)), i64(row_bytes)))

    def component_stride(self, frame: Frame, of_values: bool):
        return 1


class _RowSource:
    """Keys and values in rows that strides reach."""

    geometry: Geometry
    query: Operand
    key: Operand
    value: Operand

    def _row(self, e: Emitter, frame: Frame, operand: Operand, tile: Tile, key) -> ir.Value:
        raise NotImplementedError

    def operand(self, of_values: bool) -> Operand:
        return self.value if of_values else self.key

    def key_row(self, e: Emitter, frame: Frame, tile: Tile, of_values: bool, key) -> ir.Value:
        operand = self.operand(of_values)
        return address(e, frame, operand, self._row(e, frame, operand, tile, key))

    def component_stride(self, frame: Frame, of_values: bool):
        return self.operand(of_values).stride(frame, -1)


class PackedSource(_PackedQueries, _RowSource):
    """packed_attention: sequences one after the other on the axis of tokens."""

    def __init__(self, stage: Stage, program: Program, node: Node, geometry: Geometry):
        self.geometry = geometry
        self.query, self.key, self.value, self.offsets, *rest = (
            Operand.of(stage, program, value) for value in node.inputs)
        self.lengths = rest[0] if rest else None
        self.packing = PackedRows(geometry, self.offsets, node.inputs[0].shape[0], False)

    def visible(self, e: Emitter, frame: Frame, tile: Tile, row: ir.Value) -> tuple:
        group = i64(self.geometry.group)
        count = e.b.udiv(tile.rows, group)
        if self.lengths is not None:
            count = self.lengths.index(e, frame, tile.sequence)
        return self.geometry.visible(e, e.b.udiv(row, group), count)

    def _row(self, e, frame, operand, tile, key):
        return operand.offset(e, frame, e.b.add(tile.start, key), tile.head)


class DenseSource(_RowSource):
    """attention: [batch, heads, queries, size] against [batch, kv_heads, keys, size]."""

    def __init__(self, stage: Stage, program: Program, node: Node, geometry: Geometry):
        self.geometry = geometry
        self.query, self.key, self.value = (
            Operand.of(stage, program, value) for value in node.inputs[:3])
        self.batch, self.queries = node.inputs[0].shape[0], node.inputs[0].shape[2]
        self.keys: Dim = node.inputs[1].shape[2]

    def _per_sequence(self, height: int) -> Dim:
        return ceildiv(self.queries * self.geometry.group, height)

    def tile_bound(self, height: int) -> Dim:
        return self.batch * self._per_sequence(height)

    def tile(self, e: Emitter, frame: Frame, number: ir.Value, head: ir.Value, height: int) -> Tile:
        each = frame.dim(self._per_sequence(height))
        rows = frame.dim(self.queries * self.geometry.group)
        first = e.b.mul(e.b.urem(number, each), i64(height))
        return Tile(e.b.icmp_signed("<", first, rows), e.b.udiv(number, each), head, i64(0),
                    first, rows)

    def place(self, e: Emitter, tile: Tile, row: ir.Value) -> tuple:
        query, head = _member(e, self.geometry, tile, row)
        return tile.sequence, head, query

    def visible(self, e: Emitter, frame: Frame, tile: Tile, row: ir.Value) -> tuple:
        query = e.b.udiv(row, i64(self.geometry.group))
        count = frame.dim(self.keys)
        ahead = e.b.sub(count, frame.dim(self.queries))
        return self.geometry.visible(e, e.b.add(query, ahead), count)

    def _row(self, e, frame, operand, tile, key):
        return operand.offset(e, frame, tile.sequence, tile.head, key)


def single_query_sequences(tokens: Dim, sequences: Dim) -> Dim:
    """Upper bound of the sequences to look at for those with a single query; 0 where the shape
    alone tells that there are none (one sequence of several tokens)."""
    return sequences * minimum(1, sequences - 1 + maximum(0, 2 - tokens))
