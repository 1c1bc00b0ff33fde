"""What follows a product: the body after the matmul, element by element, from a tile of sums.

The sums lie in a small row-major tile [rows][columns] of the worker's stack; per row and vector of
columns the body's outputs are computed (bias, residual, activation, gate * up, cast) and stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import llvmlite.ir as ir

from llmc.codegen.expr import Expression, is_elementwise, operand_sources
from llmc.codegen.host.kernel import Frame
from llmc.codegen.host.microkernel import PanelReader
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I32, Emitter, i64, vector
from llmc.ir.dims import evaluate, known_equal
from llmc.ir.graph import Node, TensorType
from llmc.ir.layouts import Rows
from llmc.ir.program import Buffer, Program, Stage, unsupported


@dataclass(frozen=True)
class MatmulResult:
    """A value of the body and the buffer it is stored in, seen with the value's own shape."""

    value: Node
    buffer: Buffer


class Epilogue:
    """The part of a matmul stage's body behind its product; CompileError unless elementwise."""

    def __init__(self, stage: Stage, program: Program, product: Node, reader: PanelReader,
                 rows: int):
        self.stage, self.program, self.product, self.reader = stage, program, product, reader
        self.rows = rows
        layout = reader.layout
        self.parts = product_parts(stage, product, layout.parts)
        self.part_size = evaluate(product.shape[-1], {}) // layout.parts
        self.width = layout.columns // layout.parts
        self.lanes = reader.lanes if self.width % reader.lanes == 0 else 1
        self.results = [matmul_result(stage, program, name, value)
                        for name, (_, value) in zip(stage.results, stage.body.outputs, strict=True)]
        for result in self.results:
            self._check(result.value)

    def _check(self, output: Node) -> None:
        """Between product and output, every node is elementwise and of the output's shape."""
        reached = dependents(self.stage, set(self.parts))
        shape = output.shape
        pending, seen = [output], {output}
        while pending:
            node = pending.pop()
            if node not in reached:
                continue
            same = len(node.shape) == len(shape) and all(map(known_equal, node.shape, shape))
            if not same or not (node in self.parts or is_elementwise(node)):
                raise unsupported(self.stage, f"{node.op} : {node.type} follows its product")
            if node not in self.parts:
                pending += [source for source in node.inputs if source not in seen]
                seen.update(node.inputs)

    def reserve(self, e: Emitter) -> ir.Value:
        """Memory for the tile of sums."""
        return e.stack(self.reader.element, self.rows * self.reader.layout.columns)

    def emit(self, e: Emitter, frame: Frame, sums: ir.Value, first_row: ir.Value,
             count: ir.Value, panel: ir.Value) -> None:
        """Results of the tile's first `count` rows, which are rows first_row.. of the product."""
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        x = Expression(e, frame, sources, self.lanes)
        start = x.index(panel) * self.width
        stop, rows = x.index(count), x.index(first_row)
        if self.part_size % self.width == 0:
            with x.loop(0, self.width, self.lanes) as chunk:
                self._rows(x, sums, rows, stop, start, chunk)
            return
        left = x.index(e.minimum(i64(self.width),
                                 e.b.sub(i64(self.part_size), x.emit_index(start))))
        whole = left // self.lanes * self.lanes
        with x.loop(0, whole, self.lanes) as chunk:
            self._rows(x, sums, rows, stop, start, chunk)
        if self.part_size % self.lanes:
            with x.loop(whole, left, self.lanes) as chunk:
                self._rows(x, sums, rows, stop, start, chunk,
                           self._mask(e, x.emit_index(left), x.emit_index(chunk)))

    def _mask(self, e: Emitter, left: ir.Value, chunk: ir.Value) -> ir.Value:
        """Lanes from chunk on that lie before the end."""
        valid = e.splat(e.b.trunc(e.b.sub(left, chunk), I32), self.lanes)
        numbers = ir.Constant(vector(I32, self.lanes), list(range(self.lanes)))
        return e.b.icmp_signed("<", numbers, valid)

    def _rows(self, x: Expression, sums: ir.Value, rows: Index, count: Index, start: Index,
              chunk: Index, mask: ir.Value | None = None) -> None:
        """One vector of columns, all rows: what depends on the column only is computed once."""
        with x.loop(0, count) as row:
            for part_node, part in self.parts.items():
                x.bind(part_node, self._sums_at(x, sums, row, part * self.width + chunk))
            for result in self.results:
                index = (*split_row(x, self.product, rows + row), start + chunk)
                value = x.value(result.value, index, self.lanes, mask)
                value = value if self.lanes == 1 or isinstance(value.type, ir.VectorType) \
                    else x.e.splat(value, self.lanes)
                x.store(result.buffer, index, value, mask)

    def _sums_at(self, x: Expression, sums: ir.Value, row: Index, column: Index):
        place = x.emit_index(row * self.reader.layout.columns + column)
        element = self.reader.element
        type_ = vector(element, self.lanes)

        def load(index: tuple[Index, ...], lanes: int, mask: ir.Value | None) -> ir.Value:
            return x.e.load(x.e.offset(sums, place, element), type_)
        return load


def split_row(x: Expression, product: Node, row: Index) -> tuple[Index, ...]:
    """The number of a row as the indices of the leading axes."""
    leading = product.shape[:-1]
    index: list[Index] = []
    for size in reversed(leading[1:]):
        index.append(row % x.dim(size))
        row = row // x.dim(size)
    return (row, *reversed(index)) if leading else ()


def product_parts(stage: Stage, product: Node, parts: int) -> dict[Node, int]:
    """What stands for the sums: the product itself, or its equal slices -> their number."""
    if parts == 1:
        return {product: 0}
    size = product.shape[-1] // parts
    found = {}
    for user in stage.body.users().get(product, []):
        first = user["starts"][-1] if user.op == "slice" else None
        if first is None or user.shape[-1] != size or first % size:
            raise unsupported(stage, f"{user.op} : {user.type} reads a product in {parts} parts")
        found[user] = first // size
    return found


def dependents(stage: Stage, sources: set[Node]) -> set[Node]:
    """The nodes that depend on one of the sources, and these."""
    reached = set(sources)
    for node in stage.body.nodes():
        if any(source in reached for source in node.inputs):
            reached.add(node)
    return reached


def matmul_result(stage: Stage, program: Program, name: str, value: Node) -> MatmulResult:
    """An output; a reshape at its end changes nothing in a row-major buffer."""
    buffer = program.buffers[name]
    while value.op == "reshape" and buffer.layout == Rows():
        value = value.inputs[0]
    return MatmulResult(value, replace(buffer, type=TensorType(buffer.type.dtype, value.shape)))
