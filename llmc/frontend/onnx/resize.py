"""Resize and Upsample: along each axis a gather of neighbours and their weighted sum.

Sizes decide the tables of neighbours, so they have to be known where code is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.turns import known_extent
from llmc.ir.dims import Dim
from llmc.ir.dtypes import f32, i32
from llmc.ir.graph import Node

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Table:
    """`index[size, taps]` of neighbours; `weight` likewise, None for the one neighbour's value;
    `outside[size]`: where the result is the extrapolation value, None for nowhere."""

    index: Array
    weight: Array | None
    outside: Array | None = None


@dataclass(frozen=True)
class Sampling:
    """How one axis of `extent` items becomes one of `size`. `scale` is their ratio before it was
    rounded, `region` the part of the axis to look at, from 0 to 1."""

    extent: int
    size: int
    scale: float
    region: tuple[float, float]


@converter("Upsample", inputs=(1, 2))
def upsample(call: Call) -> Result:
    x = call.input(0)
    scales = call.required("scales") if call.version < 9 else call.known(1, "scales").reshape(-1)
    axes = range(x.rank)
    samplings = scaled_axes(call, x, axes, scales, None)
    if str(call.attribute("mode", "nearest")) == "nearest":
        return resized(call, x, axes, [nearest(s, "asymmetric", "floor") for s in samplings])
    return resized(call, x, axes, [linear(s, "asymmetric", False, False) for s in samplings])


@converter("Resize", inputs=(1, 4))
def resize(call: Call) -> Result:
    x = call.input(0)
    given = call.attribute("axes")
    axes = [call.axis(axis, x.rank) for axis in given] if given is not None else range(x.rank)
    simple = call.version < 11
    place = str(call.attribute(
        "coordinate_transformation_mode", "asymmetric" if simple else "half_pixel"))
    scales_at = 1 if simple else 2
    region = None
    if place == "tf_crop_and_resize":
        region = call.known(1, "roi").reshape(-1).astype(np.float64).tolist()
    scales = call.known(scales_at, "scales").reshape(-1) if call.has(scales_at) else np.zeros(0)
    if scales.size:
        samplings = scaled_axes(call, x, axes, scales, region)
    else:
        samplings = sized_axes(call, x, axes, region)
    samplers = table_of(call, place, "floor" if simple else "round_prefer_floor")
    return resized(call, x, axes, [samplers(sampling) for sampling in samplings])


def table_of(call: Call, place: str, rounding: str) -> Any:
    """The function from an axis's sampling to its table, by the node's attributes."""
    mode = str(call.attribute("mode", "nearest"))
    antialias = bool(call.attribute("antialias", 0))
    exclude = bool(call.attribute("exclude_outside", 0))
    if place not in PLACES:
        raise call.error(f"coordinate_transformation_mode={place!r} is not supported")
    if mode == "nearest":
        rounding = str(call.attribute("nearest_mode", rounding))
        if rounding not in ROUNDINGS:
            raise call.error(f"nearest_mode={rounding!r} is not supported")
        return lambda sampling: nearest(sampling, place, rounding)
    if mode == "linear":
        return lambda sampling: linear(sampling, place, antialias, exclude)
    if mode != "cubic":
        raise call.error(f"mode={mode!r} is not supported")
    sharpness = float(call.attribute("cubic_coeff_a", -0.75))
    return lambda sampling: cubic(sampling, place, antialias, exclude, sharpness)


def _regions(call: Call, count: int, region: list[float] | None) -> list[tuple[float, float]]:
    if region is None:
        return [(0.0, 1.0)] * count
    if len(region) != 2 * count:
        raise call.error(f"roi has {len(region)} items for {count} axes")
    return list(zip(region[:count], region[count:], strict=True))


def scaled_axes(
    call: Call, x: Node, axes: Sequence[int], scales: Any, region: list[float] | None
) -> list[Sampling]:
    factors = [float(scale) for scale in scales]
    if len(factors) != len(axes) or min(factors, default=1) <= 0:
        raise call.error(f"scales {factors} do not fit {len(axes)} axes")
    result = []
    for axis, scale, part in zip(axes, factors, _regions(call, len(axes), region), strict=True):
        if scale == 1 and region is None:
            result.append(Sampling(0, 0, 1.0, part))
            continue
        extent = known_extent(call, x.shape[axis], f"size of axis {axis}")
        size = int(np.floor(extent * scale * (part[1] - part[0])))
        result.append(Sampling(extent, size, scale, part))
    return result


def sized_axes(
    call: Call, x: Node, axes: Sequence[int], region: list[float] | None
) -> list[Sampling]:
    sizes = call.dims(3, "sizes")
    policy = str(call.attribute("keep_aspect_ratio_policy", "stretch"))
    if len(sizes) != len(axes) or policy not in ("stretch", "not_larger", "not_smaller"):
        raise call.error(f"{len(sizes)} sizes for {len(axes)} axes, policy {policy!r}")
    parts = _regions(call, len(axes), region)
    if policy == "stretch":
        return [_sized(call, x, *each, region is None)
                for each in zip(axes, sizes, parts, strict=True)]
    extents = [known_extent(call, x.shape[axis], f"size of axis {axis}") for axis in axes]
    wanted = call.integers(3, "sizes")
    ratios = [size / extent for size, extent in zip(wanted, extents, strict=True)]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [Sampling(extent, int(scale * extent + 0.5), scale, part)
            for extent, part in zip(extents, parts, strict=True)]


def _sized(
    call: Call, x: Node, axis: int, size: Dim, part: tuple[float, float], whole: bool
) -> Sampling:
    if whole and size == x.shape[axis]:
        return Sampling(0, 0, 1.0, part)
    if not isinstance(size, int):
        size = known_extent(call, size, f"new size of axis {axis}")
    extent = known_extent(call, x.shape[axis], f"size of axis {axis}")
    return Sampling(extent, size, size / extent if extent else 1.0, part)


def resized(call: Call, x: Node, axes: Sequence[int], tables: Sequence[Table | None]) -> Node:
    """x with every table applied along its axis; None leaves an axis as it is."""
    dtype = x.dtype
    outside: Node | None = None
    for axis, table in zip(axes, tables, strict=True):
        if table is None:
            continue
        x = _interpolated(call, x, axis, table)
        if table.outside is not None and table.outside.any():
            mask = call.constant(table.outside)
            mask = call.reshape(mask, (table.outside.size, *[1] * (x.rank - 1 - axis)))
            outside = mask if outside is None else call.binary("or", outside, mask)
    if outside is not None:
        value = call.scalar(float(call.attribute("extrapolation_value", 0.0)), x.dtype)
        x = call.where(outside, value, x)
    return call.cast(x, dtype)


def _interpolated(call: Builder, x: Node, axis: int, table: Table) -> Node:
    """The weighted sum of each place's neighbours, in f32 or wider."""
    size, taps = table.index.shape
    index = call.constant(table.index if taps > 1 else table.index.reshape(size), i32)
    if table.weight is None:
        return call.make("gather", x, index, axis=axis)
    wide = x if x.dtype.is_float and x.dtype.bits >= 32 else call.cast(x, f32)
    near = call.make("gather", wide, index, axis=axis)
    weight = call.constant(table.weight.astype(wide.dtype.numpy))
    weight = call.reshape(weight, (size, taps, *[1] * (x.rank - 1 - axis)))
    return call.reduce("reduce_sum", call.binary("mul", near, weight), [axis + 1], keep=False)


# ---- where a place of the result lies in the input ----------------------------------------------


def _half_pixel(s: Sampling, y: Array) -> Array:
    return (y + 0.5) / s.scale - 0.5


def _pytorch_half_pixel(s: Sampling, y: Array) -> Array:
    return _half_pixel(s, y) if s.scale * s.extent != 1 else np.full(y.shape, -0.5)


def _half_pixel_symmetric(s: Sampling, y: Array) -> Array:
    adjustment = s.size / (s.scale * s.extent)
    return s.extent / 2 * (1 - adjustment) + _half_pixel(s, y)


def _align_corners(s: Sampling, y: Array) -> Array:
    width = s.scale * s.extent
    return y * (s.extent - 1) / (width - 1) if width != 1 else np.zeros(y.shape)


def _asymmetric(s: Sampling, y: Array) -> Array:
    return y / s.scale


def _crop(s: Sampling, y: Array) -> Array:
    start, end = s.region
    width, span = s.scale * s.extent, (end - start) * (s.extent - 1)
    inside = y * span / (width - 1) if width != 1 else np.full(y.shape, span / 2)
    return inside + start * (s.extent - 1)


PLACES = {
    "half_pixel": _half_pixel,
    "pytorch_half_pixel": _pytorch_half_pixel,
    "half_pixel_symmetric": _half_pixel_symmetric,
    "align_corners": _align_corners,
    "asymmetric": _asymmetric,
    "tf_crop_and_resize": _crop,
}
ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _placed(s: Sampling, place: str) -> tuple[Array, Array | None]:
    """The coordinates, and which of them have no value."""
    x = PLACES[place](s, np.arange(s.size, dtype=np.float64))
    outside = (x < 0) | (x > s.extent - 1) if place == "tf_crop_and_resize" else None
    return x, outside


def nearest(s: Sampling, place: str, rounding: str) -> Table | None:
    """The neighbour that the rounding chooses."""
    if not s.extent:
        return None
    x, outside = _placed(s, place)
    index = np.clip(ROUNDINGS[rounding](x), 0, s.extent - 1).astype(np.int32)
    return Table(index[:, None], None, outside)


def linear(s: Sampling, place: str, antialias: bool, exclude: bool) -> Table | None:
    """Two neighbours, or as many as shrinking takes in."""
    return _weighted(s, place, 1, lambda x: np.clip(1 - np.abs(x), 0, 1), antialias, exclude)


def cubic(
    s: Sampling, place: str, antialias: bool, exclude: bool, sharpness: float
) -> Table | None:
    """Four neighbours, by the kernel of Keys with parameter `sharpness`."""

    def kernel(x: Array) -> Array:
        a, x = sharpness, np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return _weighted(s, place, 2, kernel, antialias, exclude)


def _weighted(
    s: Sampling, place: str, radius: int, kernel: Any, antialias: bool, exclude: bool
) -> Table | None:
    """Neighbours within `radius` (more where shrinking widens the kernel), weights summing to 1."""
    if not s.extent:
        return None
    x, outside = _placed(s, place)
    shrink = min(s.scale, 1.0) if antialias else 1.0
    base = np.ceil(x) - 1  # the neighbour strictly to the left
    first = int(np.floor(-radius / shrink) + 1)
    offsets = np.arange(first, 2 - first)
    index = base[:, None] + offsets
    weight = kernel((index - x[:, None]) * shrink)
    if antialias:
        weight = weight / weight.sum(1, keepdims=True)
    if exclude:
        weight = np.where((index < 0) | (index >= s.extent), 0.0, weight)
        weight = weight / weight.sum(1, keepdims=True)
    index = np.clip(index, 0, s.extent - 1).astype(np.int32)
    return Table(index, weight, outside)
