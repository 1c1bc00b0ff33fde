"""Operators on images that only move or normalise: CenterCropPad, Col2Im, LRN."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.turns import known_extent
from llmc.frontend.onnx.windows import WindowAxis, per_axis, windows
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import bool_
from llmc.ir.graph import Node


@converter("CenterCropPad", inputs=2)
def center_crop_pad(call: Call) -> Result:
    """The middle of each axis, or zeros round it."""
    x, wanted = call.input(0), call.dims(1, "the new shape")
    given = call.attribute("axes", range(x.rank))
    axes = [call.axis(axis, x.rank) for axis in given]
    if len(axes) != len(wanted):
        raise call.error(f"{len(wanted)} sizes for {len(axes)} axes")
    low, high = [0] * x.rank, [0] * x.rank
    for axis, size in zip(axes, wanted, strict=True):
        difference = size - x.shape[axis]
        difference = known_extent(call, difference, f"change of axis {axis}")
        if difference < 0:
            start = -difference // 2
            x = call.slice_axis(x, axis, start, start + size)
        else:
            low[axis], high[axis] = difference // 2, difference - difference // 2
    if not any(high):
        return x
    return call.make("pad", x, call.scalar(0, x.dtype), low=tuple(low), high=tuple(high))


@converter("Col2Im", inputs=3)
def col2im(call: Call) -> Result:
    """x[n, c * block, blocks] summed into images: each place gathers what covers it."""
    x, image, block = call.input(0), call.dims(1, "image_shape"), call.integers(2, "block_shape")
    rank = len(image)
    pads = list(call.attribute("pads", [0] * (2 * rank)))
    strides, dilations = per_axis(call, "strides", rank), per_axis(call, "dilations", rank)
    counts: list[Dim] = []
    for axis in range(rank):
        room = image[axis] + pads[axis] + pads[axis + rank] - (block[axis] - 1) * dilations[axis]
        counts.append(dims.floordiv(room - 1, strides[axis]) + 1)
    call.require_equal(x.shape[2], dims.product(counts), "blocks")
    items = math.prod(block)
    channels = call.divide(x.shape[1], items)
    index, inside = call.scalar(0, call.iota(1).dtype), call.scalar(True, bool_)
    for axis in range(rank):
        item = call.reshape(call.iota(block[axis]), (block[axis], *[1] * (rank - 1 - axis)))
        index = call.binary("add", call.scaled(index, block[axis]), item)
    for axis in range(rank):
        place = call.shifted(call.iota(image[axis]), pads[axis])
        place = call.reshape(place, (image[axis], *[1] * (2 * rank - 1 - axis)))
        item = call.reshape(call.iota(block[axis]), (block[axis], *[1] * (rank - 1 - axis)))
        ahead = call.binary("sub", place, call.scaled(item, dilations[axis]))
        number, covers = _block_number(call, ahead, strides[axis], counts[axis])
        index = call.binary("add", call.binary("mul", index, call.dim(counts[axis])), number)
        inside = call.binary("and", inside, covers)
    flat = call.reshape(x, (x.shape[0], channels, items * dims.product(counts)))
    near = call.make("gather", flat, index, axis=2)
    near = call.where(inside, near, call.scalar(0, x.dtype))
    return call.reduce("reduce_sum", near, range(2 + rank, 2 + 2 * rank), keep=False)


def _block_number(call: Builder, ahead: Node, stride: int, count: Dim) -> tuple[Node, Node]:
    """Which block begins `ahead` items from the front (0 if none), and whether one does."""
    step = call.scalar(stride, ahead.dtype)
    number = call.binary("floor_div", ahead, step)
    exact = call.binary("equal", call.binary("mul", number, step), ahead)
    last = call.dim(count - 1, ahead.dtype)
    kept = call.clamp(number, call.scalar(0, ahead.dtype), last)
    return kept, call.binary("and", exact, call.binary("equal", kept, number))


@converter("LRN", inputs=1)
def local_response_normalization(call: Call) -> Result:
    """x / (bias + alpha / size * sum of the squares of `size` channels round its own) ** beta."""
    x, size = call.input(0), int(call.required("size"))
    if size < 1 or x.rank < 2:
        raise call.error(f"size={size} of a tensor of rank {x.rank}")
    low = (size - 1) // 2
    axis = WindowAxis(x.shape[1], size, 1, 1, low, size - 1 - low, x.shape[1])
    order: Sequence[int] = [0, *range(2, x.rank), 1]
    squares = call.transpose(call.binary("mul", x, x), order)
    seen = windows(call, squares, [axis], call.scalar(0, x.dtype))
    total = call.reduce("reduce_sum", seen, [x.rank], keep=False)
    total = call.transpose(total, [0, x.rank - 1, *range(1, x.rank - 1)])
    scaled = call.scaled(total, call.attribute("alpha", 1e-4) / size)
    base = call.shifted(scaled, call.attribute("bias", 1.0))
    power = call.binary("pow", base, call.scalar(call.attribute("beta", 0.75), x.dtype))
    return call.binary("div", x, power)
