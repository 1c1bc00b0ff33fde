"""map and reduce: results row by row, each row vectorised. Bound by memory bandwidth.

Every output of a body is computed by pulling it at its own indices. The outer axes are flattened to
rows; a tile is a few short rows, or a piece of a long one (pieces are for maps only: in a reduce
stage what a row shares, such as a norm's sum, would be computed again for every piece).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.host.pack_rows import PackRows
from llmc.codegen.integers import Index
from llmc.codegen.llvm import Emitter, i64
from llmc.codegen.reductions import usable_lanes
from llmc.ir.dims import Dim, product
from llmc.ir.graph import Node, TensorType
from llmc.ir.layouts import RowBlocks, Rows
from llmc.ir.ops import PAGE
from llmc.ir.program import Buffer, Program, Stage, unsupported

TILE_ELEMENTS = 2048


def map_kernel(stage: Stage, program: Program, target: object) -> PackRows | MapKernel:
    """The kernel of a map stage."""
    return PackRows.of(stage, program) or MapKernel(stage, program, target)


@dataclass(frozen=True)
class Result:
    """Values of a node, and the buffer (and update) that says where they are stored.

    append: the cache_append node whose values these are, if any.
    """

    value: Node
    buffer: Buffer
    append: Node | None = None

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.value.shape or (1,)

    def place(self, x: Expression, index: Sequence[Index]) -> list[Index]:
        """The index in the buffer of the value at index."""
        if self.append is None:
            return list(index)
        _, _, table, sequence, positions = self.append.inputs
        token, head, component = index
        position = self._integer(x, positions, token)
        row = self._integer(x, sequence, token)
        page = self._pull(x, table, [row, position // PAGE])
        return [page, position % PAGE, head, component]

    def _integer(self, x: Expression, node: Node, token: Index) -> Index:
        return self._pull(x, node, [token])

    def _pull(self, x: Expression, node: Node, index: Sequence[Index]) -> Index:
        """An element of an integer tensor as an index."""
        value = x.value(node, index)
        depth = x.value_depth(node, index)
        if value.type.width != 64:
            with x.scopes.at(depth):
                value = x.e.b.sext(value, i64(0).type)
        return x.scopes.integers.leaf(value, depth)


def results_of(stage: Stage, program: Program) -> list[Result]:
    """What a stage stores; a chain of appends to one state is one result each."""
    results = []
    for name, (_, node) in zip(stage.results, stage.body.outputs, strict=True):
        buffer = program.buffers[name]
        while node.op == "cache_append":
            results.append(Result(node.inputs[1], buffer, node))
            node = node.inputs[0]
        if buffer.role != "state":
            results.append(Result(node, buffer))
        elif not results or node.op != "input":
            raise unsupported(stage, f"{node.op} : {node.type} cannot update a state")
    return results


class MapKernel:
    """Elementwise work, gathers, movement, casts, rope, cache appends."""

    scratch_bytes = 0
    split_rows = True  # whether a long row may be shared by tiles

    def __init__(self, stage: Stage, program: Program, target: object):
        self.stage = stage
        self.program = program
        self.lanes = program.capabilities.vector_lanes
        self.results = results_of(stage, program)

    # ---- tiles ------------------------------------------------------------------------------

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Upper bound of tiles at this shape, i64."""
        return self._starts(e, frame)[-1]

    def _starts(self, e: Emitter, frame: Frame) -> list[ir.Value]:
        """The first tile of every result, and the end."""
        starts: list[ir.Value] = [i64(0)]
        for result in self.results:
            grid = self._grid(result)
            rows = e.ceildiv(frame.dim(product(result.shape[:-1])), i64(grid.rows))
            pieces = e.ceildiv(frame.dim(result.shape[-1]), i64(grid.columns)) \
                if grid.columns else i64(1)
            starts.append(e.b.add(starts[-1], e.b.mul(rows, pieces)))
        return starts

    def _grid(self, result: Result) -> _Grid:
        """Rows of a tile, and columns of a piece (0: whole rows)."""
        last = result.shape[-1]
        if isinstance(last, int) and last <= TILE_ELEMENTS:
            return _Grid(max(1, TILE_ELEMENTS // max(last, 1)), 0)
        return _Grid(1, TILE_ELEMENTS if self.split_rows else 0)

    # ---- code -------------------------------------------------------------------------------

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing is shared by a worker's tiles."""

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """One tile of the result that it falls into."""
        starts = self._starts(e, frame)
        for number, result in enumerate(self.results):
            inside = e.b.and_(e.b.icmp_signed(">=", tile, starts[number]),
                              e.b.icmp_signed("<", tile, starts[number + 1]))
            with e.b.if_then(inside):
                own = e.b.sub(tile, starts[number])
                self._result_tile(e, frame, result, own)

    def _result_tile(self, e: Emitter, frame: Frame, result: Result, tile: ir.Value) -> None:
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        x = Expression(e, frame, sources, self.lanes)
        grid, table = self._grid(result), x.scopes.integers
        rows, columns = x.dim(product(result.shape[:-1])), x.dim(result.shape[-1])
        first, stop = x.index(tile), columns
        start: Index = 0
        if grid.columns:
            pieces = (columns + (grid.columns - 1)) // grid.columns
            start = first % pieces * grid.columns
            first = first // pieces
            stop = table.minimum(start + grid.columns, columns)
        first = first * grid.rows
        last = table.minimum(first + grid.rows, rows)
        with x.loop(first, last) as row:
            outer = unflatten(x, result.shape[:-1], row)
            emit_row(x, result, outer, start, stop)


class ReduceKernel(MapKernel):
    """A body with reductions along the last axis. The expression emitter hoists them out of a row's
    final loop, so that each is computed once a row."""

    split_rows = False

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, target)
        self.results = [_before_reshape(result) for result in self.results]


def _before_reshape(result: Result) -> Result:
    """A reshape that ends a body changes nothing in a row-major buffer, but its rows may be made of
    several of the value's own, each with a sum to be computed once (norms of heads, made flat)."""
    value, buffer = result.value, result.buffer
    if result.append is not None or buffer.layout != Rows():
        return result
    while value.op == "reshape":
        value = value.inputs[0]
    return Result(value, replace(buffer, type=TensorType(buffer.type.dtype, value.shape)))


@dataclass(frozen=True)
class _Grid:
    rows: int
    columns: int


def unflatten(x: Expression, shape: Sequence[Dim], row: Index) -> list[Index]:
    """The number of a row as an index of the outer axes."""
    index: list[Index] = []
    for size in reversed(shape[1:]):
        index.insert(0, row % x.dim(size))
        row = row // x.dim(size)
    return [row, *index] if shape else []


def emit_row(x: Expression, result: Result, outer: list[Index], start: Index,
             stop: Index) -> None:
    """Compute and store elements start..stop of a row: whole vectors, then one by one."""
    lanes = usable_lanes(x.lanes, result.shape[-1] if isinstance(result.shape[-1], int) else stop)

    def element(i: Index, lanes: int) -> None:
        index = [*outer, i] if result.value.rank else []
        value = x.value(result.value, index, lanes)
        value = elements.broadcast(x.e, value, lanes)
        place = result.place(x, index) if result.value.rank else [0] * result.buffer.type.rank
        x.store(result.buffer, place, value)

    end = start + (stop - start) // lanes * lanes
    with x.loop(start, end, lanes) as i:
        element(i, lanes)
    if end is not stop and end != stop:
        with x.loop(end, stop) as i:
            element(i, 1)
    if isinstance(result.buffer.layout, RowBlocks):
        _pad_row(x, result.buffer, outer, stop)


def _pad_row(x: Expression, buffer: Buffer, outer: list[Index], stop: Index) -> None:
    """Zeros where a row's length is no multiple of the interleave: they meet a weight's padding,
    which is zero, but zero times an old NaN would not be."""
    layout = buffer.layout
    assert isinstance(layout, RowBlocks)
    if layout.interleave == 1 or (isinstance(stop, int) and stop % layout.interleave == 0):
        return
    zero = ir.Constant(elements.register_type(buffer.type.dtype), None)
    end = (stop + (layout.interleave - 1)) // layout.interleave * layout.interleave
    with x.loop(stop, end) as i:
        x.store(buffer, [*outer, i], zero)
