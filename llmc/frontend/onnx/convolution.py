"""Convolutions of any number of spatial axes, as windows times a matrix."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.quantization import centred, integer_range
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.windows import (
    WindowAxis,
    per_axis,
    spatial_axes,
    window_axes,
    windows,
)
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType, f32, i32
from llmc.ir.graph import Node


@converter("Conv", inputs=(2, 3))
def conv(call: Call) -> Result:
    x, weight = call.input(0), call.input(1)
    axes = window_axes(call, _spatial(call, x), kernel_shape(call, weight))
    return convolve(call, x, weight, axes, groups(call), call.optional(2))


@converter("ConvInteger", inputs=(2, 4))
def conv_integer(call: Call) -> Result:
    """i32 convolution of centred codes; outside the axes lies the zero point."""
    x, weight = call.input(0), call.input(1)
    axes = window_axes(call, _spatial(call, x), kernel_shape(call, weight))
    x_zero = _per_tensor(call, call.optional(2))
    w_zero = _per_channel(call, call.optional(3), weight)
    x, weight = centred(call, x, x_zero, i32), centred(call, weight, w_zero, i32)
    return convolve(call, x, weight, axes, groups(call))


@converter("QLinearConv", inputs=(8, 9))
def quantized_conv(call: Call) -> Result:
    """An integer convolution whose sums are scaled and rounded to codes."""
    x, weight = call.input(0), call.input(3)
    axes = window_axes(call, _spatial(call, x), kernel_shape(call, weight))
    x_zero = _per_tensor(call, call.input(2))
    w_zero = _per_channel(call, call.input(5), weight)
    codes = centred(call, x, x_zero, i32), centred(call, weight, w_zero, i32)
    total = convolve(call, *codes, axes, groups(call), call.optional(8))
    x_scale, y_scale = _per_tensor(call, call.input(1)), _per_tensor(call, call.input(6))
    zero = _per_tensor(call, call.input(7))
    if x_scale is None or y_scale is None or zero is None:
        raise call.error("a scale or zero point is missing")
    w_scale = call.input(4)
    if dims.product(w_scale.shape) == 1:
        w_scale = call.reshape(w_scale, ())
    else:
        w_scale = call.reshape(w_scale, [w_scale.shape[0]] + [1] * len(axes))
    scale = call.binary("div", call.binary("mul", x_scale, w_scale), y_scale)
    rounded = call.unary("round", call.binary("mul", call.cast(total, f32), call.cast(scale, f32)))
    shifted = call.binary("add", rounded, call.cast(zero, f32))
    low, high = (call.scalar(limit, f32) for limit in integer_range(zero.dtype))
    return call.cast(call.clamp(shifted, low, high), zero.dtype)


@converter("ConvTranspose", inputs=(2, 3))
def conv_transpose(call: Call) -> Result:
    """A convolution of x, spread out by the strides, with the mirrored kernel."""
    x, weight = call.input(0), call.input(1)
    spatial = _spatial(call, x)
    kernel = kernel_shape(call, weight)
    strides = per_axis(call, "strides", len(spatial))
    dilations = per_axis(call, "dilations", len(spatial))
    pads = transposed_pads(call, spatial, kernel, strides, dilations)
    x = spread(call, x, strides)
    axes = []
    for axis, (low, high) in enumerate(pads):
        reach = (kernel[axis] - 1) * dilations[axis]
        low, high = reach - low, reach - high
        x = _cropped(call, x, axis + 2, low, high)
        extent, low, high = x.shape[axis + 2], max(low, 0), max(high, 0)
        count = extent + low + high - reach
        axes.append(WindowAxis(extent, kernel[axis], 1, dilations[axis], low, high, count))
    count = groups(call)
    return convolve(call, x, mirrored(call, weight, count), axes, count, call.optional(2))


def transposed_pads(
    call: Call,
    spatial: Sequence[Dim],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """What is cut from both ends of each axis (negative at the end: zeros are added)."""
    rank = len(spatial)
    extra = list(call.attribute("output_padding", [0] * rank))
    given = list(call.attribute("pads", [0] * (2 * rank)))
    wanted = call.attribute("output_shape")
    wanted = None if wanted is None else list(wanted)[-rank:]
    automatic = str(call.attribute("auto_pad", "NOTSET"))
    result = []
    for axis, extent in enumerate(spatial):
        low, high = given[axis], given[axis + rank]
        if wanted is not None or automatic.startswith("SAME"):
            full = strides[axis] * (extent - 1) + extra[axis] + 1
            full = full + (kernel[axis] - 1) * dilations[axis]
            target = wanted[axis] if wanted is not None else extent * strides[axis]
            total = full - target
            if not isinstance(total, int):
                raise call.error("output_shape or auto_pad needs known sizes")
            less, more = total // 2, total - total // 2
            low, high = (less, more) if automatic == "SAME_UPPER" else (more, less)
        result.append((low, high - extra[axis]))
    return result


def spread(call: Builder, x: Node, strides: Sequence[int]) -> Node:
    """x with stride - 1 zeros between the items of its last axes."""
    zero = call.scalar(0, x.dtype)
    for axis, stride in enumerate(strides, x.rank - len(strides)):
        if stride == 1:
            continue
        extent = x.shape[axis]
        high = [0] * (x.rank + 1)
        high[axis + 1] = stride - 1
        wide = call.unsqueeze(x, [axis + 1])
        wide = call.make("pad", wide, zero, low=(0,) * (x.rank + 1), high=tuple(high))
        flat = call.reshape(wide, (*x.shape[:axis], extent * stride, *x.shape[axis + 1 :]))
        x = call.slice_axis(flat, axis, 0, (extent - 1) * stride + 1)
    return x


def _cropped(call: Builder, x: Node, axis: int, low: int, high: int) -> Node:
    """x without what negative paddings cut away."""
    return call.slice_axis(x, axis, max(-low, 0), x.shape[axis] - max(-high, 0))


def mirrored(call: Builder, weight: Node, count: int) -> Node:
    """[c, m / groups, k..] -> [m, c / groups, k..] with every k backwards."""
    inputs, outputs, *kernel = weight.shape
    backwards: dict[int, tuple[Dim, Dim, int]] = {
        axis: (0, weight.shape[axis], -1) for axis in range(2, weight.rank)
    }
    weight = call.slice_axes(weight, backwards) if any(k != 1 for k in kernel) else weight
    each = call.divide(inputs, count)
    grouped = call.reshape(weight, (count, each, outputs, *kernel))
    swapped = call.transpose(grouped, [0, 2, 1, *range(3, grouped.rank)])
    return call.reshape(swapped, (count * outputs, each, *kernel))


def convolve(
    call: Builder,
    x: Node,
    weight: Node,
    axes: Sequence[WindowAxis],
    count: int,
    bias: Node | None = None,
) -> Node:
    """x[n, c, spatial..] with weight[m, c / groups, kernel..] -> [n, m, counts..]."""
    batch, channels = x.shape[:2]
    outputs, each = weight.shape[:2]
    call.require_equal(each * count, channels, "channels of input and weight")
    seen = windows(call, x, axes, call.scalar(0, x.dtype))
    if each == 1 and outputs == channels and count != 1:
        product = _depthwise(call, seen, weight, len(axes))
        return product if bias is None else call.binary("add", product, _column(call, bias, axes))
    counts, kernels = seen.shape[2 : 2 + len(axes)], seen.shape[2 + len(axes) :]
    width = each * dims.product(kernels)
    if count == 1:
        order = [0, *range(2, 2 + len(axes)), 1, *range(2 + len(axes), seen.rank)]
        rows = call.reshape(call.transpose(seen, order), (batch, *counts, width))
        matrix = call.swap_last(call.reshape(weight, (outputs, width)))
        product = call.matmul(rows, matrix, accumulator(x.dtype))
        product = product if bias is None else call.binary("add", product, bias)
        return call.transpose(product, [0, product.rank - 1, *range(1, product.rank - 1)])
    product = _grouped(call, seen, weight, len(axes), count)
    return product if bias is None else call.binary("add", product, _column(call, bias, axes))


def _grouped(call: Builder, seen: Node, weight: Node, spatial: int, count: int) -> Node:
    """A matrix product for each group of channels."""
    batch, outputs, each = seen.shape[0], *weight.shape[:2]
    counts, kernels = seen.shape[2 : 2 + spatial], seen.shape[2 + spatial :]
    width, parts = each * dims.product(kernels), call.divide(outputs, count)
    split = call.reshape(seen, (batch, count, each, *counts, *kernels))
    order = [0, 1, *range(3, 3 + spatial), 2, *range(3 + spatial, split.rank)]
    rows = call.transpose(split, order)
    rows = call.reshape(rows, (batch, count, dims.product(counts), width))
    matrices = call.swap_last(call.reshape(weight, (count, parts, width)))
    product = call.matmul(rows, matrices, accumulator(seen.dtype))
    return call.reshape(call.swap_last(product), (batch, outputs, *counts))


def _depthwise(call: Builder, seen: Node, weight: Node, spatial: int) -> Node:
    """Every channel with a kernel of its own: products summed, no matrix."""
    channels, _, *kernels = weight.shape
    factors = call.reshape(weight, (channels, *[1] * spatial, *kernels))
    product = call.binary("mul", seen, factors)
    return call.reduce("reduce_sum", product, range(2 + spatial, seen.rank), keep=False)


def _column(call: Builder, bias: Node, axes: Sequence[WindowAxis]) -> Node:
    """A bias per channel, to be added to [n, m, counts..]."""
    return call.reshape(bias, (bias.shape[0], *[1] * len(axes)))


def accumulator(dtype: DType) -> DType:
    """The dtype of a product: integers are summed in i32."""
    return i32 if dtype.is_integer else dtype


def groups(call: Call) -> int:
    """The groups that channels are in."""
    count = int(call.attribute("group", 1))
    if count < 1:
        raise call.error(f"group={count}")
    return count


def kernel_shape(call: Call, weight: Node) -> list[int]:
    """The kernel's extents, which the weight has too."""
    extents = list(weight.shape[2:])
    given = list(call.attribute("kernel_shape", extents))
    if len(given) != len(extents):
        raise call.error(f"kernel_shape={given} for a weight of {weight.rank} axes")
    for wanted, extent in zip(given, extents, strict=True):
        call.require_equal(extent, wanted, "kernel_shape")
    return [int(extent) for extent in given]


def _spatial(call: Call, x: Node) -> list[Dim]:
    return [x.shape[axis] for axis in spatial_axes(call, x)]


def _per_tensor(call: Call, value: Node | None) -> Node | None:
    """A scale or zero point of a whole tensor, as a scalar."""
    return None if value is None else call.reshape(value, ())


def _per_channel(call: Call, zero: Node | None, weight: Node) -> Node | None:
    """Zero points of a weight [m, ...]: one, or one for each m."""
    if zero is None or dims.product(zero.shape) == 1:
        return _per_tensor(call, zero)
    return call.reshape(zero, [zero.shape[0]] + [1] * (weight.rank - 1))
