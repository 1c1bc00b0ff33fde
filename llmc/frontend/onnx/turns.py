"""Loops in a graph: a few turns are written out, more become a `repeat`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.ir.dims import Dim
from llmc.ir.dtypes import i64
from llmc.ir.graph import Graph, Node

WRITTEN_OUT = 16  # turns; more of them are a loop in the code too
Step = Callable[[Node, Sequence[Node], Sequence[Node]], tuple[list[Node], list[Node]]]


def known_extent(call: Call, extent: Dim, what: str) -> int:
    """A size as a number: a symbol is measured, and code is made for the value that it has."""
    if isinstance(extent, int):
        return extent
    value = int(call.measured(what, call.dim(extent)))
    call.require_equal(extent, value, what)
    return value


def repeated(
    call: Builder,
    count: int,
    carried: Sequence[Node],
    invariant: Sequence[Node],
    step: Step,
) -> tuple[list[Node], list[Node]]:
    """(carried values after the last turn, what the turns put out, stacked on a new first axis).

    `step(turn, carried, invariant)` makes one turn of nodes: the carried values' new ones, of the
    same types, and what it puts out. `turn` is an i64 scalar. A step may use no node from outside
    but its arguments. `count` is at least 1.
    """
    if count <= WRITTEN_OUT:
        return _written_out(call, count, carried, invariant, step)
    return _looped(call, count, carried, invariant, step)


def _written_out(
    call: Builder, count: int, carried: Sequence[Node], invariant: Sequence[Node], step: Step
) -> tuple[list[Node], list[Node]]:
    values, rows = list(carried), list[list[Node]]()
    for turn in range(count):
        values, out = step(call.scalar(turn, i64), values, invariant)
        rows.append([call.unsqueeze(each, [0]) for each in out])
    return values, [call.concat(column, 0) for column in zip(*rows, strict=True)]


def _looped(
    call: Builder, count: int, carried: Sequence[Node], invariant: Sequence[Node], step: Step
) -> tuple[list[Node], list[Node]]:
    """The outputs are carried too: each turn writes its row."""
    outer = [*carried, *invariant]
    inner = [call.make("input", name=f"value{number}", type=node.type)
             for number, node in enumerate(outer)]
    turn = call.make("layer", dtype=i64)
    values, out = step(turn, inner[: len(carried)], inner[len(carried) :])
    whole = [call.full(0, (count, *each.shape), each.dtype) for each in out]
    tables = [call.make("input", name=f"rows{number}", type=node.type)
              for number, node in enumerate(whole)]
    rows = [_with_row(call, table, turn, row) for table, row in zip(tables, out, strict=True)]
    results = [*values, *rows]
    body = Graph(
        "turn",
        (*inner[: len(carried)], *tables, *inner[len(carried) :]),
        tuple((f"result{number}", node) for number, node in enumerate(results)),
    )
    operands = [*carried, *whole, *invariant]
    loop = call.make(
        "repeat", *operands, bodies=(body,), count=count, carried=len(results))
    parts = [loop] if len(results) == 1 else [
        call.make("get", loop, index=number) for number in range(len(results))]
    return parts[: len(values)], parts[len(values) :]


def _with_row(call: Builder, table: Node, turn: Node, row: Node) -> Node:
    place = call.reshape(call.iota(table.shape[0]), (table.shape[0], *[1] * row.rank))
    return call.where(call.binary("equal", place, turn), call.unsqueeze(row, [0]), table)
