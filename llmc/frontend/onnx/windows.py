"""Sliding windows: what convolutions and poolings have in common.

A window's items are read in place of an im2col copy: along each axis as a slice, a reshape (where
windows lie side by side) or a gather whose index is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.graph import Node

PADDINGS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


@dataclass(frozen=True)
class WindowAxis:
    """Windows along one axis of `extent` items: `count` of them, each of `kernel` items that are
    `dilation` apart, the first `low` items before the axis begins, each next `stride` further.
    `high` is the padding that was asked for behind the axis; the last window may go beyond it."""

    extent: Dim
    kernel: int
    stride: int
    dilation: int
    low: Dim
    high: Dim
    count: Dim

    @property
    def reach(self) -> int:
        """Items from a window's first to its last, both included."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def behind(self) -> Dim:
        """Items that the last window takes from behind the axis."""
        end = (self.count - 1) * self.stride + self.reach
        return dims.maximum(end - self.extent - self.low, 0)


def window_axes(
    call: Call, extents: Sequence[Dim], kernel: Sequence[int], ceil_mode: bool = False
) -> list[WindowAxis]:
    """The windows that strides, dilations, pads and auto_pad describe, for each spatial axis."""
    rank = len(extents)
    strides, dilations = per_axis(call, "strides", rank), per_axis(call, "dilations", rank)
    automatic = str(call.attribute("auto_pad", "NOTSET"))
    if automatic not in PADDINGS:
        raise call.error(f"auto_pad={automatic!r} is not one of {', '.join(PADDINGS)}")
    pads = list(call.attribute("pads", [0] * (2 * rank)))
    if len(kernel) != rank or len(pads) != 2 * rank or min(pads, default=0) < 0:
        raise call.error(f"kernel {list(kernel)} and pads {pads} do not fit {rank} axes")
    axes = []
    for axis, extent in enumerate(extents):
        low, high = (pads[axis], pads[axis + rank]) if automatic == "NOTSET" else (0, 0)
        window = (int(kernel[axis]), strides[axis], dilations[axis])
        if automatic.startswith("SAME"):
            axes.append(_same(extent, window, automatic == "SAME_UPPER"))
        else:
            axes.append(_counted(extent, window, (low, high), ceil_mode))
    return axes


def per_axis(call: Call, name: str, rank: int) -> list[int]:
    """An attribute of positive integers, one for each spatial axis; 1 by default."""
    given = [int(item) for item in call.attribute(name, [1] * rank)]
    if len(given) != rank or min(given, default=1) < 1:
        raise call.error(f"{name}={given} does not fit {rank} axes")
    return given


def _same(extent: Dim, window: tuple[int, int, int], upper: bool) -> WindowAxis:
    """As many windows as strides; what is padded is shared by both ends."""
    kernel, stride, dilation = window
    count = dims.ceildiv(extent, stride)
    reach = (kernel - 1) * dilation + 1
    total = dims.maximum((count - 1) * stride + reach - extent, 0)
    less, more = total // 2, total - total // 2
    low, high = (less, more) if upper else (more, less)
    return WindowAxis(extent, kernel, stride, dilation, low, high, count)


def _counted(
    extent: Dim, window: tuple[int, int, int], pads: tuple[int, int], ceil_mode: bool
) -> WindowAxis:
    kernel, stride, dilation = window
    room = extent + sum(pads) - ((kernel - 1) * dilation + 1)
    count = dims.floordiv(room, stride) + 1
    if ceil_mode:  # a window that begins behind the axis does not count
        count = dims.minimum(dims.ceildiv(room, stride) + 1, dims.ceildiv(extent + pads[0], stride))
    return WindowAxis(extent, kernel, stride, dilation, *pads, count)


def padded(call: Builder, x: Node, axes: Sequence[WindowAxis], fill: Node) -> Node:
    """x[..., spatial] with what the windows take from outside its last axes."""
    first = x.rank - len(axes)
    low = [0] * first + [axis.low for axis in axes]
    high = [0] * first + [axis.behind for axis in axes]
    if not any(low) and not any(high):
        return x
    return call.make("pad", x, fill, low=tuple(low), high=tuple(high))


def windows(call: Builder, x: Node, axes: Sequence[WindowAxis], fill: Node) -> Node:
    """x[a.., spatial..] -> [a.., counts.., kernels..], `fill` (a scalar) outside the axes."""
    x = padded(call, x, axes, fill)
    first = x.rank - len(axes)
    for place, axis in reversed(list(enumerate(axes, first))):
        x = _unfolded(call, x, place, axis)
    spatial = range(first, x.rank)
    return call.transpose(x, [*range(first), *spatial[::2], *spatial[1::2]])


def _unfolded(call: Builder, x: Node, place: int, axis: WindowAxis) -> Node:
    """One axis into [count, kernel]."""
    shape = (*x.shape[:place], axis.count, axis.kernel, *x.shape[place + 1 :])
    covered = axis.count * axis.kernel
    if axis.kernel == axis.stride and axis.dilation == 1:
        return call.reshape(call.slice_axis(x, place, 0, covered), shape)
    if axis.kernel == 1:
        last = (axis.count - 1) * axis.stride + 1
        return call.reshape(call.slice_axis(x, place, 0, last, axis.stride), shape)
    first = call.unsqueeze(call.scaled(call.iota(axis.count), axis.stride), [1])
    index = call.binary("add", first, call.scaled(call.iota(axis.kernel), axis.dilation))
    return call.make("gather", x, index, axis=place)


def spatial_axes(call: Call, x: Node) -> range:
    """All axes of [batch, channels, spatial..] but the first two."""
    if x.rank < 3:
        raise call.error(f"its input has {x.rank} axes; it needs batch, channels and one more")
    return range(2, x.rank)
