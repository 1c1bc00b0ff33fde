"""Fourier transforms as matrix products, windows, and mel filters."""

from __future__ import annotations

import math

import numpy as np

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.protobuf import element_dtype
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import f64, i64
from llmc.ir.graph import Node

Complex = tuple[Node, Node | None]  # real and imaginary part; None: zero


@converter("DFT", inputs=(1, 3))
def dft(call: Call) -> Result:
    x = call.input(0)
    if call.version >= 20:
        axis = call.integers(2, "axis")[0] if call.has(2) else -2
    else:
        axis = call.attribute("axis", 1)
    axis = call.axis(axis, x.rank)
    inverse, onesided = call.attribute("inverse", 0), call.attribute("onesided", 0)
    length = call.dims(1, "dft_length")[0] if call.has(1) else None
    if inverse and onesided:
        return real_inverse(call, x, axis, length)
    length = x.shape[axis] if length is None else length
    return transform(call, fitted(call, x, axis, length), axis, bool(inverse), bool(onesided))


def transform(call: Call, x: Node, axis: int, inverse: bool, onesided: bool) -> Node:
    """The transform of x [.., n along axis, .., 1 or 2] -> [.., n or n // 2 + 1, .., 2]; in f64, as
    its sums cancel."""
    dtype, x = x.dtype, call.cast(x, f64)
    length = x.shape[axis]
    real, imaginary = parts(call, x, axis)
    columns = dims.floordiv(length, 2) + 1 if onesided else length
    cosine, sine = waves(call, length, length, columns)
    sine = sine if inverse else call.unary("neg", sine)
    turned, bent = call.matmul(real, cosine), call.matmul(real, sine)
    if imaginary is not None:
        turned = call.binary("sub", turned, call.matmul(imaginary, sine))
        bent = call.binary("add", bent, call.matmul(imaginary, cosine))
    both = call.concat([call.unsqueeze(each, [each.rank]) for each in (turned, bent)], turned.rank)
    if inverse:
        both = call.binary("div", both, call.dim(length, x.dtype))
    return call.cast(back(call, both, axis), dtype)


def real_inverse(call: Call, x: Node, axis: int, length: Dim | None) -> Node:
    """The real signal of a one-sided spectrum: its other side is the mirror image's conjugate."""
    length = 2 * (x.shape[axis] - 1) if length is None else length
    half = dims.floordiv(length, 2) + 1
    dtype, x = x.dtype, call.cast(x, f64)
    real, imaginary = parts(call, fitted(call, x, axis, half), axis)
    cosine, sine = waves(call, length, half, length)
    place = call.iota(half)
    alone = call.binary("equal", place, call.scalar(0, i64))  # what has no mirror image counts once
    middle = call.binary("equal", call.scaled(place, 2), call.dim(length))
    counts = call.where(call.binary("or", alone, middle), call.scalar(1, x.dtype),
                        call.scalar(2, x.dtype))
    total = call.matmul(call.binary("mul", real, counts), cosine)
    if imaginary is not None:
        bent = call.matmul(call.binary("mul", imaginary, counts), sine)
        total = call.binary("sub", total, bent)
    total = call.binary("div", total, call.dim(length, x.dtype))
    return call.cast(back(call, call.unsqueeze(total, [total.rank]), axis), dtype)


def parts(call: Call, x: Node, axis: int) -> Complex:
    """Real and imaginary part, with the axis last."""
    count = x.shape[-1]
    if x.rank < 2 or axis == x.rank - 1 or count not in (1, 2):
        raise call.error("its input must have 1 or 2 (real, imaginary) as last axis")
    order = [*(each for each in range(x.rank - 1) if each != axis), axis]
    found = []
    for part in range(count):
        one = call.slice_axis(x, x.rank - 1, part, part + 1)
        found.append(call.transpose(call.reshape(one, x.shape[:-1]), order))
    return found[0], found[1] if count == 2 else None


def back(call: Call, x: Node, axis: int) -> Node:
    """[.., n, parts] with the transformed axis where it was."""
    order = list(range(x.rank))
    order.insert(axis, order.pop(x.rank - 2))
    return call.transpose(x, order)


def waves(call: Call, length: Dim, rows: Dim, columns: Dim) -> tuple[Node, Node]:
    """cos and sin of 2 pi j k / length [rows, columns]; j k is reduced while it is an integer."""
    product = call.binary("mul", call.unsqueeze(call.iota(rows), [1]), call.iota(columns))
    phase = call.cast(call.binary("mod", product, call.dim(length)), f64)
    angle = call.binary("div", call.scaled(phase, 2 * math.pi), call.dim(length, f64))
    return call.unary("cos", angle), call.unary("sin", angle)


def fitted(call: Call, x: Node, axis: int, length: Dim) -> Node:
    """x cut, or padded with zeros, to a length along an axis."""
    if not dims.known_at_least(x.shape[axis], length):
        high = tuple(length if each == axis else 0 for each in range(x.rank))
        x = call.make("pad", x, call.scalar(0, x.dtype), low=(0,) * x.rank, high=high)
    return call.slice_axis(x, axis, 0, length)


@converter("STFT", inputs=(2, 4))
def stft(call: Call) -> Result:
    """signal [batch, length, 1 or 2] -> [batch, frames, frequencies, 2]."""
    x, window = call.input(0), call.optional(2)
    x = call.unsqueeze(x, [2]) if x.rank == 2 else x
    [step] = call.dims(1, "frame_step")
    length = call.dims(3, "frame_length")[0] if call.has(3) else (
        x.shape[1] if window is None else window.shape[0])
    frames = dims.floordiv(x.shape[1] - length, step) + 1
    start = call.binary("mul", call.unsqueeze(call.iota(frames), [1]), call.dim(step))
    framed = call.take(x, call.binary("add", start, call.iota(length)), axis=1)
    if window is not None:
        framed = call.binary("mul", framed, call.unsqueeze(window, [1]))
    return transform(call, framed, 2, inverse=False, onesided=bool(call.attribute("onesided", 1)))


# The weights of cos(0), cos(a), cos(2 a) ... with a = 2 pi n / size.
WINDOWS = {
    "HannWindow": (0.5, -0.5),
    "HammingWindow": (25 / 46, -21 / 46),
    "BlackmanWindow": (0.42, -0.5, 0.08),
}


@converter(*WINDOWS, inputs=1)
def window(call: Call) -> Result:
    [size] = call.dims(0, "size")
    dtype = element_dtype(call.attribute("output_datatype", 1), call.location)
    period = size if call.attribute("periodic", 1) else dims.maximum(size - 1, 1)
    place = call.scaled(call.cast(call.iota(size), f64), 2 * math.pi)
    angle = call.binary("div", place, call.dim(period, f64))
    total = call.full(0, (size,), f64)
    for multiple, weight in enumerate(WINDOWS[call.op_type]):
        wave = call.unary("cos", call.scaled(angle, multiple))
        total = call.binary("add", total, call.scaled(wave, weight))
    return call.cast(total, dtype)


@converter("MelWeightMatrix", inputs=5)
def mel_weights(call: Call) -> Result:
    """[spectrogram bins, mel bins]: triangles between bins that are equally far apart in mel."""
    bins, length, rate = (call.integers(index, "its size")[0] for index in range(3))
    low, high = (float(call.known(index, "its range").reshape(())) for index in (3, 4))
    dtype = element_dtype(call.attribute("output_datatype", 1), call.location)
    edges = call.constant(mel_edges(bins, length, rate, low, high).astype(np.float64))
    left, center, right = (call.slice_axis(edges, 0, k, k + bins) for k in range(3))
    place = call.unsqueeze(call.cast(call.iota(length // 2 + 1), f64), [1])
    rising = ramp(call, left, place, left, center)
    peak = call.binary("equal", left, center)
    rising = call.where(peak, call.scalar(1, f64), rising)
    falling = ramp(call, place, right, center, right)
    in_rise = between(call, left, place, center, "less_equal")
    in_fall = between(call, center, place, right, "less")
    zero = call.scalar(0, f64)
    return call.cast(call.where(in_fall, falling, call.where(in_rise, rising, zero)), dtype)


def mel_edges(bins: int, length: int, rate: int, low: float, high: float) -> np.ndarray:
    """The spectrogram bins that the mel bins begin, peak and end at."""
    first, last = (2595 * math.log10(1 + hertz / 700) for hertz in (low, high))
    mel = first + np.arange(bins + 2) * (last - first) / (bins + 2)
    return np.floor((length + 1) * 700 * (10 ** (mel / 2595) - 1) / rate)


def ramp(call: Call, start: Node, stop: Node, low: Node, high: Node) -> Node:
    """(stop - start) / (high - low)."""
    return call.binary("div", call.binary("sub", stop, start), call.binary("sub", high, low))


def between(call: Call, low: Node, x: Node, high: Node, end: str) -> Node:
    """low <= x, and x < or <= high."""
    return call.binary("and", call.binary("less_equal", low, x), call.binary(end, x, high))
