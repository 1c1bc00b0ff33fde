"""Ops that are a stage of their own: argmax, argmin, cumsum, top_k, scatters.

Scalar code, line by line along the op's axis. Scatters are sequential, so that of several updates
of one element the last one stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.elementwise import ELEMENTWISE
from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.host.rows import TILE_ELEMENTS, Result, emit_row, unflatten
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I1, I32, I64, Emitter, i64
from llmc.codegen.movement import position
from llmc.ir.dims import product
from llmc.ir.graph import Node
from llmc.ir.program import Buffer, Program, Stage, unsupported

ALONG_AXIS = ("argmax", "argmin", "cumsum", "cumprod", "top_k")
SCATTERS = ("scatter_nd", "scatter_elements")


class SingleOp:
    """The op of the body, and the buffers of its results."""

    scratch_bytes = 0

    def __init__(self, stage: Stage, program: Program, ops: Sequence[str]):
        self.stage = stage
        self.program = program
        found = [node for node in stage.body.nodes() if node.op in ops]
        outputs = [node.inputs[0] if node.op == "get" else node for _, node in stage.body.outputs]
        if len(found) != 1 or any(node is not found[0] for node in outputs):
            raise unsupported(stage, f"its body must be one of {', '.join(ops)} and nothing else")
        self.node = found[0]
        self.results: dict[int, Buffer] = {}  # number of the result -> its buffer
        for name, (_, node) in zip(stage.results, stage.body.outputs, strict=True):
            number = node["index"] if node.op == "get" else 0
            self.results[number] = program.buffers[name]

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing is shared by a worker's tiles."""

    def _expression(self, e: Emitter, frame: Frame) -> Expression:
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        return Expression(e, frame, sources, self.program.capabilities.vector_lanes)


class AlongAxisKernel(SingleOp):
    """A line of the source along the op's axis gives a line (or an element) of each result."""

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, ALONG_AXIS)
        self.source = self.node.inputs[0]
        self.axis = self.node["axis"] % max(1, self.source.rank)
        size = self.source.shape[self.axis]
        self.outer = self.source.shape[:self.axis] + self.source.shape[self.axis + 1:]
        self.lines = max(1, TILE_ELEMENTS // max(1, size)) if isinstance(size, int) else 1

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Groups of lines."""
        return e.ceildiv(frame.dim(product(self.outer)), i64(self.lines))

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """A group of lines, one after the other."""
        x = self._expression(e, frame)
        first = x.index(tile) * self.lines
        last = x.scopes.integers.minimum(first + self.lines, x.dim(product(self.outer)))
        with x.loop(first, last) as line:
            outer = unflatten(x, self.outer, line)
            size = x.dim(self.source.shape[self.axis])
            emit = _ALONG.get(self.node.op, AlongAxisKernel._extreme)
            emit(self, x, outer, size)

    def _at(self, outer: list[Index], i: Index) -> list[Index]:
        return [*outer[:self.axis], i, *outer[self.axis:]]

    def _store(self, x: Expression, number: int, index: Sequence[Index], value: ir.Value) -> None:
        if number in self.results:
            x.store(self.results[number], index, value)

    def _cumulative(self, x: Expression, outer: list[Index], size: Index) -> None:
        dtype, sums = self.source.dtype, self.node.op == "cumsum"
        start = ir.Constant(elements.register_type(dtype), 0 if sums else 1)
        with x.fold(0, size, [start]) as (i, (total,), finish):
            place = self._at(outer, size - 1 - i if self.node["reverse"] else i)
            value = x.value(self.source, place)
            after = ELEMENTWISE["add" if sums else "mul"](x.e, dtype, total, value)
            self._store(x, 0, place, total if self.node["exclusive"] else after)
            finish([after])

    def _extreme(self, x: Expression, outer: list[Index], size: Index) -> None:
        """argmax and argmin: the first (or last) extreme; a NaN is more extreme than any number."""
        node, b = self.node, x.e.b
        symbol = (">" if node.op == "argmax" else "<") + ("=" if node["last"] else "")
        start = order_limit(self.source, node.op == "argmin")
        with x.fold(0, size, [start, i64(0)]) as (i, (best, where), finish):
            value = x.value(self.source, self._at(outer, i))
            key = order_key(x.e, self.source, value, nan_is_least=node.op == "argmin")
            better = b.icmp_signed(symbol, key, best)
            finish([b.select(better, key, best), b.select(better, x.emit_index(i), where)])
        place = self._at(outer, 0) if node["keep"] else outer
        self._store(x, 0, place or [0] * self.results[0].type.rank, finish.results[1])

    def _top_k(self, x: Expression, outer: list[Index], size: Index) -> None:
        """k scans, each for the largest of what comes after the one before it."""
        b, least = x.e.b, order_limit(self.source, False)
        greatest = order_limit(self.source, True)
        count = x.dim(self.node["k"])
        with x.fold(0, count, [greatest, i64(-1)]) as (rank, (old_key, old), outer_finish):
            with x.fold(0, size, [least, i64(0), ir.Constant(I1, 0)]) as (i, state, finish):
                best, where, found = state
                here = x.emit_index(i)
                key = order_key(x.e, self.source, x.value(self.source, self._at(outer, i)))
                later = b.and_(b.icmp_signed("==", key, old_key), b.icmp_signed(">", here, old))
                left = b.or_(b.icmp_signed("<", key, old_key), later)
                larger = b.or_(b.icmp_signed(">", key, best), b.not_(found))
                better = b.and_(left, larger)
                finish([b.select(better, key, best), b.select(better, here, where),
                        b.or_(found, better)])
            key, where, _ = finish.results
            value = x.value(self.source, self._at(outer, x.index(where)))
            self._store(x, 0, self._at(outer, rank), value)
            self._store(x, 1, self._at(outer, rank), where)
            outer_finish([key, where])


_ALONG = {"cumsum": AlongAxisKernel._cumulative, "cumprod": AlongAxisKernel._cumulative,
          "top_k": AlongAxisKernel._top_k}


def order_key(e: Emitter, node: Node, value: ir.Value, nan_is_least: bool = False) -> ir.Value:
    """A signed integer that orders like the value; NaN comes above (or below) all, -0 equals 0."""
    b = e.b
    if node.dtype.kind == "bool":
        return b.zext(value, I32)
    if node.dtype.kind == "uint":
        sign = 1 << (value.type.width - 1)
        return b.xor(value, ir.Constant(value.type, sign))
    if not node.dtype.is_float:
        return value
    type_ = I64 if node.dtype.bits == 64 else I32
    bits = b.bitcast(b.fadd(value, ir.Constant(value.type, 0.0)), type_)
    magnitude = ir.Constant(type_, (1 << (type_.width - 1)) - 1)
    flipped = b.and_(b.ashr(bits, ir.Constant(type_, type_.width - 1)), magnitude)
    key = b.xor(bits, flipped)
    return b.select(b.fcmp_unordered("uno", value, value), _limit(type_, not nan_is_least), key)


def order_limit(node: Node, greatest: bool) -> ir.Constant:
    """The greatest or least key of a node's dtype."""
    if node.dtype.kind == "bool":
        return _limit(I32, greatest)
    if node.dtype.is_float:
        return _limit(I64 if node.dtype.bits == 64 else I32, greatest)
    return _limit(elements.register_type(node.dtype), greatest)


def _limit(type_: ir.IntType, greatest: bool) -> ir.Constant:
    half = 1 << (type_.width - 1)
    return ir.Constant(type_, half - 1 if greatest else -half)


class ScatterKernel(SingleOp):
    """A copy of the first operand, then the updates in order; one tile."""

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, SCATTERS)
        self.source, self.index, self.updates = self.node.inputs
        self.buffer = self.results[0]

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """One."""
        return i64(1)

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """Copy, then update."""
        x = self._expression(e, frame)
        shape = self.source.shape or (1,)
        with x.loop(0, x.dim(product(shape[:-1]))) as row:
            emit_row(x, Result(self.source, self.buffer), unflatten(x, shape[:-1], row), 0,
                     x.dim(shape[-1]))
        with x.loop(0, x.dim(product(self.updates.shape))) as number:
            index = unflatten(x, self.updates.shape, number)
            place = self._place(x, index)
            value = x.value(self.updates, index)
            if self.node["reduction"] != "none":
                combine = ELEMENTWISE[self.node["reduction"]]
                old = x.load(self.buffer, tuple(place), 1, None)
                value = combine(x.e, self.node.dtype, old, value)
            x.store(self.buffer, place, value)

    def _place(self, x: Expression, index: list[Index]) -> list[Index]:
        if self.node.op == "scatter_elements":
            axis = self.node["axis"] % self.source.rank
            target = position(x, self.index, index, self.source.shape[axis])
            return [*index[:axis], target, *index[axis + 1:]]
        outer = index[:self.index.rank - 1]
        depth = self.index.shape[-1]
        if not isinstance(depth, int):
            raise x.unsupported(self.node, "the last axis of its index is not a fixed number")
        places = [position(x, self.index, [*outer, number], self.source.shape[number])
                  for number in range(depth)]
        return [*places, *index[self.index.rank - 1:]]
