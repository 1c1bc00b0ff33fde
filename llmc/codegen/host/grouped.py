"""Rows sorted into groups, and each group's product with its own matrix: mixtures of experts.

The matrices of all groups lie in one packed weight, one group's panels after another's, so a panel
is read past the rows of its group only: a group without rows costs nothing. Floor: bytes of the
panels whose groups have rows / read bandwidth, or 2 * rows * n * k flops / peak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import llvmlite.ir as ir

from llmc.codegen.expr import Expression
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.host.matmul import FewRowsMatmul, Product, operand_buffer, packed_weight
from llmc.codegen.host.single import SingleOp
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I32, I64, Emitter, i32, i64
from llmc.ir.dims import evaluate
from llmc.ir.program import Program, Stage, unsupported

if TYPE_CHECKING:
    from llmc.codegen.target import Target

OP = "grouped_matmul"


class GroupedMatmul(FewRowsMatmul):
    """A tile is a panel; tiles count groups first, so that workers share every group's rows."""

    def __init__(self, stage: Stage, program: Program, target: Target):
        found = [node for node in stage.body.nodes() if node.op == OP]
        if len(found) != 1:
            raise unsupported(stage, f"its body holds {len(found)} grouped products, not one")
        product = Product(stage, found[0], packed_weight(stage, program, found[0]))
        source = operand_buffer(stage, program, product.left)
        starts = operand_buffer(stage, program, product.node.inputs[2])
        if source is None or starts is None:
            raise unsupported(stage, "its rows and starts must lie in memory")
        super().__init__(product, source, program, target)
        self.starts = starts
        self.groups = product.node["groups"]
        self.group_panels = evaluate(product.node.shape[1], {}) // product.reader.layout.columns

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Panels of all groups."""
        return i64(self.groups * self.group_panels)

    def warm(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing: which groups have rows is not known yet."""

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """The rows of a group past one of its panels."""
        number = e.b.udiv(tile, i64(self.groups))
        group = e.b.sub(tile, e.b.mul(number, i64(self.groups)))
        panel = e.b.add(e.b.mul(group, i64(self.group_panels)), number)
        first = self._start(e, frame, group)
        last = self._start(e, frame, e.b.add(group, i64(1)))
        self.rows_past_panel(e, frame, worker, panel, number, first, last)

    def _start(self, e: Emitter, frame: Frame, group: ir.Value) -> ir.Value:
        place = e.offset(frame.pointer(self.starts), group, I32)
        return e.b.sext(e.load(place, I32), I64)


class GroupRows(SingleOp):
    """A counting sort, by one worker: rows are tokens times chosen experts, a few words each."""

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, ("group_rows",))
        self.groups = self.node["groups"]

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """One."""
        return i64(1)

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """Counts, their running sums, then the rows in order, each to the next place of its group.

        starts[g + 2] holds the count of group g, and then starts[g + 1] its next free place, which
        ends as the start of the group behind it.
        """
        x = self._expression(e, frame)
        rows = x.dim(self.node.inputs[0].shape[0])
        counts = e.stack(I32, self.groups + 2)
        with x.loop(0, self.groups + 2) as group:
            self._put(x, counts, group, i32(0))
        with x.loop(0, rows) as row:
            after = self._group(x, row) + 2
            self._put(x, counts, after, e.b.add(self._get(x, counts, after), i32(1)))
        with x.loop(1, self.groups + 2) as group:
            total = e.b.add(self._get(x, counts, group), self._get(x, counts, group - 1))
            self._put(x, counts, group, total)
        with x.loop(0, rows) as row:
            own = self._group(x, row) + 1
            place = self._get(x, counts, own)
            self._put(x, counts, own, e.b.add(place, i32(1)))
            self._store(x, 0, x.index(e.b.sext(place, I64)),
                        e.b.trunc(x.emit_index(row), I32))
            self._store(x, 1, row, place)
        with x.loop(0, self.groups + 1) as group:
            self._store(x, 2, group, self._get(x, counts, group))

    def _store(self, x: Expression, number: int, index: Index, value: ir.Value) -> None:
        if number in self.results:  # others are not read
            x.store(self.results[number], [index], value)

    def _group(self, x: Expression, row: Index) -> Index:
        """A row's group; a number out of range counts as the nearest, for it is an address."""
        value = x.value(self.node.inputs[0], [row])
        wide = value if value.type.width == 64 else x.e.b.sext(value, I64)
        return x.index(x.e.maximum(i64(0), x.e.minimum(wide, i64(self.groups - 1))))

    def _get(self, x: Expression, memory: ir.Value, index: Index) -> ir.Value:
        return x.e.load(x.e.offset(memory, x.emit_index(index), I32), I32)

    def _put(self, x: Expression, memory: ir.Value, index: Index, value: ir.Value) -> None:
        x.e.store(value, x.e.offset(memory, x.emit_index(index), I32))
