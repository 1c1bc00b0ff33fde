"""Attention on the host: flash style, so that the matrix of scores is never stored.

A tile is a block of queries of one sequence times one kv head. It takes the keys 32 at a time:
scores (a small matrix product), the new maximum and the weights of each row, and what was summed so
far rescaled while the weighted values are added (another small product). All sums are in f32.

Floors: prefill is bound by its multiply-adds, decode by reading the cache once: all heads
of a group share what is read, and a tile of one query widens cached values in registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import llvmlite.ir as ir

from llmc.codegen import math as codegen_math
from llmc.codegen.host.attention_blocks import (
    LOWEST,
    Matrix,
    Multiplier,
    Rows,
    add,
    copy_row,
    fill,
    for_each_chunk,
    lane_numbers,
    load_float,
    multiply,
    reduce_max,
    store_float,
)
from llmc.codegen.host.attention_sources import (
    Block,
    Geometry,
    KeyBlock,
    Operand,
    PagedSource,
    make_source,
)
from llmc.codegen.host.attention_views import result_view
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.llvm import F32, I32, Emitter, i64, splat_constant, vector
from llmc.codegen.llvm import f32 as float_constant
from llmc.ir.dims import Dim
from llmc.ir.dtypes import bool_, f32
from llmc.ir.graph import Node
from llmc.ir.ops import PAGE
from llmc.ir.program import Program, Stage, unsupported

_OPS = ("paged_attention", "packed_attention", "attention")
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class _Scratch:
    """Byte offsets in a worker's scratch; the table of blocks comes last."""

    queries: int  # f32 [rows][size], scaled
    scores: int  # f32 [rows][PAGE], then weights
    sums: int  # f32 [rows][padded]
    totals: int  # f32 [rows][lanes]: sums of weights, lane by lane
    maxima: int  # f32 [rows]
    factors: int  # f32 [rows]: what rescales the sums
    first: int  # i32 [rows]: first visible key
    last: int  # i32 [rows]: last visible key + 1
    keys: int  # f32 [size][PAGE]
    values: int  # f32 [PAGE][padded]
    mask: int  # f32 [PAGE]
    table: int

    @classmethod
    def of(cls, g: Geometry) -> _Scratch:
        sizes = [g.rows * g.size, g.rows * PAGE, g.rows * g.padded, g.rows * g.lanes, g.rows,
                 g.rows, g.rows, g.rows, g.size * PAGE, PAGE * g.padded, PAGE]
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + -(-size // 16) * 64)
        return cls(*offsets)


class AttentionKernel:
    """A stage of kind "attention": paged_attention, packed_attention or attention.

    The operands may be movement (slices, reshapes, transposes) of buffers, and movement and a cast
    may follow; anything else raises CompileError.
    """

    def __init__(self, stage: Stage, program: Program, target: object):
        self.stage = stage
        nodes = [node for node in stage.body.nodes() if node.op in _OPS]
        if len(nodes) != 1:
            raise unsupported(stage, f"holds {len(nodes)} attention ops, not one")
        self.node = node = nodes[0]
        lanes = program.capabilities.vector_lanes
        self.geometry = g = _geometry(stage, node, lanes)
        self.source = make_source(stage, program, node, g)
        self.result = Operand(program.buffers[stage.results[0]],
                              result_view(stage, stage.body, node))
        has_mask = node.op == "attention" and len(node.inputs) == 4
        self.mask = _mask_operand(stage, program, node) if has_mask else None
        self.multiplier = Multiplier(lanes)
        self.layout = _Scratch.of(g)
        self.scratch_bytes: int | Dim = self.layout.table + self.source.packing.table_bytes
        # With an additive mask scores stay in natural units: -FLT_MAX * log2(e) would overflow.
        self.unit = 1.0 if self.mask is not None else _LOG2_E
        self.softcap: float = node["softcap"]

    # ---- the four answers -------------------------------------------------------------------

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Blocks of queries times kv heads, i64."""
        return e.b.mul(self.source.packing.blocks(e, frame), i64(self.geometry.kv_heads))

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Lists the blocks, and clears what pads values to whole vectors."""
        self.source.packing.fill_table(e, frame, e.offset(worker.scratch, self.layout.table))
        if self.geometry.padded != self.geometry.value_size:
            values = e.offset(worker.scratch, self.layout.values)
            fill(e, values, PAGE * self.geometry.padded, 0.0, self.geometry.lanes)

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """All keys for one block of queries and one kv head."""
        packing = self.source.packing
        blocks = packing.blocks(e, frame)
        head = e.b.udiv(tile, blocks)
        table = e.offset(worker.scratch, self.layout.table)
        number = _fold_over(e, e.b.urem(tile, blocks), blocks)
        block = packing.block(e, frame, table, number, head)
        few = e.b.icmp_signed("==", block.count, i64(1))
        if isinstance(self.source, PagedSource):
            with e.b.if_then(few):
                _Tile(self, e, frame, worker, block, self.geometry.group).emit()
        many = e.b.icmp_signed(">", block.count,
                               i64(1 if isinstance(self.source, PagedSource) else 0))
        with e.b.if_then(many):
            rows = e.b.mul(block.count, i64(self.geometry.group))
            _Tile(self, e, frame, worker, block, rows).emit()


def _fold_over(e: Emitter, index, count) -> ir.Value:
    """0, count - 1, 1, count - 2, ...: with causal masks late blocks cost more than early ones, and
    so every run of consecutive tiles costs about the same."""
    half = e.b.lshr(index, i64(1))
    from_end = e.b.sub(e.b.sub(count, i64(1)), half)
    odd = e.b.icmp_signed("==", e.b.and_(index, i64(1)), i64(1))
    return e.b.select(odd, from_end, half)


def _geometry(stage: Stage, node: Node, lanes: int) -> Geometry:
    query, key, value = node.inputs[:3]
    head_axis = 1 if node.op != "paged_attention" else 2
    heads, size = query.shape[1], query.shape[-1]
    kv_heads = key.shape[head_axis]
    value_size = value.shape[-1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int)
            and isinstance(value_size, int)):
        raise unsupported(stage, "the number of heads and their size must be constants")
    if heads % kv_heads:
        raise unsupported(stage, f"{heads} heads over {kv_heads} kv heads")
    for tensor in (query, key, value):
        if tensor.dtype.bits > 32:
            raise unsupported(stage, f"attention sums in f32: no {tensor.dtype} operands")
    causal = node.op == "paged_attention" or node["causal"]
    return Geometry(heads, kv_heads, size, value_size, lanes, node["window"], causal)


def _mask_operand(stage: Stage, program: Program, node: Node) -> Operand:
    mask = Operand.of(stage, program, node.inputs[3])
    return replace(mask, view=mask.view.broadcast(
        (*node.inputs[0].shape[:3], node.inputs[1].shape[2])))


def _is_shared(mask: Operand) -> bool:
    """Whether all queries and heads of a sequence see the same mask."""
    return mask.view.strides[1:3] == (0, 0)


class _Tile:
    """Emits one tile. rows: group for a single query (known), else count * group."""

    def __init__(self, kernel: AttentionKernel, e: Emitter, frame: Frame, worker: Worker,
                 block: Block, rows: Rows):
        self.kernel, self.e, self.frame, self.block, self.rows = kernel, e, frame, block, rows
        self.direct = isinstance(rows, int)
        self.g = g = kernel.geometry
        layout = kernel.layout

        def part(offset: int) -> ir.Value:
            return e.offset(worker.scratch, offset)

        self.queries = Matrix(part(layout.queries), f32, g.size)
        self.scores = Matrix(part(layout.scores), f32, PAGE)
        self.sums = Matrix(part(layout.sums), f32, g.padded)
        self.totals = Matrix(part(layout.totals), f32, g.lanes)
        self.maxima = Matrix(part(layout.maxima), f32, 1)
        self.factors = Matrix(part(layout.factors), f32, 1)
        self.first, self.last = part(layout.first), part(layout.last)
        self.key_scratch, self.value_scratch = part(layout.keys), part(layout.values)
        self.mask_row = Matrix(part(layout.mask), f32, PAGE)

    def emit(self) -> None:
        e = self.e
        low, high = self._load_queries()
        rows = self.rows
        fill(e, self.sums.pointer, multiply(e, rows, self.g.padded), 0.0, self.g.lanes)
        fill(e, self.totals.pointer, multiply(e, rows, self.g.lanes), 0.0, self.g.lanes)
        with e.loop(0, rows) as row:
            self.maxima.store(e, LOWEST, row, 0)
        first_page = e.b.sub(low, e.b.urem(low, i64(PAGE)))
        with e.loop(first_page, high, PAGE, "page") as start:
            following = e.b.add(start, i64(PAGE))
            more = e.b.icmp_signed("<", following, high)
            self._key_block(KeyBlock(
                start, e.b.select(more, following, start),
                e.maximum(e.b.sub(low, start), i64(0)),
                e.minimum(e.b.sub(high, start), i64(PAGE))))
        self._store_result()

    # ---- queries ----------------------------------------------------------------------------

    def _load_queries(self):
        """Scales the queries into scratch; returns the first and last + 1 of all visible keys."""
        e, source, group = self.e, self.kernel.source, self.g.group
        start = [i64((1 << 31) - 1), i64(0)]
        with e.fold(0, self.block.count, start, name="query") as (query, (low, high), finish):
            first, last = source.visible(e, self.frame, self.block, query)
            with e.loop(0, group, name="head") as member:
                row = e.b.add(e.b.mul(query, i64(group)), member)
                e.store(e.b.trunc(first, I32), e.offset(self.first, row, I32))
                e.store(e.b.trunc(last, I32), e.offset(self.last, row, I32))
                self._load_query(query, member, row)
            finish([e.minimum(low, first), e.maximum(high, last)])
        return finish.results

    def _place(self, query, member) -> tuple:
        """Index of a query's row for a head of the group."""
        e = self.e
        head = e.b.add(e.b.mul(self.block.head, i64(self.g.group)), member)
        return self.kernel.source.packing.place(self.block, e.b.add(self.block.first, query), head)

    def _load_query(self, query, member, row) -> None:
        e, operand, kernel = self.e, self.kernel.source.query, self.kernel
        scale: float = kernel.node["scale"]
        scale = scale / kernel.softcap if kernel.softcap else scale * kernel.unit
        offset = operand.offset(e, self.frame, *self._place(query, member))
        target = e.offset(self.queries.pointer, e.b.mul(row, i64(self.g.size)), F32)
        copy_row(e, self.frame.pointer(operand.buffer), offset, operand.stride(self.frame, -1),
                 operand.dtype, target, self.g.size, self.g.lanes, scale)

    # ---- keys -------------------------------------------------------------------------------

    def _key_block(self, needed: KeyBlock) -> None:
        e, g, source = self.e, self.g, self.kernel.source
        keys = source.keys(e, self.frame, self.block, needed, self.key_scratch, self.direct)
        self.kernel.multiplier.run(e, self.scores, self.queries, keys, self.rows, PAGE,
                                   (0, g.size))
        mask = self.kernel.mask
        if mask is not None and _is_shared(mask):
            self._load_mask(mask, needed, i64(0), i64(0))
        scales = source.scales(e, self.frame, self.block, needed)
        with e.loop(0, self.rows, name="row") as row:
            self._weights(row, needed, scales)
        values = source.values(e, self.frame, self.block, needed, self.value_scratch, self.direct)
        self.kernel.multiplier.run(e, self.sums, self.scores, values, self.rows, g.padded,
                                   (needed.low, needed.high), self.factors.pointer)

    def _weights(self, row, needed: KeyBlock, scales: list[Matrix]) -> None:
        """Scores of a row become weights; its maximum, total and factor move on. scales: of the
        keys and the values, where these are codes."""
        e, lanes = self.e, self.g.lanes
        columns = range(0, PAGE, lanes)
        scores = [self._score(row, column, scales[:1]) for column in columns]
        mask = self.kernel.mask
        if mask is not None:
            if not _is_shared(mask):
                self._load_mask(mask, needed, *self._query_and_member(row))
            scores = [e.b.fadd(score, self.mask_row.load(e, 0, column, lanes))
                      for score, column in zip(scores, columns, strict=True)]
        scores = self._hide(scores, row, needed)
        old = self.maxima.load(e, row, 0)
        new = reduce_max(e, [*scores, e.splat(old, lanes)])
        total = None
        for score, column in zip(scores, columns, strict=True):
            weight = self._exponential(e.b.fsub(score, e.splat(new, lanes)))
            total = weight if total is None else e.b.fadd(total, weight)
            for each in scales[1:]:
                weight = e.b.fmul(weight, each.load(e, 0, column, lanes))
            self.scores.store(e, weight, row, column)
        factor = self._exponential(e.b.fsub(old, new))
        self.maxima.store(e, new, row, 0)
        self.factors.store(e, factor, row, 0)
        before = self.totals.load(e, row, 0, lanes)
        self.totals.store(e, e.fma(before, e.splat(factor, lanes), total), row, 0)

    def _score(self, row, column: int, scales: list[Matrix]) -> ir.Value:
        e, softcap = self.e, self.kernel.softcap
        score = self.scores.load(e, row, column, self.g.lanes)
        for each in scales:
            score = e.b.fmul(score, each.load(e, 0, column, self.g.lanes))
        if not softcap:
            return score
        cap = splat_constant(score.type, softcap * self.kernel.unit)
        return e.b.fmul(codegen_math.tanh(e, score), cap)

    def _hide(self, scores: list[ir.Value], row, needed: KeyBlock) -> list[ir.Value]:
        """Scores of keys that the row must not see become -inf."""
        e, lanes = self.e, self.g.lanes
        start = e.b.trunc(needed.start, I32)
        first = e.b.sub(e.load(e.offset(self.first, row, I32), I32), start)
        last = e.b.sub(e.load(e.offset(self.last, row, I32), I32), start)
        hidden = splat_constant(vector(F32, lanes), -math.inf)
        result = []
        for index, score in enumerate(scores):
            numbers = lane_numbers(lanes, index * lanes)
            seen = e.b.icmp_signed("<", numbers, e.splat(last, lanes))
            if self.g.window:
                after = e.b.icmp_signed(">=", numbers, e.splat(first, lanes))
                seen = e.b.and_(seen, after)
            result.append(e.b.select(seen, score, hidden))
        return result

    def _exponential(self, difference) -> ir.Value:
        if self.kernel.unit == 1.0:
            scale = splat_constant(difference.type, _LOG2_E)
            difference = self.e.b.fmul(difference, scale)
        return codegen_math.exp2_nonpositive(self.e, difference)

    # ---- masks ------------------------------------------------------------------------------

    def _query_and_member(self, row) -> tuple:
        group = i64(self.g.group)
        return self.e.b.udiv(row, group), self.e.b.urem(row, group)

    def _load_mask(self, mask: Operand, needed: KeyBlock, query, member) -> None:
        """A row of the mask for this block of keys, in additive form, into scratch."""
        e = self.e
        place = self._place(query, member)
        base = mask.offset(e, self.frame, *place, needed.start)
        stride = mask.stride(self.frame, 3)
        pointer = self.frame.pointer(mask.buffer)
        is_bool = self.kernel.node.inputs[3].dtype is bool_
        with e.loop(0, needed.high) as i:
            value = load_float(e, pointer, add(e, base, multiply(e, i, stride)), mask.dtype)
            if is_bool:
                shown = e.b.fcmp_unordered("!=", value, float_constant(0.0))
                value = e.b.select(shown, float_constant(0.0), float_constant(-math.inf))
            self.mask_row.store(e, value, 0, i)

    # ---- result -----------------------------------------------------------------------------

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

