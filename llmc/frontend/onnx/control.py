"""Loop and Scan whose turns are written out: few, and known where code is made.

Others that are nodes of the graph itself are turned by the host (`host_loops.py`). Where that
cannot be (in a branch, a function or over sequences) a number or a condition that depends on data
is computed first, and code is made for its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.frontend.onnx import shape_array
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.protobuf import element_dtype
from llmc.frontend.onnx.registry import Result, Value, converter
from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.frontend.onnx.turns import known_extent
from llmc.ir.dtypes import bool_
from llmc.ir.graph import Node, TensorType

MOST_TURNS = 1024
ON_THE_HOST = "an InferenceSession and `llmc run` count them where the loop is the graph's own"


@converter("Loop", inputs=(2, None))
def loop(call: Call) -> Result:
    """(the carried values after the last turn, what the turns put out, stacked)."""
    body = call.required("body")
    most = call.integers(0, "the number of turns")[0] if call.has(0) else None
    condition: Value = call.value(1) if call.has(1) else shape_array.scalar(True, bool_)
    carried = [call.value(index) for index in range(2, len(call.inputs))]
    rows: list[list[Value]] = []
    turn = 0
    while (most is None or turn < most) and holds(call, condition, turn):
        if turn >= MOST_TURNS:
            raise call.error(f"it has more than {MOST_TURNS} turns: {ON_THE_HOST}")
        condition, *results = call.inline(
            body, [shape_array.scalar(turn), condition, *carried], turn)
        carried, out = results[: len(carried)], results[len(carried) :]
        rows.append(out)
        turn += 1
    declared = body.output[1 + len(carried) :]
    return [*carried, *stacked(call, rows, declared)]


def holds(call: Call, condition: Value, turn: int) -> bool:
    """Whether there is another turn."""
    if isinstance(condition, ShapeArray):
        known = condition.known()
        if known is not None:
            return bool(known.all())
    return bool(call.measured(f"condition of turn {turn}", call.tensor(condition)).all())


def stacked(call: Call, rows: Sequence[Sequence[Value]], declared: Sequence[Any]) -> list[Value]:
    """What the turns put out, on a new first axis; empty for no turns."""
    if not rows:
        return [_empty(call, each) for each in declared]
    columns = zip(*rows, strict=True)
    return [call.concat([call.unsqueeze(call.tensor(each), [0]) for each in column], 0)
            for column in columns]


def _empty(call: Call, declared: Any) -> Node:
    tensor = declared.type.tensor_type
    dtype = element_dtype(tensor.elem_type, call.location)
    shape = (0, *(int(dim.dim_value) for dim in tensor.shape.dim))
    return call.make("constant", dtype=dtype, shape=TensorType(dtype, shape).shape, data=b"")


@converter("Scan", inputs=(1, None))
def scan(call: Call) -> Result:
    """The body over slices of its last `num_scan_inputs` inputs; the others are carried."""
    if call.version < 9:
        return batched_scan(call)
    inputs = [call.value(index) for index in range(len(call.inputs))]
    return scanned(call, inputs)


def scanned(call: Call, inputs: Sequence[Value], directions: str = "scan_input_directions",
            sample: int = 0) -> list[Value]:
    body, count = call.required("body"), int(call.required("num_scan_inputs"))
    carried, tables = list(inputs[:-count]), [call.tensor(each) for each in inputs[-count:]]
    axes = [call.axis(axis, table.rank) for axis, table in zip(
        call.attribute("scan_input_axes", [0] * count), tables, strict=True)]
    backwards = list(call.attribute(directions, [0] * count))
    turns = known_extent(call, tables[0].shape[axes[0]], "turns")
    if turns > MOST_TURNS:
        raise call.error(f"it has {turns} turns, more than {MOST_TURNS}: {ON_THE_HOST}")
    rows: list[list[Value]] = []
    for turn in range(turns):
        slices = []
        for table, axis, reverse in zip(tables, axes, backwards, strict=True):
            call.require_equal(table.shape[axis], turns, "turns of the scanned inputs")
            at = turns - 1 - turn if reverse else turn
            piece = call.slice_axis(table, axis, at, at + 1)
            slices.append(call.reshape(piece, (*table.shape[:axis], *table.shape[axis + 1 :])))
        results = call.inline(body, [*carried, *slices], sample * turns + turn)
        carried, out = results[: len(carried)], results[len(carried) :]
        rows.append(out)
    declared = body.output[len(carried) :]
    return [*carried, *_laid_out(call, stacked(call, rows, declared))]


def _laid_out(call: Call, columns: Sequence[Value]) -> list[Value]:
    """Outputs with their turns in the order and on the axis that is asked for."""
    count = len(columns)
    axes = list(call.attribute("scan_output_axes", [0] * count))
    backwards = list(call.attribute("scan_output_directions", [0] * count))
    results: list[Value] = []
    for column, axis, reverse in zip(columns, axes, backwards, strict=True):
        x = call.tensor(column)
        if reverse:
            x = call.slice_axes(x, {0: (0, x.shape[0], -1)})
        at = call.axis(axis, x.rank)
        order = list(range(1, x.rank))
        order.insert(at, 0)
        results.append(call.transpose(x, order))
    return results


def batched_scan(call: Call) -> Result:
    """Opset 8: a scan for each sample; the first input would be their lengths."""
    if call.has(0):
        raise call.error("sequence_lens is not supported")
    given = [call.input(index) for index in range(1, len(call.inputs))]
    batch = known_extent(call, given[0].shape[0], "samples")
    samples = []
    for number in range(batch):
        own: list[Value] = [
            call.reshape(call.slice_axis(x, 0, number, number + 1), x.shape[1:]) for x in given]
        samples.append(scanned(call, own, "directions", number))
    return stacked(call, samples, [])


