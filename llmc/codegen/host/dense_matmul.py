"""dense_matmul: products of two computed tensors, NumPy semantics, both read through expressions.

A block of results stays in registers while k runs. Where the right operand lies row by row its rows
are vectors and the left one's elements are broadcast; where it lies column by column (keys, in
q @ k^T) k is the vector axis and sums end across lanes. Compute bound for many rows, else bound by
reading the right operand once per block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.expr import Expression, is_elementwise, operand_sources
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.host.rows import unflatten
from llmc.codegen.integers import Index
from llmc.codegen.llvm import Emitter, splat_constant, vector
from llmc.codegen.reductions import usable_lanes
from llmc.ir.dims import Dim, product
from llmc.ir.dtypes import DType, dtype
from llmc.ir.graph import Node
from llmc.ir.ops import make
from llmc.ir.program import Program, Stage, unsupported

# Of a block: rows; vectors of columns; columns where k is the vector axis.
ROWS, VECTORS, COLUMNS = 4, 2, 2
CHUNK = 512  # columns of a tile


@dataclass(frozen=True)
class _Block:
    """Results at batch, rows i.. and columns j..: count of rows and columns, lanes of a column."""

    batch: tuple[Index, ...]
    i: Index
    j: Index
    rows: int
    columns: int
    lanes: int


class DenseMatmulKernel:
    """One matmul; what follows it in the body must be elementwise."""

    scratch_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        self.stage = stage
        self.program = program
        self.lanes = program.capabilities.vector_lanes
        self.node = _only_matmul(stage)
        left, right = self.node.inputs
        shape = list(self.node.shape)
        self.columns = shape.pop() if right.rank > 1 else 1
        self.rows = shape.pop() if left.rank > 1 else 1
        self.batch: tuple[Dim, ...] = tuple(shape)
        self.depth = left.shape[-1]
        self.accumulator = _accumulator(self.node)
        self.by_columns = right.rank == 1 or fast_axis(right) == right.rank - 2
        self.right = _swap_last(right) if self.by_columns and right.rank > 1 else right

    # ---- tiles ------------------------------------------------------------------------------

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Batches x blocks of rows x chunks of columns."""
        x = Expression(e, frame, {})
        return x.emit_index(x.dim(product(self.batch)) * self._blocks(x) * self._chunks(x))

    def _blocks(self, x: Expression) -> Index:
        return (x.dim(self.rows) + (ROWS - 1)) // ROWS

    def _chunks(self, x: Expression) -> Index:
        return (x.dim(self.columns) + (CHUNK - 1)) // CHUNK

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing is shared by a worker's tiles."""

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """One block of rows, one chunk of columns."""
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        x = Expression(e, frame, sources, self.lanes)
        number, least = x.index(tile), x.scopes.integers.minimum
        start = number % self._chunks(x) * CHUNK
        stop = least(start + CHUNK, x.dim(self.columns))
        number = number // self._chunks(x)
        first = number % self._blocks(x) * ROWS
        last = least(first + ROWS, x.dim(self.rows))
        batch = tuple(unflatten(x, self.batch, number // self._blocks(x)))
        for i, rows in _steps(x, first, last, (ROWS, 1)):
            widths = (COLUMNS, 1) if self.by_columns else self._widths()
            for j, width in _steps(x, start, stop, widths):
                lanes = 1 if self.by_columns else min(width, self._column_lanes())
                self._block(x, _Block(batch, i, j, rows, width // lanes, lanes))

    def _column_lanes(self) -> int:
        return usable_lanes(self.lanes, self.columns) if isinstance(self.columns, int) \
            else self.lanes

    def _widths(self) -> tuple[int, ...]:
        lanes = self._column_lanes()
        return tuple(dict.fromkeys((VECTORS * lanes, lanes, 1)))

    # ---- blocks -----------------------------------------------------------------------------

    def _block(self, x: Expression, block: _Block) -> None:
        multiply = self._along_k if self.by_columns else self._along_columns
        sums = multiply(x, block)
        for row in range(block.rows):
            for column in range(block.columns):
                j = block.j + column * block.lanes
                self._finish(x, block, block.i + row, j, sums[row * block.columns + column])

    def _along_columns(self, x: Expression, block: _Block) -> list[ir.Value]:
        """Vectors of columns: one broadcast per row and k."""
        zero = splat_constant(vector(elements.register_type(self.accumulator), block.lanes), 0)
        count = block.rows * block.columns
        with x.fold(0, x.dim(self.depth), [zero] * count) as (k, sums, finish):
            finish(self._multiply_add(x, block, k, 1, sums))
        return finish.results

    def _along_k(self, x: Expression, block: _Block) -> list[ir.Value]:
        """Vectors of k, summed across lanes; then the rest of k one by one."""
        depth = x.dim(self.depth)
        lanes = usable_lanes(x.lanes, depth)
        whole = depth // lanes * lanes
        zero = splat_constant(vector(elements.register_type(self.accumulator), lanes), 0)
        count = block.rows * block.columns
        with x.fold(0, whole, [zero] * count, lanes) as (k, sums, finish):
            finish(self._multiply_add(x, block, k, lanes, sums))
        totals = [x.e.reduce_add(value) for value in finish.results]
        if whole is depth or whole == depth:
            return totals
        with x.fold(whole, depth, totals) as (k, sums, finish):
            finish(self._multiply_add(x, block, k, 1, sums))
        return finish.results

    def _multiply_add(self, x: Expression, block: _Block, k: Index, k_lanes: int,
                      sums: Sequence[ir.Value]) -> list[ir.Value]:
        lanes = max(k_lanes, block.lanes)
        left = [self._left(x, block, block.i + row, k, k_lanes) for row in range(block.rows)]
        left = [elements.broadcast(x.e, value, lanes) for value in left]
        right = [self._right(x, block, k, block.j + column * block.lanes, k_lanes)
                 for column in range(block.columns)]
        pairs = [(a, b) for a in left for b in right]
        return [self._fma(x, a, b, total) for (a, b), total in zip(pairs, sums, strict=True)]

    def _fma(self, x: Expression, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        if self.accumulator.is_float:
            return x.e.fma(a, b, total)
        return x.e.b.add(x.e.b.mul(a, b), total)

    def _left(self, x: Expression, block: _Block, i: Index, k: Index, lanes: int) -> ir.Value:
        node = self.node.inputs[0]
        tail = [i, k] if node.rank > 1 else [k]
        return self._operand(x, node, block.batch, tail, lanes)

    def _right(self, x: Expression, block: _Block, k: Index, j: Index, k_lanes: int) -> ir.Value:
        tail = [j, k] if self.by_columns else [k, j]
        if self.right.rank == 1:
            tail = [k]
        lanes = k_lanes if self.by_columns else block.lanes
        value = self._operand(x, self.right, block.batch, tail, lanes)
        return elements.broadcast(x.e, value, lanes)

    def _operand(self, x: Expression, node: Node, batch: Sequence[Index], tail: list[Index],
                 lanes: int) -> ir.Value:
        leading = node.shape[:-2]
        own = batch[len(batch) - len(leading):]
        place = [0 if size == 1 else i for size, i in zip(leading, own, strict=True)]
        value = x.value(node, [*place, *tail], lanes)
        return elements.convert(x.e, value, node.dtype, self.accumulator)

    # ---- results ----------------------------------------------------------------------------

    def _finish(self, x: Expression, block: _Block, i: Index, j: Index, total: ir.Value) -> None:
        """The body's outputs at one row and vector of columns."""
        left, right = self.node.inputs
        index = [*block.batch, *([i] if left.rank > 1 else []), *([j] if right.rank > 1 else [])]
        value = elements.convert(x.e, total, self.accumulator, self.node.dtype)
        after = x.fresh()
        after.bind(self.node, lambda *_: value)
        place = [after.index(x.emit_index(each)) for each in index]
        for name, (_, output) in zip(self.stage.results, self.stage.body.outputs, strict=True):
            result = elements.broadcast(x.e, after.value(output, place, block.lanes), block.lanes)
            after.store(self.program.buffers[name], place or [0], result)


def _steps(x: Expression, start: Index, stop: Index,
           widths: Sequence[int]) -> Iterator[tuple[Index, int]]:
    """Loops from start to stop by each width in turn, the rest by the next; the last is 1."""
    for width in widths:
        end = start + (stop - start) // width * width
        if isinstance(start, int) and isinstance(end, int) and start == end:
            continue
        with x.loop(start, end, width) as i:
            yield i, width
        start = end


def fast_axis(node: Node) -> int:
    """The axis along which a node's elements lie side by side in memory."""
    chain = []
    while node.op == "transpose" or (is_elementwise(node) and len(node.inputs) == 1):
        chain.append(node)
        node = node.inputs[0]
    axis = node.rank - 1
    for each in reversed(chain):
        if each.op == "transpose":
            axis = each["permutation"].index(axis)
    return axis


def _swap_last(node: Node) -> Node:
    """The matrices of a node transposed."""
    axes = list(range(node.rank))
    axes[-2:] = [axes[-1], axes[-2]]
    casts = []
    while node.op == "cast":  # so that the transposes meet, and cancel
        casts.append(node)
        node = node.inputs[0]
    swapped = make("transpose", node, permutation=tuple(axes))
    for each in reversed(casts):
        swapped = make("cast", swapped, dtype=each["dtype"])
    return swapped


def _accumulator(node: Node) -> DType:
    """f32, f64 where an operand is; for integers i32, i64 where an operand is wider."""
    widest = max(source.dtype.bits for source in node.inputs)
    if node.dtype.is_float:
        return dtype("f64" if widest == 64 or node.dtype.bits == 64 else "f32")
    return dtype("i64" if widest > 32 else "i32")


def _only_matmul(stage: Stage) -> Node:
    found = [node for node in stage.body.nodes() if node.op == "matmul"]
    if len(found) != 1:
        raise unsupported(stage, f"holds {len(found)} matmuls, not one")
    reached = {found[0]}
    for node in stage.body.nodes():
        if any(source in reached for source in node.inputs):
            if not is_elementwise(node) or node.shape != found[0].shape:
                raise unsupported(stage, f"{node.op} : {node.type} follows its product")
            reached.add(node)
    return found[0]
