"""Where attention's queries and keys come from: pages, packed sequences or dense batches.

A source answers, for the kernel in attention.py: which blocks of queries there are, where a query
lies, which keys it sees, and how a block of keys and values comes into place: for a single query
those of a page, where they lie, else KEYS of them in scratch, as f32 or as pairs of bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.elements import memory_type
from llmc.codegen.host.attention_blocks import (
    Matrix,
    Pairs,
    add,
    copy_row,
    for_each_chunk,
    lane_numbers,
    load_float,
    multiply,
    pairs_of,
    transpose,
)
from llmc.codegen.host.attention_queries import Batch, Block, Operand, Packing
from llmc.codegen.host.kernel import Frame, operand_buffers
from llmc.codegen.llvm import F32, I16, I32, Emitter, i64, splat_constant, vector
from llmc.ir.dtypes import DType, bf16, f32, i8
from llmc.ir.graph import Node
from llmc.ir.layouts import KeyPages, ValuePages
from llmc.ir.ops import PAGE
from llmc.ir.program import Buffer, Program, Stage, unsupported

KEYS = 4 * PAGE  # of a block
ROWS = 96  # of a tile's scores: a block of keys is brought into place for all of them


@dataclass(frozen=True)
class Geometry:
    """Sizes of one attention, and of its blocks. A tile handles `rows` rows of scores: its queries
    in all heads that share a kv head, so that keys are read once for them."""

    heads: int
    kv_heads: int
    size: int
    value_size: int
    lanes: int
    window: int
    causal: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def query_block(self) -> int:
        unit = 12 // math.gcd(self.group, 12)  # whole blocks of the products
        return max(unit, ROWS // self.group // unit * unit)

    @property
    def rows(self) -> int:
        return self.query_block * self.group

    @property
    def padded(self) -> int:
        """The size of a value rounded up to whole vectors."""
        return -(-self.value_size // self.lanes) * self.lanes

    def visible(self, e: Emitter, position: ir.Value, count: ir.Value) -> tuple:
        """(first, last + 1) of the keys, of `count`, that a query at a position sees."""
        low, high = i64(0), count
        if self.window:
            low = e.maximum(e.b.sub(position, i64(self.window - 1)), low)
        if self.causal or self.window:
            reach = 1 if self.causal else self.window
            high = e.maximum(e.minimum(e.b.add(position, i64(reach)), count), i64(0))
        return low, high


@dataclass(frozen=True)
class KeyBlock:
    """Up to KEYS keys (of a single query PAGE) from `start` on, the first of a page; those in
    low..high (relative to start) are needed.

    next: where the block after this one starts (start itself if this is the last).
    """

    start: ir.Value
    next: ir.Value
    low: ir.Value
    high: ir.Value


class PagedSource:
    """paged_attention: keys [size][PAGE] and values [PAGE][size] of a kv head in each page."""

    def __init__(self, stage: Stage, program: Program, node: Node, geometry: Geometry):
        query, key, value, table, _, positions, offsets, *scales = node.inputs
        self.geometry = geometry
        self.query = Operand.of(stage, program, query)
        self.page_table = Operand.of(stage, program, table)
        self.positions = Operand.of(stage, program, positions)
        self.packing: Packing | Batch = Packing(
            Operand.of(stage, program, offsets), query.shape[0], geometry.query_block)
        buffers = operand_buffers(stage, program)
        if key.op != "input" or value.op != "input":
            raise unsupported(stage, "caches must be operands as they are")
        self.key, self.value = buffers[key["name"]], buffers[value["name"]]
        if self.key.layout != KeyPages() or self.value.layout != ValuePages():
            raise unsupported(stage, "caches must lie in KeyPages and ValuePages")
        self.scale_buffers = [buffers[each["name"]] for each in scales]
        if any(buffer.layout != KeyPages() for buffer in self.scale_buffers):
            raise unsupported(stage, "the scales of caches must lie in KeyPages")

    @property
    def has_pairs(self) -> bool:
        """Whether queries and keys are bf16, or codes that bf16 holds exactly."""
        return self.query.dtype is bf16 and self.query.view.strides[-1] == 1 and all(
            buffer.type.dtype in (bf16, i8) for buffer in (self.key, self.value))

    def scales(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock) -> list[Matrix]:
        """What the scores, and the weights, of a page's keys are multiplied by, a row each; empty
        where caches hold floats. Those of keys that are not needed may be anything."""
        return [Matrix(self._page(e, frame, buffer, block, keys.start), buffer.type.dtype, PAGE)
                for buffer in self.scale_buffers]

    def copy_scales(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock,
                    scratch: Sequence[ir.Value]) -> list[Matrix]:
        """The same of a block of keys, as f32 in scratch; behind the last needed key zeros."""
        lanes, copies = self.geometry.lanes, []
        end = e.splat(e.b.trunc(keys.high, I32), lanes)
        for buffer, target in zip(self.scale_buffers, scratch, strict=False):
            copies.append(Matrix(target, f32, KEYS))
            for source, first in self._pages(e, frame, buffer, block, keys, PAGE):
                for column in range(0, PAGE, lanes):
                    scale = source.load(e, 0, column, lanes)
                    needed = e.b.icmp_signed("<", lane_numbers(lanes, first + column), end)
                    scale = e.b.select(needed, scale, splat_constant(scale.type, 0.0))
                    copies[-1].store(e, scale, 0, first + column)
        return copies

    def visible(self, e: Emitter, frame: Frame, block: Block, query) -> tuple:
        """(first, last + 1) of the keys that a query sees; query counts from the block's first."""
        position = self.positions.index(e, frame, e.b.add(block.first, query))
        end = e.b.add(position, i64(1))
        return self.geometry.visible(e, position, end)

    def _page(self, e: Emitter, frame: Frame, buffer: Buffer, block: Block, start) -> ir.Value:
        """Where the page that holds key `start` keeps the block's kv head."""
        number = e.b.udiv(start, i64(PAGE))
        page = self.page_table.index(e, frame, block.sequence, number)
        head = e.b.add(e.b.mul(page, i64(self.geometry.kv_heads)), block.head)
        size = buffer.type.shape[3]
        assert isinstance(size, int)
        place = e.b.mul(head, i64(size * PAGE))
        return e.offset(frame.pointer(buffer), place, memory_type(buffer.type.dtype))

    def _in_place(self, e: Emitter, frame: Frame, buffer: Buffer, block: Block, keys: KeyBlock,
                  stride: int) -> Matrix:
        """The block's part of a cache; a single query, bound by reading, fetches ahead."""
        ahead = self._page(e, frame, buffer, block, keys.next)
        return Matrix(self._page(e, frame, buffer, block, keys.start), buffer.type.dtype, stride,
                      ahead)

    def keys_in_place(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock) -> Matrix:
        """The keys of a page, [size][PAGE]."""
        return self._in_place(e, frame, self.key, block, keys, PAGE)

    def values_in_place(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock,
                        scratch: ir.Value) -> Matrix:
        """The values of a page, [PAGE][padded]; in scratch where they have to be padded."""
        geometry, size = self.geometry, self.geometry.value_size
        source = self._in_place(e, frame, self.value, block, keys, size)
        if geometry.padded == size:
            return source
        with e.loop(keys.low, keys.high) as token:
            row = e.b.mul(token, i64(size))
            target = e.offset(scratch, e.b.mul(token, i64(geometry.padded)), F32)
            copy_row(e, source.pointer, row, 1, source.dtype, target, size, geometry.lanes)
        return Matrix(scratch, f32, geometry.padded)

    def _pages(self, e: Emitter, frame: Frame, buffer: Buffer, block: Block, keys: KeyBlock,
               stride: int) -> Iterator[tuple[Matrix, int]]:
        """The parts of a cache with needed keys, and the number of their first key: the caller
        emits what is done with each."""
        for first in range(0, KEYS, PAGE):
            with e.b.if_then(e.b.icmp_signed("<", i64(first), keys.high)):
                page = self._page(e, frame, buffer, block, e.b.add(keys.start, i64(first)))
                yield Matrix(page, buffer.type.dtype, stride), first

    def keys(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock,
             target: Matrix | Pairs) -> None:
        """Keys of a block as [size][KEYS], or pairs of components."""
        lanes, size = self.geometry.lanes, self.geometry.size
        for source, first in self._pages(e, frame, self.key, block, keys, PAGE):
            with e.loop(0, size // 2 if isinstance(target, Pairs) else size) as row:
                for column in range(0, PAGE, lanes):
                    if isinstance(target, Pairs):
                        even = e.b.mul(row, i64(2))
                        value = pairs_of(e, source.load(e, even, column, lanes),
                                         source.load(e, e.b.add(even, i64(1)), column, lanes))
                    else:
                        value = source.load(e, row, column, lanes)
                    target.store(e, value, row, first + column)

    def value_rows(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock
                   ) -> Callable[[ir.Value], tuple]:
        """token of a block -> (pointer, elements from there to its value)."""
        size = self.geometry.value_size

        def place(token: ir.Value) -> tuple:
            page = self._page(e, frame, self.value, block, e.b.add(keys.start, token))
            return page, e.b.mul(e.b.urem(token, i64(PAGE)), i64(size))

        return place

    def values(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock, scratch: ir.Value,
               pairs: bool) -> Matrix | Pairs:
        """Values of a block as [KEYS][padded] in scratch, or pairs of tokens."""
        place = self.value_rows(e, frame, block, keys)
        return copy_values(e, self.geometry, keys, self.value.type.dtype, place, 1, scratch, pairs)


def copy_values(e: Emitter, geometry: Geometry, keys: KeyBlock, dtype: DType,
                place: Callable[[ir.Value], tuple], stride, scratch: ir.Value,
                pairs: bool) -> Matrix | Pairs:
    """The needed values in scratch: as f32, or as pairs of tokens, zeros beside the first and last
    where these have no other half. place(token): (pointer, offset of its elements)."""
    padded, lanes = geometry.padded, geometry.lanes
    if not pairs:
        with e.loop(keys.low, keys.high) as token:
            pointer, offset = place(token)
            target = e.offset(scratch, e.b.mul(token, i64(padded)), F32)
            copy_row(e, pointer, offset, stride, dtype, target, geometry.value_size, lanes)
        return Matrix(scratch, f32, padded)
    matrix = Pairs(scratch, padded)
    last = e.b.sub(keys.high, i64(1))
    with e.loop(e.b.lshr(keys.low, i64(1)), e.b.lshr(e.b.add(keys.high, i64(1)), i64(1))) as pair:
        first = e.b.shl(pair, i64(1))
        tokens = (first, e.b.add(first, i64(1)))
        known = [e.minimum(e.maximum(token, keys.low), last) for token in tokens]
        needed = [e.b.icmp_signed("==", *both) for both in zip(tokens, known, strict=True)]
        places = [place(token) for token in known]

        def join(column: int, width: int) -> None:
            values = []
            for (pointer, offset), exists in zip(places, needed, strict=True):
                value = load_float(e, pointer, add(e, offset, column), dtype, width)
                values.append(e.b.select(exists, value, splat_constant(value.type, 0.0)))
            matrix.store(e, pairs_of(e, *values), pair, column)

        for_each_chunk(geometry.value_size, lanes, join)
    return matrix


class _RowSource:
    """Keys and values in rows [..., size] that strides reach: transposed or used in place."""

    geometry: Geometry
    query: Operand
    key: Operand
    value: Operand
    axis: int  # of the operands, along which keys are counted

    @property
    def has_pairs(self) -> bool:
        """Whether queries, keys and values are bf16, each with its components side by side."""
        return all(each.dtype is bf16 and each.view.strides[-1] == 1
                   for each in (self.query, self.key, self.value))

    def copy_scales(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock,
                    scratch: Sequence[ir.Value]) -> list[Matrix]:
        """None: keys and values are floats."""
        return []

    def row(self, e: Emitter, frame: Frame, operand: Operand, block: Block, key):
        """Elements from the operand's base to a key's row for the block's kv head."""
        raise NotImplementedError

    def keys(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock,
             target: Matrix | Pairs) -> None:
        """Keys transposed to [size][KEYS], or pairs of components; only those in
        keys.low..high are read."""
        lanes = self.geometry.lanes
        first = e.b.sub(keys.low, e.b.urem(keys.low, i64(lanes)))
        whole = e.b.sub(keys.high, e.b.urem(keys.high, i64(lanes)))
        with e.loop(first, whole, lanes) as token:
            self._transpose_lanes(e, frame, block, keys, token, target)
        with e.loop(e.maximum(whole, first), keys.high) as token:
            self._transpose_one(e, frame, block, keys, token, target, 0)

    def _words(self, target: Matrix | Pairs) -> int:
        """Rows of a block of keys."""
        return self.geometry.size // 2 if isinstance(target, Pairs) else self.geometry.size

    def _transpose_lanes(self, e, frame, block, keys, token, target: Matrix | Pairs) -> None:
        lanes, words = self.geometry.lanes, self._words(target)
        whole = words // lanes * lanes if self.key.view.strides[-1] == 1 else 0
        rows = [self.row(e, frame, self.key, block,
                         e.b.add(keys.start, e.b.add(token, i64(i)))) for i in range(lanes)]
        with e.loop(0, whole, lanes) as word:
            vectors = [self._load(e, frame, row, word, target, lanes) for row in rows]
            for i, value in enumerate(transpose(e, vectors)):
                target.store(e, value, e.b.add(word, i64(i)), token)
        if whole < words:
            with e.loop(0, lanes) as i:
                self._transpose_one(e, frame, block, keys, e.b.add(token, i), target, whole)

    def _transpose_one(self, e, frame, block, keys, token, target: Matrix | Pairs,
                       start: int) -> None:
        row = self.row(e, frame, self.key, block, e.b.add(keys.start, token))
        with e.loop(start, self._words(target)) as word:
            target.store(e, self._load(e, frame, row, word, target, 1), word, token)

    def _load(self, e, frame, row, word, target: Matrix | Pairs, lanes: int) -> ir.Value:
        """Components of a key from a row of the target on: f32, or two in a word."""
        pointer = frame.pointer(self.key.buffer)
        if isinstance(target, Pairs):
            place = e.offset(pointer, add(e, row, multiply(e, word, 2)), I16)
            return e.load(place, vector(I32, lanes), 2)
        place = add(e, row, multiply(e, word, self.key.stride(frame, -1)))
        return load_float(e, pointer, place, self.key.dtype, lanes)

    def values(self, e: Emitter, frame: Frame, block: Block, keys: KeyBlock, scratch: ir.Value,
               pairs: bool) -> Matrix | Pairs:
        """Values of a block as [KEYS][padded] in scratch, or pairs of tokens. Never in place: rows
        of all heads lie so far apart that a block of them would share few sets of a cache."""
        pointer, step = frame.pointer(self.value.buffer), self.value.stride(frame, -1)

        def place(token: ir.Value) -> tuple:
            return pointer, self.row(e, frame, self.value, block, e.b.add(keys.start, token))

        return copy_values(e, self.geometry, keys, self.value.dtype, place, step, scratch, pairs)


class PackedSource(_RowSource):
    """packed_attention: sequences one after the other on the axis of tokens."""

    axis = 0

    def __init__(self, stage: Stage, program: Program, node: Node, geometry: Geometry):
        self.geometry = geometry
        self.query, self.key, self.value, self.offsets, *rest = (
            Operand.of(stage, program, value) for value in node.inputs)
        self.lengths = rest[0] if rest else None
        self.packing: Packing | Batch = Packing(
            self.offsets, node.inputs[0].shape[0], geometry.query_block)

    def row(self, e, frame, operand, block, key):
        start = self.offsets.index(e, frame, block.sequence)
        return operand.offset(e, frame, e.b.add(start, key), block.head)

    def visible(self, e: Emitter, frame: Frame, block: Block, query) -> tuple:
        start = self.offsets.index(e, frame, block.sequence)
        end = self.offsets.index(e, frame, e.b.add(block.sequence, i64(1)))
        position = e.b.sub(e.b.add(block.first, query), start)
        count = e.b.sub(end, start)
        if self.lengths is not None:
            count = self.lengths.index(e, frame, block.sequence)
        return self.geometry.visible(e, position, count)


class DenseSource(_RowSource):
    """attention: [batch, heads, queries, size] against [batch, kv_heads, keys, size]."""

    axis = 2

    def __init__(self, stage: Stage, program: Program, node: Node, geometry: Geometry):
        self.geometry = geometry
        self.query, self.key, self.value = (
            Operand.of(stage, program, value) for value in node.inputs[:3])
        self.queries, self.key_count = node.inputs[0].shape[2], node.inputs[1].shape[2]
        self.packing: Packing | Batch = Batch(
            node.inputs[0].shape[0], self.queries, geometry.query_block)

    def row(self, e, frame, operand, block, key):
        return operand.offset(e, frame, block.sequence, block.head, key)

    def visible(self, e: Emitter, frame: Frame, block: Block, query) -> tuple:
        count = frame.dim(self.key_count)
        position = e.b.add(block.first, query)
        ahead = e.b.sub(count, frame.dim(self.queries))
        return self.geometry.visible(e, e.b.add(position, ahead), count)


Source = PagedSource | PackedSource | DenseSource


def make_source(stage: Stage, program: Program, node: Node, geometry: Geometry) -> Source:
    """The source of an attention node."""
    match node.op:
        case "paged_attention":
            return PagedSource(stage, program, node, geometry)
        case "packed_attention":
            return PackedSource(stage, program, node, geometry)
    return DenseSource(stage, program, node, geometry)
