"""Elementwise operators: arithmetic, comparisons, logic, activations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from llmc.frontend.onnx import shape_array
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.frontend.onnx.trigonometry import exp_less_one, widened
from llmc.ir import dims
from llmc.ir.dtypes import bool_
from llmc.ir.graph import Node

UNARY = {
    "Abs": "abs",
    "Ceil": "ceil",
    "Cos": "cos",
    "Erf": "erf",
    "Exp": "exp",
    "Floor": "floor",
    "IsNaN": "is_nan",
    "Log": "log",
    "Neg": "neg",
    "Not": "not",
    "Reciprocal": "reciprocal",
    "Relu": "relu",
    "Round": "round",
    "Sigmoid": "sigmoid",
    "Sign": "sign",
    "Sin": "sin",
    "Softplus": "softplus",
    "Sqrt": "sqrt",
    "Tanh": "tanh",
}
UNARY_FOLDS: dict[str, Callable[..., Any]] = {
    "Abs": lambda a: dims.maximum(a, -a),
    "Neg": operator.neg,
    "Not": operator.not_,
}
BINARY = {
    "Add": "add",
    "And": "and",
    "Div": "div",
    "Equal": "equal",
    "Greater": "greater",
    "GreaterOrEqual": "greater_equal",
    "Less": "less",
    "LessOrEqual": "less_equal",
    "Mul": "mul",
    "Or": "or",
    "Sub": "sub",
    "Xor": "xor",
}
BINARY_FOLDS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "And": operator.and_,
    "Div": shape_array.truncating_divide,
    "Equal": shape_array.equal,
    "Greater": shape_array.negated(shape_array.less_equal),
    "GreaterOrEqual": shape_array.negated(shape_array.less),
    "Less": shape_array.less,
    "LessOrEqual": shape_array.less_equal,
    "Max": dims.maximum,
    "Min": dims.minimum,
    "Mod": shape_array.modulo,
    "Mul": operator.mul,
    "Or": operator.or_,
    "Pow": shape_array.power,
    "Sub": operator.sub,
    "Sum": operator.add,
    "Xor": operator.xor,
}
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def folded(call: Call) -> ShapeArray | None:
    """The result if all operands are shape arithmetic and it can be decided at compile time."""
    arrays = call.shape_arrays()
    table = UNARY_FOLDS if len(call.inputs) == 1 else BINARY_FOLDS
    function = table.get(call.op_type)
    if arrays is None or function is None:
        return None
    result: ShapeArray | None = arrays[0]
    if len(arrays) == 1:
        return shape_array.fold(function, arrays)
    for array in arrays[1:]:
        kind = bool_ if call.op_type in COMPARISONS else None
        result = shape_array.fold(function, [result, array], kind) if result else None
    return result


@converter(*UNARY, inputs=1)
def unary(call: Call) -> Result:
    return folded(call) or call.unary(UNARY[call.op_type], call.input(0))


@converter(*BINARY, inputs=2)
def binary(call: Call) -> Result:
    return folded(call) or call.binary(BINARY[call.op_type], call.input(0), aligned(call, 1))


def aligned(call: Call, index: int) -> Node:
    """An operand; before opset 7 its axes begin at the attribute `axis` of the first operand."""
    operand = call.input(index)
    if call.version >= 7 or "axis" not in call.attributes:
        return operand
    rank = call.input(0).rank
    behind = rank - call.axis(call.attributes["axis"], rank) - operand.rank
    if behind < 0:
        raise call.error(f"its operand of rank {operand.rank} does not fit at its axis")
    return call.reshape(operand, (*operand.shape, *[1] * behind))


@converter("Min", "Max", "Sum", "Mean", inputs=(1, None))
def variadic(call: Call) -> Result:
    if len(call.inputs) == 1:
        return call.value(0)
    result = folded(call)
    if result is not None:
        return result
    op = {"Min": "min", "Max": "max"}.get(call.op_type, "add")
    total = call.input(0)
    for index in range(1, len(call.inputs)):
        total = call.binary(op, total, call.input(index))
    return call.scaled(total, 1 / len(call.inputs)) if call.op_type == "Mean" else total


@converter("Mod", inputs=2)
def mod(call: Call) -> Result:
    by_dividend = bool(call.attribute("fmod", 0))
    result = None if by_dividend else folded(call)
    if result is not None:
        return result
    a, b = call.input(0), call.input(1)
    if not by_dividend or a.dtype.kind == "uint":
        return call.binary("mod", a, b)
    # fmod: the result has the dividend's sign
    magnitude = call.binary("mod", call.unary("abs", a), call.unary("abs", b))
    return call.binary("mul", call.unary("sign", a), magnitude)


@converter("Pow", inputs=2)
def power(call: Call) -> Result:
    result = folded(call)
    if result is not None:
        return result
    base, exponent = call.input(0), aligned(call, 1)
    if base.dtype.is_integer and exponent.dtype.is_float:
        return call.cast(call.binary("pow", call.cast(base, exponent.dtype), exponent), base.dtype)
    return call.binary("pow", base, call.cast(exponent, base.dtype))


@converter("Where", inputs=3)
def where(call: Call) -> Result:
    arrays = call.shape_arrays()
    if arrays is not None:
        result = shape_array.fold(shape_array.where, arrays, arrays[1].dtype)
        if result is not None:
            return result
    return call.where(call.input(0), call.input(1), call.input(2))


@converter("Identity", inputs=1)
def identity(call: Call) -> Result:
    return call.value(0)


@converter("Clip", inputs=(1, 3))
def clip(call: Call) -> Result:
    x = call.input(0)
    if call.version < 11:
        bounds = [call.attribute("min", -math.inf), call.attribute("max", math.inf)]
        low, high = (call.scalar(bound, x.dtype) for bound in bounds)
        return call.clamp(x, low, high)
    lower, upper = call.optional(1), call.optional(2)
    if lower is not None:
        x = call.binary("max", x, call.reshape(lower, ()))
    return x if upper is None else call.binary("min", x, call.reshape(upper, ()))


@converter("IsInf", inputs=1)
def is_inf(call: Call) -> Result:
    x = call.input(0)
    signs = [
        call.binary("equal", x, call.scalar(value, x.dtype))
        for name, value in (("detect_positive", math.inf), ("detect_negative", -math.inf))
        if call.attribute(name, 1)
    ]
    if not signs:
        return call.full(0, x.shape, bool_)
    return signs[0] if len(signs) == 1 else call.binary("or", *signs)


# ---- activations and functions made of others ----------------------------------------------------


def linear(call: Call, x: Node, scale: float, shift: float) -> Node:
    """scale * x + shift."""
    return call.shifted(call.scaled(x, scale), shift)


def clamped(call: Call, x: Node, low: float, high: float) -> Node:
    return call.clamp(x, call.scalar(low, x.dtype), call.scalar(high, x.dtype))


def select_positive(call: Call, x: Node, positive: Node, negative: Node) -> Node:
    """positive where x > 0, negative elsewhere."""
    return call.where(call.binary("greater", x, call.scalar(0, x.dtype)), positive, negative)


@converter("Gelu", inputs=1)
def gelu(call: Call) -> Result:
    approximate = call.attribute("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise call.error(f"approximate={approximate!r} is neither 'none' nor 'tanh'")
    return call.unary("gelu", call.input(0), approximate=approximate)


@converter("HardSigmoid", inputs=1)
def hard_sigmoid(call: Call) -> Result:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    return clamped(call, linear(call, call.input(0), alpha, beta), 0, 1)


@converter("HardSwish", inputs=1)
def hard_swish(call: Call) -> Result:
    x = call.input(0)
    return call.binary("mul", x, clamped(call, linear(call, x, 1 / 6, 0.5), 0, 1))


@converter("Swish", inputs=1)
def swish(call: Call) -> Node:
    x, alpha = call.input(0), call.attribute("alpha", 1.0)
    if alpha == 1.0:
        return call.unary("silu", x)
    return call.binary("mul", x, call.unary("sigmoid", call.scaled(x, alpha)))


@converter("SwiGLU", inputs=2)
def gated_swish(call: Call) -> Result:
    return call.binary("mul", swish(call), call.input(1))


@converter("Mish", inputs=1)
def mish(call: Call) -> Result:
    x = call.input(0)
    return call.binary("mul", x, call.unary("tanh", call.unary("softplus", x)))


@converter("Softsign", inputs=1)
def softsign(call: Call) -> Result:
    x = call.input(0)
    return call.binary("div", x, call.shifted(call.unary("abs", x), 1))


@converter("LeakyRelu", inputs=1)
def leaky_relu(call: Call) -> Result:
    x = call.input(0)
    return select_positive(call, x, x, call.scaled(x, call.attribute("alpha", 0.01)))


@converter("PRelu", inputs=2)
def parametric_relu(call: Call) -> Result:
    x, slope = call.input(0), call.input(1)
    if call.version < 7 and slope.rank == 1:  # one for each channel, or one for all
        slope = call.reshape(slope, (slope.shape[0], *[1] * (x.rank - 2)))
    return select_positive(call, x, x, call.binary("mul", x, slope))


@converter("ThresholdedRelu", inputs=1)
def thresholded_relu(call: Call) -> Result:
    x = call.input(0)
    alpha = call.scalar(call.attribute("alpha", 1.0), x.dtype)
    return call.where(call.binary("greater", x, alpha), x, call.scalar(0, x.dtype))


@converter("Elu", "Celu", "Selu", inputs=1)
def exponential_linear(call: Call) -> Result:
    """Elu: a(e^x - 1) below 0. Celu: a(e^(x/a) - 1). Selu: gamma times Elu."""
    x = widened(call, call.input(0))
    alpha = call.attribute("alpha", 1.6732632 if call.op_type == "Selu" else 1.0)
    inner = call.scaled(x, 1 / alpha) if call.op_type == "Celu" else x
    result = select_positive(call, x, x, call.scaled(exp_less_one(call, inner), alpha))
    if call.op_type == "Selu":
        result = call.scaled(result, call.attribute("gamma", 1.050701))
    return call.cast(result, call.input(0).dtype)


@converter("Shrink", inputs=1)
def shrink(call: Call) -> Result:
    x, bias, edge = call.input(0), call.attribute("bias", 0.0), call.attribute("lambd", 0.5)
    zero = call.scalar(0, x.dtype)
    above = call.binary("greater", x, call.scalar(edge, x.dtype))
    below = call.binary("less", x, call.scalar(-edge, x.dtype))
    inside = call.where(below, call.shifted(x, bias), zero)
    return call.where(above, call.shifted(x, -bias), inside)


@converter("Tan", inputs=1)
def tan(call: Call) -> Result:
    x = call.input(0)
    return call.binary("div", call.unary("sin", x), call.unary("cos", x))
