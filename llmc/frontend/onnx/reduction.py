"""Reductions, softmax, cumulative sums and selections along axes."""

from __future__ import annotations

import numpy as np

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.shape_array import ShapeArray, scalar
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import i64
from llmc.ir.graph import Node

# operator: (op, first opset in which the axes are an input)
REDUCTIONS = {
    "ReduceSum": ("reduce_sum", 13),
    "ReduceMean": ("reduce_mean", 18),
    "ReduceMax": ("reduce_max", 18),
    "ReduceMin": ("reduce_min", 18),
    "ReduceProd": ("reduce_prod", 18),
}
# operator: (op before, op after); "square" is x * x
COMPOSED = {
    "ReduceL1": ("abs", None),
    "ReduceL2": ("square", "sqrt"),
    "ReduceLogSum": (None, "log"),
    "ReduceSumSquare": ("square", None),
}


def reduced_axes(call: Call, rank: int, since: int) -> list[int]:
    """The axes that an operator names, an input from opset `since` on. Where it names none: all,
    or none if it says so."""
    axes = call.axes(rank, 1, since)
    if axes:
        return axes
    return [] if call.attribute("noop_with_empty_axes", 0) else list(range(rank))


@converter(*REDUCTIONS, inputs=(1, 2))
def reduce(call: Call) -> Result:
    op, since = REDUCTIONS[call.op_type]
    value, keep = call.value(0), bool(call.attribute("keepdims", 1))
    rank = len(value.shape)
    axes = reduced_axes(call, rank, since)
    if isinstance(value, ShapeArray) and rank == len(axes) <= 1 and op != "reduce_mean":
        total = reduce_dims(call, value, op)
        return ShapeArray(total.items.reshape((1,) * rank), total.dtype) if keep else total
    return call.reduce(op, call.tensor(value), axes, keep)


def reduce_dims(call: Call, value: ShapeArray, op: str) -> ShapeArray:
    """All items of shape arithmetic to one."""
    items = value.flat()
    if op == "reduce_prod":
        return scalar(dims.product(items), value.dtype)
    if op == "reduce_sum":
        return scalar(sum(items), value.dtype)
    if not items:
        raise call.error("no items to reduce")
    return scalar((dims.maximum if op == "reduce_max" else dims.minimum)(*items), value.dtype)


@converter(*COMPOSED, inputs=(1, 2))
def reduce_composed(call: Call) -> Result:
    before, after = COMPOSED[call.op_type]
    x = call.input(0)
    axes = reduced_axes(call, x.rank, 18)
    if before is not None:
        x = call.binary("mul", x, x) if before == "square" else call.unary(before, x)
    result = call.reduce("reduce_sum", x, axes, bool(call.attribute("keepdims", 1)))
    return result if after is None else call.unary(after, result)


@converter("ReduceLogSumExp", inputs=(1, 2))
def reduce_log_sum_exp(call: Call) -> Result:
    """max + log(sum(exp(x - max))): does not overflow."""
    x = call.input(0)
    axes = reduced_axes(call, x.rank, 18)
    highest = call.reduce("reduce_max", x, axes)
    powers = call.unary("exp", call.binary("sub", x, highest))
    result = call.binary("add", highest, call.unary("log", call.reduce("reduce_sum", powers, axes)))
    if call.attribute("keepdims", 1):
        return result
    return call.reshape(result, [d for axis, d in enumerate(result.shape) if axis not in axes])


@converter("Softmax", "LogSoftmax", inputs=1)
def softmax(call: Call) -> Result:
    x = call.input(0)
    axis = call.axis(call.attribute("axis", -1 if call.version >= 13 else 1), x.rank)
    if call.version >= 13 or axis == x.rank - 1:
        return softmax_along(call, x, axis)
    # before opset 13, over all axes from `axis` on together
    flat = call.reshape(x, (dims.product(x.shape[:axis]), dims.product(x.shape[axis:])))
    return call.reshape(softmax_along(call, flat, 1), x.shape)


def softmax_along(call: Call, x: Node, axis: int) -> Node:
    if call.op_type == "Softmax":
        return call.make("softmax", x, axis=axis)
    return log_softmax(call, x, axis)


def log_softmax(call: Call, x: Node, axis: int) -> Node:
    """log(softmax(x)) along an axis, without overflow."""
    shifted = call.binary("sub", x, call.reduce("reduce_max", x, [axis]))
    total = call.reduce("reduce_sum", call.unary("exp", shifted), [axis])
    return call.binary("sub", shifted, call.unary("log", total))


@converter("ArgMax", "ArgMin", inputs=1)
def arg_extreme(call: Call) -> Result:
    x = call.input(0)
    axis = call.axis(call.attribute("axis", 0), x.rank)
    keep, last = bool(call.attribute("keepdims", 1)), bool(call.attribute("select_last_index", 0))
    need_items(call, x, axis, 1)
    op = "argmax" if call.op_type == "ArgMax" else "argmin"
    return call.cast(call.make(op, x, axis=axis, keep=keep, last=last), i64)


@converter("CumSum", "CumProd", inputs=2)
def cumulative(call: Call) -> Result:
    x = call.input(0)
    axis = call.axis(call.integers(1, "axis")[0], x.rank)
    exclusive, reverse = (bool(call.attribute(name, 0)) for name in ("exclusive", "reverse"))
    return call.make(call.op_type.lower(), x, axis=axis, exclusive=exclusive, reverse=reverse)


@converter("TopK", inputs=(1, 2))
def top_k(call: Call) -> Result:
    x = call.input(0)
    count = call.dims(1, "k")[0] if call.version >= 10 else call.required("k")
    axis = call.axis(call.attribute("axis", -1), x.rank)
    need_items(call, x, axis, count)
    largest = bool(call.attribute("largest", 1))
    found = call.make("top_k", x if largest else call.unary("neg", x), k=count, axis=axis)
    values, places = call.make("get", found, index=0), call.make("get", found, index=1)
    return values if largest else call.unary("neg", values), call.cast(places, i64)


def need_items(call: Call, x: Node, axis: int, count: Dim) -> None:
    """ModelError if an axis has fewer items than are taken of it; a symbol must be so long."""
    extent = x.shape[axis]
    if not dims.known_at_least(extent, count) and dims.known_at_least(count - 1, extent):
        raise call.error(f"takes {dims.format_dim(count)} items of an axis of "
                         f"{dims.format_dim(extent)}")
    if isinstance(count, int):
        call.symbols.require_at_least(extent, count)


@converter("Hardmax", inputs=1)
def hardmax(call: Call) -> Result:
    """One at the first maximum along an axis."""
    x = call.input(0)
    axis = call.axis(call.attribute("axis", -1), x.rank)
    best = call.cast(call.make("argmax", x, axis=axis, keep=True, last=False), i64)
    places = call.reshape(call.iota(x.shape[axis]), [x.shape[axis]] + [1] * (x.rank - axis - 1))
    return call.cast(call.binary("equal", places, best), x.dtype)


def constant_scalar(node: Node) -> float | None:
    """The value of a one-item constant node, else None."""
    if node.op != "constant" or dims.product(node.shape) != 1:
        return None
    return float(np.frombuffer(node["data"], node.dtype.numpy)[0])
