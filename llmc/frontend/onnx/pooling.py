"""Poolings: windows, reduced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.windows import WindowAxis, spatial_axes, window_axes, windows
from llmc.ir import dims
from llmc.ir.dtypes import DType, f32, i64
from llmc.ir.graph import Node


def pooled(call: Call, x: Node) -> list[WindowAxis]:
    """The windows of a pooling node."""
    extents = [x.shape[axis] for axis in spatial_axes(call, x)]
    ceil_mode = bool(call.attribute("ceil_mode", 0))
    return window_axes(call, extents, call.required("kernel_shape"), ceil_mode)


def lowest(dtype: DType) -> float:
    """What no maximum keeps."""
    return -np.inf if dtype.is_float else int(np.iinfo(dtype.numpy).min)


@converter("MaxPool", inputs=1)
def max_pool(call: Call) -> Result:
    x = call.input(0)
    axes = pooled(call, x)
    seen = windows(call, x, axes, call.scalar(lowest(x.dtype), x.dtype))
    kernels = range(2 + len(axes), seen.rank)
    best = call.reduce("reduce_max", seen, kernels, keep=False)
    if len(call.node.output) < 2 or not call.node.output[1]:
        return best
    return best, max_places(call, x, seen, axes, bool(call.attribute("storage_order", 0)))


def max_places(
    call: Builder, x: Node, seen: Node, axes: Sequence[WindowAxis], column_major: bool
) -> Node:
    """Where each maximum lies in x, flattened (its spatial axes the last first: column major)."""
    rank = len(axes)
    flat = call.reshape(seen, (*seen.shape[: 2 + rank], dims.product(seen.shape[2 + rank :])))
    inside = call.cast(call.make("argmax", flat, axis=flat.rank - 1, keep=False), i64)
    places = []
    for number, axis in reversed(list(enumerate(axes))):
        step = call.binary("mod", inside, call.scalar(axis.kernel, i64))
        inside = call.binary("floor_div", inside, call.scalar(axis.kernel, i64))
        start = call.shifted(call.scaled(call.iota(axis.count), axis.stride), 0)
        start = call.binary("sub", start, call.dim(axis.low))
        start = call.reshape(start, (axis.count, *[1] * (rank - 1 - number)))
        places.append(call.binary("add", call.scaled(step, axis.dilation), start))
    places.reverse()
    ordered = list(zip(places, x.shape[2:], strict=True))
    channel = call.reshape(call.iota(x.shape[1]), (x.shape[1], *[1] * rank))
    sample = call.reshape(call.iota(x.shape[0]), (x.shape[0], *[1] * (rank + 1)))
    total = call.binary("mul", sample, call.dim(x.shape[1]))
    total = call.binary("add", total, channel)
    for place, extent in reversed(ordered) if column_major else ordered:
        total = call.binary("add", call.binary("mul", total, call.dim(extent)), place)
    return total


@converter("AveragePool", inputs=1)
def average_pool(call: Call) -> Result:
    """Sums, divided by how many items of each window count."""
    x = call.input(0)
    axes = pooled(call, x)
    seen = windows(call, x, axes, call.scalar(0, x.dtype))
    total = call.reduce("reduce_sum", seen, range(2 + len(axes), seen.rank), keep=False)
    everything = bool(call.attribute("count_include_pad", 0))
    for number, axis in enumerate(axes):
        counts = call.cast(counted(call, axis, everything), x.dtype)
        counts = call.reshape(counts, (axis.count, *[1] * (len(axes) - 1 - number)))
        total = call.binary("div", total, counts)
    return total


def counted(call: Builder, axis: WindowAxis, everything: bool) -> Node:
    """How many items of each window lie on the axis, or on its padding if `everything`."""
    first = call.unsqueeze(call.scaled(call.iota(axis.count), axis.stride), [1])
    place = call.binary("add", first, call.scaled(call.iota(axis.kernel), axis.dilation))
    low = 0 if everything else axis.low
    high = axis.low + axis.extent + (axis.high if everything else 0)
    inside = call.binary("greater_equal", place, call.dim(low))
    inside = call.binary("and", inside, call.binary("less", place, call.dim(high)))
    return call.reduce("reduce_sum", call.cast(inside, f32), [1], keep=False)


@converter("LpPool", inputs=1)
def lp_pool(call: Call) -> Result:
    x = call.input(0)
    axes = pooled(call, x)
    seen = windows(call, x, axes, call.scalar(0, x.dtype))
    return norm(call, seen, range(2 + len(axes), seen.rank), keep=False)


def norm(call: Call, x: Node, axes: Sequence[int], keep: bool) -> Node:
    """(sum |x|^p)^(1/p)."""
    power = float(call.attribute("p", 2))
    size = call.unary("abs", x)
    raised = call.binary("pow", size, call.scalar(power, x.dtype))
    total = call.reduce("reduce_sum", raised, axes, keep)
    return call.binary("pow", total, call.scalar(1 / power, x.dtype))


@converter("GlobalAveragePool", inputs=1)
def global_average_pool(call: Call) -> Result:
    x = call.input(0)
    return call.reduce("reduce_mean", x, spatial_axes(call, x))


@converter("GlobalMaxPool", inputs=1)
def global_max_pool(call: Call) -> Result:
    x = call.input(0)
    return call.reduce("reduce_max", x, spatial_axes(call, x))


@converter("GlobalLpPool", inputs=1)
def global_lp_pool(call: Call) -> Result:
    x = call.input(0)
    return norm(call, x, spatial_axes(call, x), keep=True)


@converter("MaxUnpool", inputs=(2, 3))
def max_unpool(call: Call) -> Result:
    """Every maximum back where it came from, zeros elsewhere.

    Indices count in the tensor that the attributes describe; a larger output_shape gets that
    tensor with zeros behind.
    """
    x, index = call.input(0), call.input(1)
    rank = len(spatial_axes(call, x))
    kernel = call.required("kernel_shape")
    pads = list(call.attribute("pads", [0] * (2 * rank)))
    strides = list(call.attribute("strides", [1] * rank))
    shape = [*x.shape[:2]]
    for axis in range(rank):
        whole = (x.shape[axis + 2] - 1) * strides[axis] + kernel[axis]
        shape.append(whole - pads[axis] - pads[axis + rank])
    empty = call.full(0, (dims.product(shape),), x.dtype)
    flat = (dims.product(x.shape),)
    inputs = (empty, call.reshape(index, flat), call.reshape(x, flat))
    result = call.reshape(call.make("scatter_elements", *inputs, axis=0, reduction="none"), shape)
    if not call.has(2):
        return result
    wanted = call.dims(2, "output_shape")
    high = tuple(dims.maximum(w - d, 0) for w, d in zip(wanted, shape, strict=True))
    low = (0,) * result.rank
    return call.make("pad", result, call.scalar(0, x.dtype), low=low, high=high)
