"""Operators that read images at computed places: GridSample, AffineGrid, RoiAlign, DeformConv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.convolution import groups, kernel_shape
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.windows import per_axis, spatial_axes
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType, f32, f64, i64
from llmc.ir.graph import Node


@dataclass(frozen=True)
class Taps:
    """Neighbours along one axis: `index` and `weight`, both [..., taps]; an index is inside."""

    index: Node
    weight: Node


def wide(dtype: DType) -> DType:
    """What coordinates are computed in."""
    return f64 if dtype is f64 else f32


# ---- GridSample ---------------------------------------------------------------------------------


@converter("GridSample", inputs=2)
def grid_sample(call: Call) -> Result:
    """x[n, c, spatial..] at grid[n, out.., rank], whose coordinates, the last axis's first, go
    from -1 to 1."""
    x, grid = call.input(0), call.input(1)
    rank = len(spatial_axes(call, x))
    call.require_equal(grid.shape[-1], rank, "coordinates of the grid")
    mode = str(call.attribute("mode", "linear"))
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    padding = str(call.attribute("padding_mode", "zeros"))
    aligned = bool(call.attribute("align_corners", 0))
    if mode not in ("nearest", "linear", "cubic") or padding not in (
        "zeros", "border", "reflection"
    ):
        raise call.error(f"mode={mode!r}, padding_mode={padding!r} is not supported")
    out = grid.shape[1:-1]
    grid = call.cast(grid, wide(grid.dtype))
    points = call.reshape(grid, (grid.shape[0], dims.product(out), rank))
    taps = []
    for axis in range(rank):
        last = rank - 1 - axis
        place = call.reshape(call.slice_axis(points, 2, last, last + 1), points.shape[:2])
        extent = x.shape[2 + axis]
        place = denormalized(call, place, extent, aligned)
        taps.append(axis_taps(call, place, extent, mode, (padding, aligned)))
    return call.reshape(interpolated(call, x, taps), (*x.shape[:2], *out))


def denormalized(call: Builder, place: Node, extent: Dim, aligned: bool) -> Node:
    """-1..1 as places of an axis: of its items' centres if aligned, else of its borders."""
    size = call.cast(call.dim(extent), place.dtype)
    first = call.shifted(place, 1.0)
    if aligned:
        return call.binary("mul", call.scaled(first, 0.5), call.shifted(size, -1.0))
    return call.scaled(call.shifted(call.binary("mul", first, size), -1.0), 0.5)


def axis_taps(
    call: Builder, place: Node, extent: Dim, mode: str, outside: tuple[str, bool]
) -> Taps:
    """The neighbours of places [n, p] along an axis; `outside`: padding mode, corners aligned."""
    padding, _ = outside
    if mode == "nearest":
        place = call.unary("round", place)
    if padding == "border":
        place = _clamped(call, place, extent)
    elif padding == "reflection":
        place = reflected(call, place, extent, outside)
    base = call.unary("floor", place)
    offsets, weight = _kernel(call, call.binary("sub", place, base), mode)
    near = call.binary("add", call.unsqueeze(base, [base.rank]), offsets)
    if padding == "reflection":
        index = _clamped(call, reflected(call, near, extent, outside), extent)
    else:
        index = _clamped(call, near, extent)
    if padding == "zeros":
        inside = call.binary("equal", index, near)
        weight = call.where(inside, weight, call.scalar(0, weight.dtype))
    return Taps(call.cast(index, i64), weight)


def _clamped(call: Builder, place: Node, extent: Dim) -> Node:
    last = call.cast(call.dim(extent - 1), place.dtype)
    return call.clamp(place, call.scalar(0, place.dtype), last)


def reflected(call: Builder, place: Node, extent: Dim, outside: tuple[str, bool]) -> Node:
    """Places mirrored at both borders until they are between them: a triangular wave."""
    low = 0.0 if outside[1] else -0.5
    span = call.cast(call.dim(extent - 1 if outside[1] else extent), place.dtype)
    period = call.binary("max", call.scaled(span, 2.0), call.scalar(1, place.dtype))
    far = call.unary("abs", call.shifted(place, -low))
    turns = call.unary("floor", call.binary("div", far, period))
    rest = call.binary("sub", far, call.binary("mul", turns, period))
    back = call.binary("sub", call.scaled(span, 2.0), rest)
    return call.shifted(call.where(call.binary("greater", rest, span), back, rest), low)


def _kernel(call: Builder, share: Node, mode: str) -> tuple[Node, Node]:
    """(offsets from the floor [taps], weights [.., taps]) at a share of the way to the next."""
    one = call.scalar(1, share.dtype)
    if mode == "nearest":
        weights = [call.broadcast(one, share.shape)]
    elif mode == "linear":
        weights = [call.binary("sub", one, share), share]
    else:
        rest = call.binary("sub", one, share)
        weights = [_far(call, call.shifted(share, 1.0)), _near(call, share), _near(call, rest),
                   _far(call, call.shifted(rest, 1.0))]
    first = -1 if mode == "cubic" else 0
    offsets = call.shifted(call.cast(call.iota(len(weights)), share.dtype), first)
    stacked = call.concat([call.unsqueeze(each, [share.rank]) for each in weights], share.rank)
    return offsets, stacked


SHARPNESS = -0.75  # of the cubic kernel of Keys (doi 10.1109/TASSP.1981.1163711)


def _near(call: Builder, x: Node) -> Node:
    """The cubic kernel within 1: ((a + 2) x - (a + 3)) x x + 1."""
    inner = call.shifted(call.scaled(x, SHARPNESS + 2), -(SHARPNESS + 3))
    return call.shifted(call.binary("mul", call.binary("mul", inner, x), x), 1.0)


def _far(call: Builder, x: Node) -> Node:
    """The cubic kernel between 1 and 2: ((a x - 5 a) x + 8 a) x - 4 a."""
    a = SHARPNESS
    inner = call.shifted(call.scaled(x, a), -5 * a)
    inner = call.shifted(call.binary("mul", inner, x), 8 * a)
    return call.shifted(call.binary("mul", inner, x), -4 * a)


def interpolated(call: Builder, x: Node, taps: Sequence[Taps]) -> Node:
    """x[n, c, spatial..] -> [n, c, p]: sums over all combinations of the axes' neighbours."""
    index, weight = combined(call, taps, x.shape[2:])
    near = picked(call, x, index)
    weight = call.unsqueeze(weight, [1])
    total = call.reduce(
        "reduce_sum", call.binary("mul", call.cast(near, weight.dtype), weight), [3], keep=False)
    return call.cast(total, x.dtype)


def combined(call: Builder, taps: Sequence[Taps], extents: Sequence[Dim]) -> tuple[Node, Node]:
    """Flat indices and weights [n, p, combinations] of neighbours [n, p, taps] of every axis."""
    index, weight = taps[0].index, taps[0].weight
    for each, extent in zip(taps[1:], extents[1:], strict=True):
        index = call.binary("mul", index, call.dim(extent))
        index = _outer(call, "add", index, each.index)
        weight = _outer(call, "mul", weight, each.weight)
    return index, weight


def _outer(call: Builder, op: str, a: Node, b: Node) -> Node:
    """[n, p, j] and [n, p, k] -> [n, p, j * k]."""
    both = call.binary(op, call.unsqueeze(a, [3]), call.unsqueeze(b, [2]))
    return call.reshape(both, (*both.shape[:2], both.shape[2] * both.shape[3]))


def picked(call: Builder, x: Node, index: Node) -> Node:
    """x[n, c, spatial..] at flat indices [n, p, k] -> [n, c, p, k]."""
    batch, channels = x.shape[:2]
    flat = call.reshape(x, (batch, channels, dims.product(x.shape[2:])))
    points, count = index.shape[1:]
    wanted = call.reshape(index, (batch, 1, points * count))
    wanted = call.broadcast(wanted, (batch, channels, points * count))
    near = call.make("gather_elements", flat, wanted, axis=2)
    return call.reshape(near, (batch, channels, points, count))


# ---- AffineGrid ---------------------------------------------------------------------------------


@converter("AffineGrid", inputs=2)
def affine_grid(call: Call) -> Result:
    """theta[n, rank, rank + 1] times every place of an image (n, c, spatial..), last axis first."""
    theta = call.input(0)
    spatial = call.dims(1, "the size")[2:]
    rank = len(spatial)
    aligned = bool(call.attribute("align_corners", 0))
    dtype = wide(theta.dtype)
    columns = []
    for axis, extent in reversed(list(enumerate(spatial))):
        place = _centres(call, extent, aligned, dtype)
        place = call.reshape(place, (extent, *[1] * (rank - axis)))
        columns.append(call.broadcast(place, (*spatial, 1)))
    columns.append(call.full(1, (*spatial, 1), dtype))
    places = call.concat(columns, rank)
    flat = call.reshape(places, (dims.product(spatial), rank + 1))
    grid = call.matmul(flat, call.swap_last(call.cast(theta, dtype)))
    return call.cast(call.reshape(grid, (theta.shape[0], *spatial, rank)), theta.dtype)


def _centres(call: Builder, extent: Dim, aligned: bool, dtype: DType) -> Node:
    """An axis's places as -1..1: of its items' centres if aligned, else of its borders."""
    ramp = call.cast(call.iota(extent), dtype)
    if aligned:
        steps = call.cast(call.dim(dims.maximum(extent - 1, 1)), dtype)
        return call.shifted(call.binary("div", call.scaled(ramp, 2.0), steps), -1.0)
    doubled = call.shifted(call.scaled(ramp, 2.0), 1.0)
    return call.shifted(call.binary("div", doubled, call.cast(call.dim(extent), dtype)), -1.0)


# ---- RoiAlign -----------------------------------------------------------------------------------


@converter("RoiAlign", inputs=3)
def roi_align(call: Call) -> Result:
    """Each region of x[n, c, h, w], in output_height * output_width bins, each the mean (or
    maximum) of points in a regular grid."""
    x, rois, batch = call.input(0), call.input(1), call.input(2)
    mode = str(call.attribute("mode", "avg"))
    usual = "half_pixel" if call.version >= 16 else "output_half_pixel"
    place = str(call.attribute("coordinate_transformation_mode", usual))
    if mode not in ("avg", "max") or x.rank != 4:
        raise call.error(f"mode={mode!r} of a tensor of rank {x.rank} is not supported")
    half = place == "half_pixel"
    bins = (int(call.attribute("output_height", 1)), int(call.attribute("output_width", 1)))
    scaled = call.scaled(call.cast(rois, wide(rois.dtype)), call.attribute("spatial_scale", 1.0))
    scaled = call.shifted(scaled, -0.5) if half else scaled
    taps, counts = [], []
    for axis in range(2):
        start, stop = (call.reshape(call.slice_axis(scaled, 1, n, n + 1), (rois.shape[0],))
                       for n in (1 - axis, 3 - axis))
        size = call.binary("sub", stop, start)
        size = size if half else call.binary("max", size, call.scalar(1, size.dtype))
        found, count = _roi_taps(call, start, size, bins[axis], x.shape[2 + axis], axis)
        taps.append(found)
        counts.append(count)
    images = call.take(x, batch, 0)
    weighted = _weighted_points(call, images, taps)
    shape = [rois.shape[0], x.shape[1]]
    for axis in range(2):
        shape += [bins[axis], dims.floordiv(taps[axis].index.shape[1], bins[axis])]
    if mode == "avg":
        points = call.reduce("reduce_sum", weighted, [4, 5], keep=False)
        total = call.reduce("reduce_sum", call.reshape(points, shape), [3, 5], keep=False)
        count = call.binary("max", call.binary("mul", *counts), call.scalar(1, total.dtype))
        mean = call.binary("div", total, call.reshape(count, (rois.shape[0], 1, 1, 1)))
        return call.cast(mean, x.dtype)
    points = call.reduce("reduce_max", weighted, [4, 5], keep=False)
    best = call.reduce("reduce_max", call.reshape(points, shape), [3, 5], keep=False)
    return call.cast(best, x.dtype)


def _roi_taps(
    call: Call, start: Node, size: Node, bins: int, extent: Dim, axis: int
) -> tuple[Taps, Node]:
    """Neighbours [rois, bins * points, 2] of one axis, and how many points a bin of each has."""
    step = call.scaled(size, 1 / bins)
    ratio = int(call.attribute("sampling_ratio", 0))
    rois = start.shape[0]
    if ratio > 0:
        count, most = call.full(ratio, (rois,), step.dtype), ratio
    else:  # as many points as the bin has items
        count = call.unary("ceil", step)
        largest = call.cast(call.reduce("reduce_max", count, [0], keep=False), i64)
        most = max(int(call.measured(f"points of axis {axis}", largest)), 1)
    column = [call.reshape(each, (rois, 1, 1)) for each in (start, step, count)]
    point = call.cast(call.iota(most), step.dtype)
    bin_ = call.reshape(call.cast(call.iota(bins), step.dtype), (bins, 1))
    inner = call.binary("div", call.binary("mul", call.shifted(point, 0.5), column[1]), column[2])
    place = call.binary("add", column[0], call.binary("mul", bin_, column[1]))
    place = call.binary("add", place, inner)
    counted = call.binary("less", point, column[2])
    counted = call.binary("and", counted, _near_image(call, place, extent))
    flat = (rois, bins * most)
    place, counted = call.reshape(place, flat), call.reshape(counted, flat)
    found = axis_taps(call, place, extent, "linear", ("border", False))
    zero = call.scalar(0, found.weight.dtype)
    return Taps(found.index, call.where(call.unsqueeze(counted, [2]), found.weight, zero)), count


def _near_image(call: Builder, place: Node, extent: Dim) -> Node:
    """Whether places are at most one item outside."""
    above = call.binary("greater_equal", place, call.scalar(-1, place.dtype))
    last = call.cast(call.dim(extent), place.dtype)
    return call.binary("and", above, call.binary("less_equal", place, last))


def _weighted_points(call: Builder, images: Node, taps: Sequence[Taps]) -> Node:
    """images[r, c, h, w] at all pairs of rows and columns -> [r, c, rows, columns, 2, 2]."""
    rows, columns = taps
    shape = (images.shape[0], rows.index.shape[1], columns.index.shape[1], 2, 2)
    place = call.binary("mul", rows.index, call.dim(images.shape[3]))
    index = call.binary("add", call.unsqueeze(place, [2, 4]), call.unsqueeze(columns.index, [1, 3]))
    weight = call.binary(
        "mul", call.unsqueeze(rows.weight, [2, 4]), call.unsqueeze(columns.weight, [1, 3]))
    flat = call.reshape(index, (shape[0], dims.product(shape[1:]), 1))
    near = call.reshape(picked(call, images, flat), (shape[0], images.shape[1], *shape[1:]))
    return call.binary("mul", call.cast(near, weight.dtype), call.unsqueeze(weight, [1]))


# ---- DeformConv ---------------------------------------------------------------------------------


@converter("DeformConv", inputs=(3, 5))
def deform_conv(call: Call) -> Result:
    """A convolution each of whose kernel's items is read `offset` away from its place."""
    x, weight, offset = call.input(0), call.input(1), call.input(2)
    spatial = spatial_axes(call, x)
    kernel = kernel_shape(call, weight)
    parts, rank = int(call.attribute("offset_group", 1)), len(spatial)
    out, items = offset.shape[2:], dims.product(kernel)
    batch, channels = x.shape[:2]
    rows = (batch * parts, items * dims.product(out))
    split = call.reshape(offset, (batch * parts, *kernel, rank, *out))
    pads = list(call.attribute("pads", [0] * (2 * rank)))
    strides, dilations = per_axis(call, "strides", rank), per_axis(call, "dilations", rank)
    taps = []
    for axis in range(rank):
        away = call.slice_axis(split, 1 + rank, axis, axis + 1)
        away = call.cast(call.reshape(away, (batch * parts, *kernel, *out)), wide(x.dtype))
        inner = call.scaled(call.iota(kernel[axis]), dilations[axis])
        inner = call.reshape(inner, (kernel[axis], *[1] * (2 * rank - 1 - axis)))
        begin = call.shifted(call.scaled(call.iota(out[axis]), strides[axis]), -pads[axis])
        begin = call.reshape(begin, (out[axis], *[1] * (rank - 1 - axis)))
        place = call.cast(call.binary("add", inner, begin), away.dtype)
        place = call.reshape(call.binary("add", place, away), rows)
        taps.append(axis_taps(call, place, x.shape[2 + axis], "linear", ("zeros", True)))
    each = call.divide(channels, parts)
    images = call.reshape(x, (batch * parts, each, *x.shape[2:]))
    seen = call.reshape(interpolated(call, images, taps), (batch, parts, each, *rows[1:]))
    if call.has(4):
        mask = call.reshape(call.input(4), (batch, parts, 1, *rows[1:]))
        seen = call.binary("mul", seen, mask)
    return _product(call, seen, weight, (batch, items, out))


def _product(
    call: Call, seen: Node, weight: Node, sizes: tuple[Dim, Dim, tuple[Dim, ...]]
) -> Node:
    """What the kernels saw, [batch, channels, items, out..] in any shape, times the weights."""
    batch, items, out = sizes
    count = groups(call)
    outputs, each = weight.shape[:2]
    rows = call.reshape(seen, (batch, count, each * items, dims.product(out)))
    matrices = call.reshape(weight, (count, call.divide(outputs, count), each * items))
    result = call.reshape(call.matmul(matrices, rows), (batch, outputs, *out))
    if not call.has(3):
        return result
    bias = call.input(3)
    return call.binary("add", result, call.reshape(bias, (bias.shape[0], *[1] * len(out))))
