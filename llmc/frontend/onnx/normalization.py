"""Normalisations of ai.onnx (and the ones that com.microsoft puts there)."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir import dims
from llmc.ir.graph import Node


def layer_norm(call: Call, x: Node, weight: Node, bias: Node | None, epsilon: float) -> Node:
    """Over the last axis; without a bias, of zeros."""
    bias = call.full(0, x.shape[-1:], weight.dtype) if bias is None else bias
    for parameter in (weight, bias):
        call.require_equal(parameter.shape[-1], x.shape[-1], "normalised axis")
    return call.make("layer_norm", x, weight, bias, epsilon=epsilon)


def rms_norm(call: Call, x: Node, weight: Node, epsilon: float) -> Node:
    """Over the last axis."""
    call.require_equal(weight.shape[-1], x.shape[-1], "normalised axis")
    return call.make("rms_norm", x, weight, epsilon=epsilon)


def flattened(call: Call, x: Node, axis: int) -> Node:
    """x with all axes from `axis` on as one."""
    return call.reshape(x, [*x.shape[:axis], dims.product(x.shape[axis:])])


def fitted(call: Call, parameter: Node, x: Node, axis: int) -> Node:
    """A scale or bias as one vector over the normalised axes of x."""
    shape = list(x.shape[axis:])
    call.broadcast_shapes(parameter.shape, shape)
    if parameter.rank > len(shape):
        raise call.error(f"scale of rank {parameter.rank} for {len(shape)} normalised axes")
    return call.reshape(call.broadcast(parameter, shape), (dims.product(shape),))


@converter("LayerNormalization", inputs=(2, 3))
def layer_normalization(call: Call) -> Result:
    x = call.input(0)
    axis = call.axis(call.attribute("axis", -1), x.rank)
    epsilon = call.attribute("epsilon", 1e-5)
    weight, bias = (
        None if p is None else fitted(call, p, x, axis) for p in (call.input(1), call.optional(2))
    )
    assert weight is not None
    result = call.reshape(
        layer_norm(call, flattened(call, x, axis), weight, bias, epsilon), x.shape
    )
    if len(call.node.output) == 1:
        return result
    axes = range(axis, x.rank)
    mean, variance = moments(call, x, axes)
    return result, mean, call.unary("rsqrt", call.shifted(variance, epsilon))


def moments(call: Call, x: Node, axes: Iterable[int]) -> tuple[Node, Node]:
    """Mean and variance over some axes, which are kept with size 1."""
    axes = list(axes)
    mean = call.reduce("reduce_mean", x, axes)
    centred = call.binary("sub", x, mean)
    return mean, call.reduce("reduce_mean", call.binary("mul", centred, centred), axes)


@converter("RMSNormalization", "SimplifiedLayerNormalization", inputs=2)
def rms_normalization(call: Call) -> Result:
    x = call.input(0)
    axis = call.axis(call.attribute("axis", -1), x.rank)
    weight, epsilon = fitted(call, call.input(1), x, axis), call.attribute("epsilon", 1e-5)
    result = call.reshape(rms_norm(call, flattened(call, x, axis), weight, epsilon), x.shape)
    if len(call.node.output) == 1:
        return result
    square = call.reduce("reduce_mean", call.binary("mul", x, x), range(axis, x.rank))
    return result, call.unary("rsqrt", call.shifted(square, epsilon))


def standardized(call: Call, x: Node, axes: Iterable[int], epsilon: float) -> Node:
    """(x - mean) / sqrt(variance + epsilon)."""
    mean, variance = moments(call, x, axes)
    scale = call.unary("rsqrt", call.shifted(variance, epsilon))
    return call.binary("mul", call.binary("sub", x, mean), scale)


def by_channel(call: Call, parameter: Node, rank: int) -> Node:
    """[channels] shaped to broadcast over axis 1 of a tensor of that rank."""
    return call.reshape(parameter, [*parameter.shape, *[1] * (rank - 2)])


@converter("InstanceNormalization", inputs=3)
def instance_normalization(call: Call) -> Result:
    x = call.input(0)
    result = standardized(call, x, range(2, x.rank), call.attribute("epsilon", 1e-5))
    scale, bias = (by_channel(call, call.input(index), x.rank) for index in (1, 2))
    return call.binary("add", call.binary("mul", result, scale), bias)


@converter("GroupNormalization", inputs=3)
def group_normalization(call: Call) -> Result:
    """Scale and bias are per channel, before opset 21 per group."""
    x, groups = call.input(0), int(call.required("num_groups"))
    shape = [x.shape[0], groups, call.divide(x.shape[1], groups), *x.shape[2:]]
    grouped = call.reshape(x, shape)
    result = standardized(call, grouped, range(2, grouped.rank), call.attribute("epsilon", 1e-5))
    scale, bias = call.input(1), call.input(2)
    if call.version < 21:
        scale, bias = (by_channel(call, p, grouped.rank) for p in (scale, bias))
        result = call.binary("add", call.binary("mul", result, scale), bias)
        return call.reshape(result, x.shape)
    scale, bias = (by_channel(call, p, x.rank) for p in (scale, bias))
    return call.binary("add", call.binary("mul", call.reshape(result, x.shape), scale), bias)


@converter("BatchNormalization", inputs=5)
def batch_normalization(call: Call) -> Result:
    """With the running mean and variance; in training mode with the batch's own, and the running
    ones moved towards them."""
    x, training = call.input(0), bool(call.attribute("training_mode", 0))
    scale, bias, mean, variance = (by_channel(call, call.input(k), x.rank) for k in range(1, 5))
    running: list[Node] = []
    if training:
        axes = [axis for axis in range(x.rank) if axis != 1]
        own = call.reduce("reduce_mean", x, axes)
        centred = call.binary("sub", x, own)
        spread = call.reduce("reduce_mean", call.binary("mul", centred, centred), axes)
        kept = call.attribute("momentum", 0.9)
        for index, new in ((3, own), (4, spread)):
            old = call.input(index)
            step = call.scaled(call.reshape(new, old.shape), 1 - kept)
            running.append(call.binary("add", call.scaled(old, kept), call.cast(step, old.dtype)))
        mean, variance = own, spread
    factor = call.unary("rsqrt", call.shifted(variance, call.attribute("epsilon", 1e-5)))
    result = call.binary("mul", call.binary("sub", x, mean), call.binary("mul", factor, scale))
    return [call.binary("add", result, bias), *running]


@converter("MeanVarianceNormalization", inputs=1)
def mean_variance_normalization(call: Call) -> Result:
    x = call.input(0)
    axes = [call.axis(axis, x.rank) for axis in call.attribute("axes", [0, 2, 3])]
    return standardized(call, x, axes, 1e-9)


@converter("LpNormalization", inputs=1)
def lp_normalization(call: Call) -> Result:
    x, order = call.input(0), call.attribute("p", 2)
    axis = call.axis(call.attribute("axis", -1), x.rank)
    size = call.unary("abs", x) if order == 1 else call.binary("mul", x, x)
    total = call.reduce("reduce_sum", size, [axis])
    norm = total if order == 1 else call.unary("sqrt", total)
    zero = call.scalar(0, x.dtype)
    return call.where(call.binary("equal", norm, zero), zero, call.binary("div", x, norm))
