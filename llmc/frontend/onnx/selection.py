"""Operators that keep some items: how many is measured by a program, then code is made for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.frontend.onnx import shape_array
from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.turns import known_extent, repeated
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import bool_, i64
from llmc.ir.graph import Node

MOST_COLUMNS = 64  # of slices that Unique compares: it sorts once for each


def counted(call: Call, mask: Node, label: str) -> int:
    """How many items of a mask are true: a value that decides shapes."""
    total = call.reduce("reduce_sum", call.cast(mask, i64), range(mask.rank), keep=False)
    return int(call.measured(label, total))


def ranks(call: Builder, mask: Node) -> Node:
    """How many true items each item of a mask [n] has before it."""
    return call.make("cumsum", call.cast(mask, i64), axis=0, exclusive=True, reverse=False)


def positions(call: Call, mask: Node, label: str) -> Node:
    """Where a mask [n] is true, in order: i64 [count]."""
    count = counted(call, mask, label)
    spare = call.dim(count)  # what is false is written behind the end
    index = call.where(mask, ranks(call, mask), spare)
    empty = call.full(0, (count + 1,), i64)
    return call.slice_axis(scattered(call, empty, index, call.iota(mask.shape[0])), 0, 0, count)


def scattered(call: Builder, x: Node, index: Node, updates: Node, reduction: str = "none") -> Node:
    return call.make("scatter_elements", x, index, updates, axis=0, reduction=reduction)


def unravelled(call: Builder, index: Node, shape: Sequence[Dim]) -> list[Node]:
    """The coordinates of flat indices in an array of that shape."""
    parts: list[Node] = []
    for extent in reversed(shape):
        size = call.binary("max", call.dim(extent), call.scalar(1, i64))
        parts.append(call.binary("mod", index, size))
        index = call.binary("floor_div", index, size)
    return parts[::-1]


def is_true(call: Builder, x: Node) -> Node:
    return x if x.dtype is bool_ else call.binary("not_equal", x, call.scalar(0, x.dtype))


@converter("NonZero", inputs=1)
def non_zero(call: Call) -> Result:
    """The coordinates of all items that are not zero: [rank, count]."""
    array = call.shape_array(0)
    known = array.known() if array is not None else None
    if known is not None:
        return shape_array.from_numpy(np.stack(np.nonzero(known)).astype(np.int64), i64)
    x = call.input(0)
    flat = call.reshape(is_true(call, x), (dims.product(x.shape),))
    places = positions(call, flat, "count")
    rows = unravelled(call, places, x.shape)
    if not rows:
        return call.full(0, (0, places.shape[0]), i64)
    return call.concat([call.unsqueeze(row, [0]) for row in rows], 0)


@converter("Compress", inputs=2)
def compress(call: Call) -> Result:
    """The slices of an axis (or the items of x, flattened) where the condition is true."""
    x, condition = call.input(0), call.input(1)
    axis = call.attribute("axis")
    if axis is None:
        x, axis = call.reshape(x, (dims.product(x.shape),)), 0
    places = positions(call, condition, "count")
    return call.make("gather", x, places, axis=call.axis(axis, x.rank))


# ---- Unique --------------------------------------------------------------------------------------


@converter("Unique", inputs=1)
def unique(call: Call) -> Result:
    """(the different items or slices, where each is first, which one each item is, how many)."""
    x, axis = call.input(0), call.attribute("axis")
    if axis is None:
        x, axis = call.reshape(x, (dims.product(x.shape),)), 0
    axis = call.axis(axis, x.rank)
    count: Dim = x.shape[axis]
    if count == 0:
        return x, *[call.full(0, (0,), i64)] * 3
    order = [axis, *(each for each in range(x.rank) if each != axis)]
    width = dims.product(dim for each, dim in enumerate(x.shape) if each != axis)
    rows = call.reshape(call.transpose(x, order), (count, width))
    sorting = sorted_rows(call, rows, known_extent(call, width, "size of a slice"))
    group = group_numbers(call, rows, sorting)
    groups = int(call.measured("count", call.shifted(call.reduce(
        "reduce_max", group, [0], keep=False), 1)))
    index = scattered(call, call.full(0, (count,), i64), sorting, group)
    every = call.full(0, (groups,), i64)
    first = scattered(
        call, call.broadcast(call.dim(count), (groups,)), index, call.iota(count), "min")
    counts = scattered(call, every, index, call.full(1, (count,), i64), "add")
    if not call.attribute("sorted", 1):
        begins = scattered(
            call, call.full(0, (count,), i64), first, call.full(1, (groups,), i64))
        place = call.make("gather", ranks(call, begins), first, axis=0)
        index = call.make("gather", place, index, axis=0)
        first, counts = (scattered(call, every, place, each) for each in (first, counts))
    return call.make("gather", x, first, axis=axis), first, index, counts


def sorted_rows(call: Builder, rows: Node, width: int) -> Node:
    """The order in which rows [n, width] ascend: sorted by the last column first, stably."""
    if width > MOST_COLUMNS:
        raise call.error(f"slices of {width} items; at most {MOST_COLUMNS} are supported")
    count = rows.shape[0]
    order = call.iota(count)
    for column in reversed(range(width)):
        key = call.reshape(call.slice_axis(rows, 1, column, column + 1), (count,))
        found = call.make("top_k", call.make("gather", key, order, axis=0), k=count, axis=0)
        index = call.cast(call.make("get", found, index=1), i64)
        order = call.make("gather", order, index, axis=0)
    return call.slice_axes(order, {0: (0, count, -1)})


def group_numbers(call: Builder, rows: Node, sorting: Node) -> Node:
    """Which different row, counted in order, each row of the sorted ones is: [n]."""
    count = rows.shape[0]
    ordered = call.make("gather", rows, sorting, axis=0)
    if count == 1:
        return call.full(0, (1,), i64)
    before = call.slice_axis(ordered, 0, 0, count - 1)
    after = call.slice_axis(ordered, 0, 1, count)
    changed = call.cast(call.binary("not_equal", after, before), i64)
    changed = call.reduce("reduce_max", changed, [1], keep=False)
    begins = call.concat([call.full(0, (1,), i64), changed], 0)
    return call.make("cumsum", begins, axis=0, exclusive=False, reverse=False)


# ---- NonMaxSuppression ---------------------------------------------------------------------------


@converter("NonMaxSuppression", inputs=(2, 5))
def non_max_suppression(call: Call) -> Result:
    """(batch, class, box) of every box that no better one of its class overlaps, best first."""
    boxes, scores = call.input(0), call.input(1)
    batch, classes, count = scores.shape
    turns = known_extent(call, count, "boxes")
    ordered = call.make("top_k", scores, k=count, axis=2)
    best = call.make("get", ordered, index=0)
    index = call.cast(call.make("get", ordered, index=1), i64)
    kept = call.broadcast(call.scalar(True, bool_), scores.shape)
    if call.has(4):
        limit = call.reshape(call.input(4), ())
        kept = call.binary("greater", best, limit)
    over = call.reshape(call.input(3), ()) if call.has(3) else call.scalar(0, boxes.dtype)
    overlap = call.binary("greater", shares(call, sorted_boxes(call, boxes, index)), over)
    (kept,), _ = repeated(call, turns, [kept], [overlap], lambda *each: _suppress(call, *each))
    most = call.input(2) if call.has(2) else call.scalar(0, i64)
    number = call.make("cumsum", call.cast(kept, i64), axis=2, exclusive=True, reverse=False)
    kept = call.binary("and", kept, call.binary("less", number, call.reshape(most, ())))
    places = positions(call, call.reshape(kept, (dims.product(kept.shape),)), "count")
    found = call.make("gather", call.reshape(index, (dims.product(kept.shape),)), places, axis=0)
    rows = [*unravelled(call, places, (batch, classes, count))[:2], found]
    return call.concat([call.unsqueeze(row, [1]) for row in rows], 1)


def _suppress(
    call: Builder, turn: Node, carried: Sequence[Node], invariant: Sequence[Node]
) -> tuple[list[Node], list[Node]]:
    """The boxes behind the turn's own that it overlaps go, if it is still there itself."""
    (kept,), (overlap,) = carried, invariant
    alive = call.unsqueeze(call.make("gather", kept, turn, axis=2), [2])
    hits = call.make("gather", overlap, turn, axis=2)
    behind = call.binary("greater", call.iota(kept.shape[2]), turn)
    gone = call.binary("and", call.binary("and", hits, behind), alive)
    return [call.binary("and", kept, call.unary("not", gone))], []


def sorted_boxes(call: Call, boxes: Node, index: Node) -> list[Node]:
    """The corners (low y, low x, high y, high x) [batch, classes, boxes] in each class's order."""
    columns = [call.slice_axis(boxes, 2, place, place + 1) for place in range(4)]
    columns = [call.reshape(each, boxes.shape[:2]) for each in columns]
    if call.attribute("center_point_box", 0):
        x, y, width, height = columns
        half = [call.scaled(height, 0.5), call.scaled(width, 0.5)]
        corners = [call.binary(op, middle, size) for op in ("sub", "add")
                   for middle, size in zip((y, x), half, strict=True)]
    else:
        corners = [call.binary(op, columns[a], columns[a + 2])
                   for op in ("min", "max") for a in range(2)]
    found = []
    for each in corners:
        wide = call.broadcast(call.unsqueeze(each, [1]), index.shape)
        found.append(call.make("gather_elements", wide, index, axis=2))
    return found


def shares(call: Builder, corners: Sequence[Node]) -> Node:
    """Intersection over union of all pairs of boxes: [batch, classes, boxes, boxes]."""
    zero = call.scalar(0, corners[0].dtype)
    common: Node | None = None
    area: Node | None = None
    for axis in range(2):
        low, high = corners[axis], corners[axis + 2]
        begin = call.binary("max", call.unsqueeze(low, [3]), call.unsqueeze(low, [2]))
        end = call.binary("min", call.unsqueeze(high, [3]), call.unsqueeze(high, [2]))
        length = call.binary("max", call.binary("sub", end, begin), zero)
        size = call.binary("sub", high, low)
        common = length if common is None else call.binary("mul", common, length)
        area = size if area is None else call.binary("mul", area, size)
    assert common is not None and area is not None  # there are two axes
    both = call.binary("add", call.unsqueeze(area, [3]), call.unsqueeze(area, [2]))
    union = call.binary("sub", both, common)
    positive = call.binary("greater", union, zero)
    safe = call.where(positive, union, call.scalar(1, union.dtype))
    return call.where(positive, call.binary("div", common, safe), zero)
