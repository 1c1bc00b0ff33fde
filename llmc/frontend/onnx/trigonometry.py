"""Inverse trigonometric and hyperbolic functions, made of atan and log."""

from __future__ import annotations

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir.dtypes import f32
from llmc.ir.graph import Node


@converter("Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", inputs=1)
def inverse(call: Call) -> Result:
    """Computed in f32 (f64 for f64), rounded once."""
    x = call.input(0)
    wide = call.cast(x, f32) if x.dtype.bits < 32 else x
    return call.cast(_FUNCTIONS[call.op_type](call, wide), x.dtype)


def atan(call: Call, x: Node) -> Node:
    return call.unary("atan", x)


def asin(call: Call, x: Node) -> Node:
    """2 atan(x / (1 + sqrt((1 - x)(1 + x)))): 1 - x*x would lose digits near one."""
    one = call.scalar(1, x.dtype)
    leg = call.unary("sqrt", call.binary(
        "mul", call.binary("sub", one, x), call.binary("add", one, x)))
    below = call.shifted(leg, 1)
    return call.scaled(atan(call, call.binary("div", x, below)), 2)


def acos(call: Call, x: Node) -> Node:
    """2 atan(sqrt((1 - x) / (1 + x))); at -1, the atan of infinity."""
    one = call.scalar(1, x.dtype)
    ratio = call.binary("div", call.binary("sub", one, x), call.binary("add", one, x))
    return call.scaled(atan(call, call.unary("sqrt", ratio)), 2)


def asinh(call: Call, x: Node) -> Node:
    """sign(x) log1p(a + a*a / (1 + sqrt(1 + a*a))) with a = |x|."""
    size = call.unary("abs", x)
    square = call.binary("mul", size, size)
    below = call.shifted(call.unary("sqrt", call.shifted(square, 1)), 1)
    grown = call.binary("add", size, call.binary("div", square, below))
    return call.binary("mul", call.unary("sign", x), log_of_one_more(call, grown))


def acosh(call: Call, x: Node) -> Node:
    """log1p(t + sqrt(t (t + 2))) with t = x - 1."""
    t = call.shifted(x, -1)
    root = call.unary("sqrt", call.binary("mul", t, call.shifted(t, 2)))
    return log_of_one_more(call, call.binary("add", t, root))


def atanh(call: Call, x: Node) -> Node:
    """sign(x) log1p(2 a / (1 - a)) / 2 with a = |x|."""
    size = call.unary("abs", x)
    ratio = call.binary("div", call.scaled(size, 2), call.shifted(call.unary("neg", size), 1))
    half = call.scaled(log_of_one_more(call, ratio), 0.5)
    return call.binary("mul", call.unary("sign", x), half)


def log_of_one_more(call: Call, x: Node) -> Node:
    """log(1 + x), exact for small x: log(y) x / (y - 1) for the y that 1 + x is rounded to."""
    y = call.shifted(x, 1)
    step = call.shifted(y, -1)
    zero = call.scalar(0, x.dtype)
    rounded_away = call.binary("equal", step, zero)
    ratio = call.binary("div", x, call.where(rounded_away, call.scalar(1, x.dtype), step))
    infinite = call.binary("equal", y, x)  # and everything so large that 1 is nothing to it
    exact = call.where(infinite, call.unary("log", y),
                       call.binary("mul", call.unary("log", y), ratio))
    return call.where(rounded_away, x, exact)


_FUNCTIONS = {
    "Asin": asin, "Acos": acos, "Atan": atan, "Asinh": asinh, "Acosh": acosh, "Atanh": atanh,
}
