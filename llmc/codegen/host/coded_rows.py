"""Activations rounded to int8 codes: `CodedRows`, as a stage of its own or in a worker's scratch.

A block of k is read into registers, its largest magnitude found, and its codes stored with their
scale and sum. Magnitudes are compared as integers: those of infinities and NaNs are the largest.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.epilogue import split_row
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.host.prologue import CACHE_LINE
from llmc.codegen.integers import Index
from llmc.codegen.llvm import (
    F32,
    I1,
    I8,
    I32,
    Emitter,
    i32,
    i64,
    like,
    splat_constant,
    vector,
)
from llmc.codegen.llvm import f32 as f32_constant
from llmc.ir.activation_codes import LEAST_SCALE, PER_CODE
from llmc.ir.dims import Dim, evaluate
from llmc.ir.dims import product as product_of
from llmc.ir.dtypes import f32
from llmc.ir.graph import Node
from llmc.ir.layouts import CodedRows, RowBlocks
from llmc.ir.ops import ELEMENTWISE
from llmc.ir.program import Program, Stage, unsupported

CHUNK = 16  # codes that are stored together
PIECE = 512  # k of a row in a tile
PLAIN = ELEMENTWISE | {"input", "constant", "reshape", "slice"}  # nothing that a whole row shares
# A float this large has no bits after the point: adding it rounds, half to even, to an integer in
# the low bits.
_ROUNDER = 1.5 * 2.0**23
_MAGNITUDE = 0x7FFFFFFF


class CodedRowsKernel:
    """The one result of a body, in `CodedRows`.

    A tile is some groups of all rows of a block: words of these lie side by side, and two workers
    that write into one cache line wait for each other. Of rows with a sum of their own (a norm),
    which would be computed again for each piece, a tile is a row.
    """

    scratch_bytes: int | Dim = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        buffer = program.buffers[stage.results[0]]
        if len(stage.results) != 1 or not isinstance(buffer.layout, CodedRows):
            raise unsupported(stage, "its result does not lie in codes")
        self.stage, self.program, self.buffer = stage, program, buffer
        self.layout: CodedRows = buffer.layout
        self.value = stage.body.outputs[0][1]
        self.groups, rest = divmod(evaluate(self.value.shape[-1], {}), self.layout.group)
        self.by_blocks = not rest and all(node.op in PLAIN for node in stage.body.nodes())
        self.piece = max(1, PIECE // self.layout.group)  # groups

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Rows, or pieces of row blocks."""
        rows = frame.dim(product_of(self.value.shape[:-1]))
        if not self.by_blocks:
            return rows
        return e.b.mul(e.ceildiv(rows, i64(self.layout.rows)), i64(-(-self.groups // self.piece)))

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing is shared by a worker's tiles."""

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """One row, or a piece of a block."""
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        x = Expression(e, frame, sources, self.program.capabilities.vector_lanes)
        if not self.by_blocks:
            self._row(x, frame, x.index(tile), (0, self.groups))
            return
        pieces, minimum = -(-self.groups // self.piece), x.scopes.integers.minimum
        rows = x.dim(product_of(self.value.shape[:-1]))
        own = RowBlocks(self.layout.rows).rows_of_block([rows, 1])
        first = x.index(tile) // pieces * own
        start = x.index(tile) % pieces * self.piece
        stop = minimum(start + self.piece, x.dim(self.groups))
        with x.loop(first, minimum(first + own, rows)) as row:
            self._row(x, frame, row, (start, stop))

    def _row(self, x: Expression, frame: Frame, row: Index, groups: tuple[Index, Index]) -> None:
        leading = split_row(x, self.value, row)
        place = x.emit_index(x.address(self.buffer, [*leading, 0]))
        target = x.e.offset(frame.pointer(self.buffer), place, I32)
        emit_coded_row(x, self.value, leading, target, self.layout, groups)


class RowsInCodes:
    """At most `rows` rows, computed into the worker's scratch, each a block of its own.

    Rows are padded to an odd number of cache lines: see `RowsInScratch`.
    """

    def __init__(self, stage: Stage, program: Program, product: Node, layout: CodedRows, rows: int):
        self.stage, self.program, self.layout = stage, program, layout
        self.left = product.inputs[0]
        words = evaluate(layout.elements((1, self.left.shape[-1])), {})
        self.row_bytes = (-(-4 * words // CACHE_LINE) | 1) * CACHE_LINE
        self.scratch_bytes = rows * self.row_bytes

    def emit(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Compute every row."""
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        x = Expression(e, frame, sources, self.program.capabilities.vector_lanes)
        with x.loop(0, x.index(frame.dim(product_of(self.left.shape[:-1])))) as row:
            place = self.row(e, frame, worker, x.emit_index(row))
            emit_coded_row(x, self.left, split_row(x, self.left, row), place, self.layout)

    def row(self, e: Emitter, frame: Frame, worker: Worker, row: ir.Value) -> ir.Value:
        """Address of a row's first scale."""
        return e.offset(worker.scratch, e.b.mul(row, i64(self.row_bytes)))


def emit_coded_row(x: Expression, node: Node, leading: tuple[Index, ...], row: ir.Value,
                   layout: CodedRows, groups: tuple[Index, Index] | None = None) -> None:
    """Store node[leading] from the address of its first scale on; groups: those of whole size that
    are wanted."""
    whole, rest = divmod(evaluate(node.shape[-1], {}), layout.group)
    with x.loop(*(groups or (0, whole))) as group:
        _emit_group(x, node, (*leading, group * layout.group), layout.group,
                    _group_at(x, row, group, layout), layout)
    if rest:
        _emit_group(x, node, (*leading, whole * layout.group), rest,
                    _group_at(x, row, whole, layout), layout)


def _group_at(x: Expression, row: ir.Value, group: Index, layout: CodedRows) -> ir.Value:
    return x.e.offset(row, x.emit_index(group * layout.group_words), I32)


def _emit_group(x: Expression, node: Node, start: tuple[Index, ...], size: int, place: ir.Value,
                layout: CodedRows) -> None:
    e = x.e
    values = _group_values(x, node, start, size)
    scale = e.b.fmul(_largest(e, values), f32_constant(float(PER_CODE)))
    fits = e.b.fcmp_ordered(">=", scale, f32_constant(LEAST_SCALE))
    inverse = e.b.select(fits, e.b.fdiv(f32_constant(1.0), scale), f32_constant(0.0))
    codes = [_rounded(e, value, e.splat(inverse, x.lanes)) for value in values]
    e.store(scale, place)
    e.store(_sum(e, codes, layout), e.offset(place, layout.rows, I32))
    per_chunk = CHUNK // x.lanes
    for chunk in range(0, len(codes), per_chunk):
        line = 2 + chunk // per_chunk * (CHUNK // 4)
        _store_chunk(e, codes[chunk:chunk + per_chunk], e.offset(place, line * layout.rows, I32),
                     layout)


def _group_values(x: Expression, node: Node, start: tuple[Index, ...],
                  size: int) -> list[ir.Value]:
    """Vectors of f32 that cover a group in whole chunks; zeros behind its end."""
    lanes, e = x.lanes, x.e
    zero = splat_constant(vector(F32, lanes), 0.0)
    values = []
    for first in range(0, -(-size // CHUNK) * CHUNK, lanes):
        left = size - first
        if left <= 0:
            values.append(zero)
            continue
        mask = None if left >= lanes else ir.Constant(
            vector(I1, lanes), [lane < left for lane in range(lanes)])
        value = x.value(node, (*start[:-1], start[-1] + first), lanes, mask)
        value = elements.convert(e, elements.broadcast(e, value, lanes), node.dtype, f32)
        values.append(value if mask is None else e.b.select(mask, value, zero))
    return values


def _largest(e: Emitter, values: list[ir.Value]) -> ir.Value:
    """The largest magnitude, a scalar."""
    largest = None
    for value in values:
        bits = e.b.bitcast(value, like(value, I32))
        bits = e.b.and_(bits, splat_constant(bits.type, _MAGNITUDE))
        largest = bits if largest is None else e.maximum(largest, bits)
    assert largest is not None
    count = largest.type.count
    return e.b.bitcast(e.call(f"llvm.vector.reduce.smax.v{count}i32", I32, largest), F32)


def _rounded(e: Emitter, value: ir.Value, inverse: ir.Value) -> ir.Value:
    """Codes in the low bytes of i32."""
    scaled = e.b.fadd(e.b.fmul(value, inverse), splat_constant(value.type, _ROUNDER))
    return e.b.bitcast(scaled, like(value, I32))


def _sum(e: Emitter, codes: list[ir.Value], layout: CodedRows) -> ir.Value:
    factor = 1 if layout.plain_sums else -layout.offset
    if not factor:
        return i32(layout.start)
    total = None
    for code in codes:
        unused = splat_constant(code.type, 24)
        code = e.b.ashr(e.b.shl(code, unused), unused)
        total = code if total is None else e.b.add(total, code)
    assert total is not None
    count = total.type.count
    sum_ = e.b.mul(e.call(f"llvm.vector.reduce.add.v{count}i32", I32, total), i32(factor))
    return e.b.add(sum_, i32(layout.start))


def _store_chunk(e: Emitter, codes: list[ir.Value], place: ir.Value, layout: CodedRows) -> None:
    """16 codes as four words, `rows` words from one to the next."""
    bytes_ = [e.b.trunc(code, like(code, I8)) for code in codes]
    while len(bytes_) > 1:
        bytes_ = [_joined(e, *pair) for pair in zip(bytes_[::2], bytes_[1::2], strict=True)]
    unit, steps = 32 // layout.bits, 8 // layout.bits
    order = [first + byte * steps + step for first in range(0, CHUNK, unit)
             for step in range(steps) for byte in range(4)]
    chunk = bytes_[0]
    if steps > 1:
        index = ir.Constant(ir.VectorType(I32, CHUNK), order)
        chunk = e.b.shuffle_vector(chunk, chunk, index)
    words = e.b.bitcast(chunk, vector(I32, 4))
    if layout.rows == 1:
        e.store(words, place)
        return
    for word in range(4):
        e.store(e.b.extract_element(words, i32(word)), e.offset(place, word * layout.rows, I32))


def _joined(e: Emitter, low: ir.Value, high: ir.Value) -> ir.Value:
    count = 2 * low.type.count
    return e.b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, count),
                                                     list(range(count))))
