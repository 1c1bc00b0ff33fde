"""Operators that move data: reshape, transpose, slice, concat, gather, pad, scatter ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.frontend.onnx import shape_array
from llmc.frontend.onnx.builder import Builder, is_nonnegative
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, Value, converter
from llmc.frontend.onnx.shape import normalized
from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.frontend.onnx.turns import known_extent
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import i64
from llmc.ir.graph import Node


def moved(
    call: Call,
    value: Value,
    items: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
    node: Callable[[Node], Node],
) -> Value:
    """Moves a value: NumPy on the items of shape arithmetic, `node` on tensors."""
    if isinstance(value, ShapeArray):
        return ShapeArray(items(value.items), value.dtype)
    return node(value)


def reshaped(call: Call, value: Value, shape: tuple[Dim, ...]) -> Value:
    """Reshapes a value to a shape already known to fit."""
    extents = shape_array.small_extents(shape)
    if isinstance(value, ShapeArray) and extents is not None:
        return ShapeArray(value.items.reshape(extents), value.dtype)
    return call.reshape(call.tensor(value), shape)


# ---- reshape family ----------------------------------------------------------------------------


@converter("Reshape", inputs=(1, 2))
def reshape(call: Call) -> Result:
    value = call.value(0)
    wanted = call.dims(1, "the new shape") if call.version >= 5 else call.required("shape")
    return reshaped(
        call, value, new_shape(call, value.shape, wanted, call.attribute("allowzero", 0))
    )


def new_shape(
    call: Builder, old: tuple[Dim, ...], wanted: list[Dim], allow_zero: int
) -> tuple[Dim, ...]:
    """ONNX's target shape with 0 (copy the dim) and -1 (infer it) resolved, sizes unified."""
    new: list[Dim] = list(wanted)
    for axis, dim in enumerate(new):
        if isinstance(dim, int) and (
            dim < -1 or (dim == 0 and not allow_zero and axis >= len(old))
        ):
            raise call.error(f"cannot reshape to {wanted}")
        if isinstance(dim, int) and dim == 0 and not allow_zero:
            new[axis] = old[axis]
    inferred = [axis for axis, dim in enumerate(new) if isinstance(dim, int) and dim == -1]
    if len(inferred) > 1:
        raise call.error(f"cannot reshape to {wanted}: more than one -1")
    if not inferred:
        call.require_equal(*cancelled(old, new), f"reshape of {list(old)} to {new}")
        return tuple(new)
    copied = [axis for axis, dim in enumerate(wanted) if dim == 0 and not allow_zero]
    left, right = cancelled(
        [dim for axis, dim in enumerate(old) if axis not in copied],
        [dim for axis, dim in enumerate(new) if axis not in (*copied, *inferred)],
    )
    if isinstance(right, int) and right == 0:
        raise call.error(f"cannot infer a dim of {wanted}: another one is 0")
    quotient = dims.floordiv(left, right)
    if not dims.known_equal(quotient * right, left):
        call.symbols.require_multiple(left, right)
    if not call.symbols.require_equal(quotient * right, left) and isinstance(call, Call):
        for symbol in sorted(dims.symbols(left), key=lambda each: each.name):
            known_extent(call, symbol, f"size of {symbol.name}")
    call.require_equal(quotient * right, left, f"reshape of {list(old)} to {new}")
    new[inferred[0]] = quotient
    return tuple(new)


def cancelled(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, Dim]:
    """The products of two lists of dims without the dims that both have.

    A dim that may be 0 cannot be divided by, but it can be struck out.
    """
    left, right = list(a), []
    for dim in b:
        if dim in left and not (isinstance(dim, int) and dim == 0):
            left.remove(dim)
        else:
            right.append(dim)
    return dims.product(left), dims.product(right)


@converter("Flatten", inputs=1)
def flatten(call: Call) -> Result:
    x = call.input(0)
    axis = call.attribute("axis", 1)
    axis = axis if axis == x.rank else call.axis(axis, x.rank)
    return call.reshape(x, (dims.product(x.shape[:axis]), dims.product(x.shape[axis:])))


@converter("Squeeze", inputs=(1, 2))
def squeeze(call: Call) -> Result:
    value = call.value(0)
    shape = value.shape
    axes = call.axes(len(shape), 1, since=13)
    if axes is None:
        axes = [axis for axis, dim in enumerate(shape) if isinstance(dim, int) and dim == 1]
    for axis in axes:
        call.require_equal(shape[axis], 1, f"squeezed axis {axis}")
    return reshaped(call, value, tuple(d for axis, d in enumerate(shape) if axis not in axes))


@converter("Unsqueeze", inputs=(1, 2))
def unsqueeze(call: Call) -> Result:
    value = call.value(0)
    given = call.integers(1, "axes") if call.version >= 13 else call.required("axes")
    axes = call_axes = [call.axis(axis, len(value.shape) + len(given)) for axis in given]
    if len(set(call_axes)) != len(axes):
        raise call.error(f"axes {list(given)} repeat")
    shape = list(value.shape)
    for axis in sorted(axes):
        shape.insert(axis, 1)
    return reshaped(call, value, tuple(shape))


@converter("Transpose", inputs=1)
def transpose(call: Call) -> Result:
    value = call.value(0)
    rank = len(value.shape)
    permutation = list(call.attribute("perm", range(rank)[::-1]))
    if sorted(permutation) != list(range(rank)):
        raise call.error(f"{permutation} is no permutation of {rank} axes")
    return moved(
        call,
        value,
        lambda items: items.transpose(permutation),
        lambda x: call.transpose(x, permutation),
    )


@converter("Expand", inputs=2)
def expand(call: Call) -> Result:
    value = call.value(0)
    shape = call.broadcast_shapes(value.shape, call.dims(1, "the new shape"))
    extents = shape_array.small_extents(shape)
    if isinstance(value, ShapeArray) and extents is not None:
        return ShapeArray(np.broadcast_to(value.items, extents).copy(), value.dtype)
    return call.broadcast(call.tensor(value), shape)


@converter("Tile", inputs=2)
def tile(call: Call) -> Result:
    x, repeats = call.input(0), call.dims(1, "repeats")
    if len(repeats) != x.rank:
        raise call.error(f"{len(repeats)} repeats for a tensor of rank {x.rank}")
    split = [extent for dim in x.shape for extent in (1, dim)]
    repeated = [extent for n, dim in zip(repeats, x.shape, strict=True) for extent in (n, dim)]
    result = call.broadcast(call.reshape(x, split), repeated)
    return call.reshape(result, [n * dim for n, dim in zip(repeats, x.shape, strict=True)])


# ---- concat, split, slice ----------------------------------------------------------------------


@converter("Concat", inputs=(1, None))
def concat(call: Call) -> Result:
    values = [call.value(index) for index in range(len(call.inputs))]
    axis = call.axis(call.required("axis"), len(values[0].shape))
    arrays = call.shape_arrays()
    if arrays is not None:
        return ShapeArray(np.concatenate([array.items for array in arrays], axis), arrays[0].dtype)
    return call.concat([call.tensor(value) for value in values], axis)


@converter("Split", inputs=(1, 2))
def split(call: Call) -> Result:
    value = call.value(0)
    axis = call.axis(call.attribute("axis", 0), len(value.shape))
    sizes = split_sizes(call, value.shape[axis])
    call.require_equal(dims_sum(sizes), value.shape[axis], "split sizes")
    if isinstance(value, ShapeArray) and all(isinstance(size, int) for size in sizes):
        edges = np.cumsum(np.asarray(sizes, dtype=np.int64))[:-1].tolist()
        return [ShapeArray(part, value.dtype) for part in np.split(value.items, edges, axis)]
    return call.split(call.tensor(value), axis, sizes)


def split_sizes(call: Call, extent: Dim) -> list[Dim]:
    """The extents of the parts: as given, or equal ones of which the last takes what is left."""
    if call.has(1):
        return call.dims(1, "split sizes")
    if "split" in call.attributes:
        return list(call.attributes["split"])
    count = call.attribute("num_outputs", len(call.node.output))
    if count != len(call.node.output):
        raise call.error(f"splits into {count} parts, it has {len(call.node.output)} outputs")
    size = dims.ceildiv(extent, count)
    return [size] * (count - 1) + [extent - size * (count - 1)]


def dims_sum(sizes: list[Dim]) -> Dim:
    """The sum of dims, 0 of none."""
    total: Dim = 0
    for size in sizes:
        total = total + size
    return total


@converter("Slice", inputs=(1, 5))
def slice_(call: Call) -> Result:
    value = call.value(0)
    rank = len(value.shape)
    if call.version < 10:
        starts, stops = list(call.required("starts")), list(call.required("ends"))
        given, steps = call.attribute("axes"), None
    else:
        starts, stops = call.dims(1, "starts"), call.dims(2, "ends")
        given = call.integers(3, "axes") if call.has(3) else None
        steps = call.integers(4, "steps") if call.has(4) else None
    axes = (
        [call.axis(axis, rank) for axis in given] if given is not None else list(range(len(starts)))
    )
    steps = steps or [1] * len(axes)
    if not len(starts) == len(stops) == len(axes) == len(steps) or 0 in steps:
        raise call.error("starts, ends, axes and steps do not fit together")
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        value = slice_value(call, value, axis, (start, stop, step))
    return value


def slice_value(call: Call, value: Value, axis: int, bounds: tuple[Dim, Dim, int]) -> Value:
    """One axis from start to stop by step, as ONNX counts them."""
    start, stop, step = bounds
    if isinstance(value, ShapeArray) and isinstance(start, int) and isinstance(stop, int):
        index = (slice(None),) * axis + (python_slice(start, stop, step),)
        return ShapeArray(value.items[index], value.dtype)
    x = call.tensor(value)
    extent = x.shape[axis]
    if step < 0:
        return reversed_slice(call, x, axis, bounds)
    first, last = clamp_index(call, start, extent), clamp_index(call, stop, extent)
    return call.slice_axis(x, axis, first, dims.maximum(first, last), step)


def python_slice(start: int, stop: int, step: int) -> slice:
    """ONNX's bounds as a Python slice: alike, but for a far negative stop going backwards."""
    return slice(start, None if step < 0 and stop < -(2**31) else stop, step)


def clamp_index(call: Builder, index: Dim, extent: Dim) -> Dim:
    """A slice bound counted from the front and kept within 0..extent."""
    low, high = dims.bounds(index)
    if low < 0 and (high is None or high >= 0):
        raise call.error(f"slice bound {dims.format_dim(index)} may be negative or not")
    return dims.minimum(dims.maximum(normalized(index, extent), 0), extent)


def reversed_slice(call: Call, x: Node, axis: int, bounds: tuple[Dim, Dim, int]) -> Node:
    """A slice that goes backwards, as a gather of start, start + step ..."""
    start, stop, step = bounds
    extent = x.shape[axis]
    first = dims.minimum(normalized(start, extent), extent - 1)
    end = dims.maximum(normalized(stop, extent), -1) if dims.bounds(stop)[0] > -(2**31) else -1
    if step == -1 and dims.known_at_least(first, end):
        return call.slice_axes(x, {axis: (end + 1, first + 1, -1)})
    length = dims.maximum(dims.ceildiv(first - end, -step), 0)
    index = call.binary("add", call.scaled(call.iota(length), step), call.dim(first))
    return call.take(x, index, axis)


# ---- gather and scatter ------------------------------------------------------------------------


@converter("Gather", inputs=2)
def gather(call: Call) -> Result:
    value, index = call.value(0), call.value(1)
    axis = call.axis(call.attribute("axis", 0), len(value.shape))
    known = index.known() if isinstance(index, ShapeArray) else None
    if known is None:
        return call.take(call.tensor(value), call.tensor(index), axis)
    extent = value.shape[axis]
    if (
        isinstance(extent, int)
        and known.size
        and not -extent <= known.min() <= known.max() < extent
    ):
        raise call.error(f"index {known.tolist()} is outside an axis of {extent}")
    if known.size:
        call.symbols.require_at_least(extent, max(int(known.max()) + 1, -int(known.min())))
    if isinstance(value, ShapeArray):
        return ShapeArray(np.asarray(np.take(value.items, known, axis), dtype=object), value.dtype)
    if known.size == 1:  # one place: a slice, which costs nothing
        place = normalized(int(known.reshape(-1)[0]), extent)
        part = call.slice_axis(value, axis, place, place + 1)
        return call.reshape(part, (*value.shape[:axis], *known.shape, *value.shape[axis + 1 :]))
    return call.take(value, call.tensor(index), axis)


@converter("GatherElements", inputs=2)
def gather_elements(call: Call) -> Result:
    x = call.input(0)
    axis = call.axis(call.attribute("axis", 0), x.rank)
    check_index(call, x.shape[axis : axis + 1])
    index = call.from_front(call.input(1), x.shape[axis])
    return call.make("gather_elements", x, index, axis=axis)


@converter("GatherND", inputs=2)
def gather_nd(call: Call) -> Result:
    batch_dims = call.attribute("batch_dims", 0)
    x = call.input(0)
    check_index(call, tuples_extents(call, x.shape[batch_dims:]))
    index = index_from_front(call, call.input(1), x.shape[batch_dims:])
    return call.make("gather_nd", x, index, batch_dims=batch_dims)


def tuples_extents(call: Call, extents: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The axes that an index of tuples (its last axis) picks from."""
    depth = call.value(1).shape[-1]
    if isinstance(depth, int) and depth > len(extents):
        raise call.error(f"an index of {depth} items for {len(extents)} axes")
    return extents[:depth] if isinstance(depth, int) else ()


def check_index(call: Call, extents: tuple[Dim, ...]) -> None:
    """ModelError if a constant index (input 1) has items, one of each last axis or all alike, that
    lie outside these axes; what arrives at run time is checked then (`ir/index_ranges.py`)."""
    known = call.constant_of(call.value(1))
    if known is None or not known.size or not extents:
        return
    columns = known.reshape(-1, len(extents)).astype(np.int64)
    for extent, low, high in zip(extents, columns.min(0), columns.max(0), strict=True):
        if isinstance(extent, int) and not -extent <= low <= high < extent:
            raise call.error(f"index {low if low < -extent else high} is outside an axis of "
                             f"{extent}")
        call.symbols.require_at_least(extent, max(int(high) + 1, -int(low)))


def index_from_front(call: Call, index: Node, extents: tuple[Dim, ...]) -> Node:
    """An index of tuples (last axis) with negative items made positive."""
    depth = index.shape[-1]
    if is_nonnegative(index) or not isinstance(depth, int):
        return index
    sizes = call.tensor(shape_array.from_items(extents[:depth], index.dtype))
    negative = call.binary("less", index, call.scalar(0, index.dtype))
    return call.where(negative, call.binary("add", index, sizes), index)


@converter("ScatterND", inputs=3)
def scatter_nd(call: Call) -> Result:
    x = call.input(0)
    check_index(call, tuples_extents(call, tuple(x.shape)))
    index = index_from_front(call, call.input(1), x.shape)
    return call.make("scatter_nd", x, index, call.input(2), reduction=reduction(call))


@converter("ScatterElements", "Scatter", inputs=3)
def scatter_elements(call: Call) -> Result:
    x = call.input(0)
    axis = call.axis(call.attribute("axis", 0), x.rank)
    check_index(call, x.shape[axis : axis + 1])
    inputs = (x, call.from_front(call.input(1), x.shape[axis]), call.input(2))
    return call.make("scatter_elements", *inputs, axis=axis, reduction=reduction(call))


@converter("TensorScatter", inputs=(2, 3))
def tensor_scatter(call: Call) -> Result:
    """A cache with new items written from each sequence's own place on, round the end if told."""
    cache, update, starts = call.input(0), call.input(1), call.optional(2)
    axis = call.axis(call.attribute("axis", -2), cache.rank)
    length, count = cache.shape[axis], update.shape[axis]
    start = call.scalar(0, i64) if starts is None else call.cast(starts, i64)
    start = (
        call.reshape(start, [*start.shape, *[1] * (cache.rank - 1)])
        if starts is not None
        else start
    )
    place = call.reshape(call.iota(length), [length] + [1] * (cache.rank - axis - 1))
    behind = call.binary("sub", place, start)
    if call.attribute("mode", "linear") == "circular":
        behind = call.binary("mod", behind, call.dim(length))
    inside = call.binary("greater_equal", behind, call.scalar(0, i64))
    inside = call.binary("and", inside, call.binary("less", behind, call.dim(count)))
    source = call.where(inside, call.binary("add", behind, call.dim(length)), place)
    both = call.concat([cache, update], axis)
    index = call.broadcast(source, cache.shape)
    return call.make("gather_elements", both, index, axis=axis)


def reduction(call: Call) -> str:
    """How a scatter joins updates with what is there: none, add, mul, max or min."""
    name = str(call.attribute("reduction", "none"))
    if name not in ("none", "add", "mul", "max", "min"):
        raise call.error(f"reduction {name!r} is not supported")
    return name


# ---- padding, masks ----------------------------------------------------------------------------


@converter("Pad", inputs=(1, 4))
def pad(call: Call) -> Result:
    x = call.input(0)
    pads = call.dims(1, "pads") if call.version >= 11 else list(call.required("pads"))
    axes = (
        [call.axis(a, x.rank) for a in call.integers(3, "axes")] if call.has(3) else range(x.rank)
    )
    count = len(axes)
    if len(pads) != 2 * count:
        raise call.error(f"{len(pads)} pads for {count} axes")
    widths = {axis: (pads[k], pads[k + count]) for k, axis in enumerate(axes)}
    mode = call.attribute("mode", "constant")
    check_cuts(call, x, widths, together=mode != "constant")
    if mode == "constant":
        return pad_constant(call, x, widths)
    for axis, (low, high) in widths.items():
        if not (low == 0 and high == 0):
            x = call.take(x, source_index(call, x.shape[axis], low, high, mode), axis)
    return x


def check_cuts(
    call: Call, x: Node, widths: dict[int, tuple[Dim, Dim]], together: bool
) -> None:
    """ModelError if negative widths cut more off an axis than there is; a symbol has to be at least
    as long. together: what one end adds the other may cut."""
    for axis, (low, high) in widths.items():
        if not isinstance(low, int) or not isinstance(high, int):
            continue
        extent = x.shape[axis]
        cut = max(-low - high, 0) if together else max(-low, 0) + max(-high, 0)
        if isinstance(extent, int) and extent < cut:
            raise call.error(f"pads {low} and {high} cut more than there is off axis {axis} of "
                             f"{extent}")
        if cut:
            call.symbols.require_at_least(extent, cut)


def pad_constant(call: Call, x: Node, widths: dict[int, tuple[Dim, Dim]]) -> Node:
    """Pads with a value; negative widths cut."""
    value = (
        call.optional(2)
        if call.version >= 11
        else call.scalar(call.attribute("value", 0.0), x.dtype)
    )
    low: list[Dim] = [0] * x.rank
    high: list[Dim] = [0] * x.rank
    for axis, (before, after) in widths.items():
        first = dims.maximum(-before, 0)
        x = call.slice_axis(x, axis, first, x.shape[axis] - dims.maximum(-after, 0))
        low[axis], high[axis] = dims.maximum(before, 0), dims.maximum(after, 0)
    fill = call.scalar(0, x.dtype) if value is None else call.reshape(value, ())
    return call.make("pad", x, fill, low=tuple(low), high=tuple(high))


def source_index(call: Call, extent: Dim, low: Dim, high: Dim, mode: str) -> Node:
    """For every place of the padded axis, the place of the original that it copies."""
    place = call.binary("sub", call.iota(extent + low + high), call.dim(low))
    last = call.dim(extent - 1)
    if mode == "edge":
        return call.clamp(place, call.scalar(0, i64), last)
    if mode == "wrap":
        return call.binary("mod", place, call.dim(extent))
    if mode == "reflect":
        period = call.dim(dims.maximum(2 * (extent - 1), 1))
        phase = call.binary("mod", place, period)
        return call.binary("min", phase, call.binary("sub", period, phase))
    raise call.error(f"mode {mode!r} is not supported")


@converter("Trilu", inputs=(1, 2))
def trilu(call: Call) -> Result:
    x = call.input(0)
    rows, columns = call.iota(x.shape[-2]), call.iota(x.shape[-1])
    row, column = call.unsqueeze(rows, [1]), call.unsqueeze(columns, [0])
    if call.has(1):
        row = call.binary("add", row, call.reshape(call.input(1), ()))
    op = "greater_equal" if call.attribute("upper", 1) else "less_equal"
    return call.where(call.binary(op, column, row), x, call.scalar(0, x.dtype))


@converter("OneHot", inputs=3)
def one_hot(call: Call) -> Result:
    index, values = call.cast(call.input(0), i64), call.input(2)
    depth = call.dims(1, "depth")[0]
    axis = call.axis(call.attribute("axis", -1), index.rank + 1)
    negative = call.binary("less", index, call.scalar(0, i64))
    index = call.where(negative, call.binary("add", index, call.dim(depth)), index)
    places = call.reshape(call.iota(depth), [depth] + [1] * (index.rank - axis))
    hot = call.binary("equal", call.unsqueeze(index, [axis]), places)
    off, on = (call.reshape(call.slice_axis(values, 0, k, k + 1), ()) for k in range(2))
    return call.where(hot, on, off)
