"""Random numbers: a hash of each element's number, the same in every run.

There is no generator with a state between runs: a node gives the numbers of its seed (or, without
one, of its name) each time. Distributions are ONNX's; the numbers are those of no other runtime.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.protobuf import element_dtype
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType, bool_, f32, i64, u32
from llmc.ir.graph import Node


@converter("RandomUniform", "RandomNormal", inputs=0)
def random(call: Call) -> Result:
    return distributed(call, call.required("shape"), _dtype(call, f32))


@converter("RandomUniformLike", "RandomNormalLike", inputs=1)
def random_like(call: Call) -> Result:
    like = call.value(0)
    return distributed(call, like.shape, _dtype(call, like.dtype))


@converter("Bernoulli", inputs=1)
def bernoulli(call: Call) -> Result:
    """1 with the probability that each item gives."""
    x = call.input(0)
    drawn = call.binary("less", uniform(call, x.shape), call.cast(x, f32))
    return call.cast(drawn, _dtype(call, x.dtype))


@converter("Multinomial", inputs=1)
def multinomial(call: Call) -> Result:
    """[batch, classes] of log weights -> [batch, samples]: how many sums of weights lie below."""
    x, count = call.cast(call.input(0), f32), call.attribute("sample_size", 1)
    sums = call.make("cumsum", call.make("softmax", x, axis=1), axis=1)
    place = uniform(call, (x.shape[0], count, 1))
    below = call.cast(call.binary("less_equal", call.unsqueeze(sums, [1]), place), i64)
    drawn = call.reduce("reduce_sum", below, [2], keep=False)
    last = call.dim(x.shape[1] - 1)
    return call.cast(call.binary("min", drawn, last), element_dtype(
        call.attribute("dtype", 6), call.location))


@converter("Dropout", inputs=(1, 3))
def dropout(call: Call) -> Result:
    """The input itself and a mask of ones; in training mode what a mask drawn at random leaves of
    it, scaled so that its expectation stays."""
    x, ratio = call.value(0), 0.0
    if call.has(2) and bool(call.known(2, "training_mode")):
        ratio = float(call.known(1, "ratio")) if call.has(1) else 0.5
    if not 0 <= ratio < 1:
        raise call.error(f"its ratio is {ratio}")
    mask = call.full(1, call.tensor(x).shape, bool_)
    if ratio:
        node = call.tensor(x)
        mask = call.binary("greater_equal", uniform(call, node.shape), call.scalar(ratio, f32))
        kept = call.where(mask, node, call.scalar(0, node.dtype))
        x = call.scaled(kept, 1 / (1 - ratio))
    return [x, mask][: max(1, len(call.node.output))]


def _dtype(call: Call, default: DType) -> DType:
    code = call.attribute("dtype")
    return default if code is None else element_dtype(code, call.location)


def distributed(call: Call, shape: Sequence[Dim], dtype: DType) -> Node:
    """Uniform between low and high, or normal with mean and scale."""
    if "Uniform" in call.op_type:
        low, high = call.attribute("low", 0.0), call.attribute("high", 1.0)
        drawn = call.shifted(call.scaled(uniform(call, shape), high - low), low)
    else:
        scaled = call.scaled(normal(call, shape), call.attribute("scale", 1.0))
        drawn = call.shifted(scaled, call.attribute("mean", 0.0))
    return call.cast(drawn, dtype)


def normal(call: Call, shape: Sequence[Dim]) -> Node:
    """Standard normal numbers in f32, by the Box-Muller transform of two uniform ones."""
    away_from_zero = call.shifted(call.unary("neg", uniform(call, shape)), 1)
    radius = call.unary("sqrt", call.scaled(call.unary("log", away_from_zero), -2))
    angle = call.scaled(uniform(call, shape, stream=1), 2 * math.pi)
    return call.binary("mul", radius, call.unary("cos", angle))


def uniform(call: Call, shape: Sequence[Dim], stream: int = 0) -> Node:
    """Numbers in 0 <= x < 1, multiples of 2**-24, in f32; streams of one node are independent."""
    named = f"{call.attribute('seed', call.origin.node if call.origin else '')} {stream}"
    seed = zlib.crc32(named.encode())
    bits = call.binary("xor", call.iota(dims.product(shape), u32), call.scalar(seed, u32))
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, None)):
        bits = call.binary("xor", bits, call.binary("shift_right", bits, call.scalar(shift, u32)))
        bits = bits if factor is None else call.binary("mul", bits, call.scalar(factor, u32))
    top = call.binary("shift_right", bits, call.scalar(8, u32))
    return call.reshape(call.scaled(call.cast(top, f32), 2.0**-24), shape)
