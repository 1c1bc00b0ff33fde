"""Hyperbolic and inverse trigonometric functions, made of exp, tanh, atan and log.

Computed in f32 (f64 for f64) and rounded once. Close to zero they keep their digits, and large
arguments overflow only where the result does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir.dtypes import f32
from llmc.ir.graph import Node

LARGE = 2.0**28  # from here on the square of a number plus one is the square
STEEP = 20.0  # from here on e^-x is nothing beside e^x


@converter("Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", "Sinh", "Cosh", inputs=1)
def function(call: Call) -> Result:
    x = call.input(0)
    return call.cast(_FUNCTIONS[call.op_type](call, widened(call, x)), x.dtype)


def widened(call: Call, x: Node) -> Node:
    """x in f32 at least."""
    return call.cast(x, f32) if x.dtype.bits < 32 else x


def exp_less_one(call: Call, x: Node) -> Node:
    """e^x - 1 as tanh(x / 2) (e^x + 1), which keeps the digits of small x."""
    return call.binary("mul", call.unary("tanh", call.scaled(x, 0.5)),
                       call.shifted(call.unary("exp", x), 1))


def sinh(call: Call, x: Node) -> Node:
    """sign(x) (g + g / (g + 1)) / 2 with g = e^|x| - 1."""
    size = call.unary("abs", x)
    grown = exp_less_one(call, size)
    twice = call.binary("add", grown, call.binary("div", grown, call.shifted(grown, 1)))
    return call.binary("mul", call.unary("sign", x), or_steep(call, size, twice))


def cosh(call: Call, x: Node) -> Node:
    """(e^|x| + e^-|x|) / 2."""
    size = call.unary("abs", x)
    down = call.unary("exp", call.unary("neg", size))
    return or_steep(call, size, call.binary("add", call.unary("exp", size), down))


def or_steep(call: Call, size: Node, twice: Node) -> Node:
    """Half of `twice`; for large sizes e^size / 2, where e^size may be too large a number."""
    root = call.unary("exp", call.scaled(size, 0.5))
    steep = call.binary("greater", size, call.scalar(STEEP, size.dtype))
    return call.where(steep, call.binary("mul", call.scaled(root, 0.5), root),
                      call.scaled(twice, 0.5))


def atan(call: Call, x: Node) -> Node:
    """The op, but -0 stays -0."""
    zero = call.binary("equal", x, call.scalar(0, x.dtype))
    return call.where(zero, x, call.unary("atan", x))


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
    """sign(x) log1p(a + a*a / (1 + sqrt(1 + a*a))) with a = |x|; sign(x) log(2 a) for large a."""
    size = call.unary("abs", x)
    square = call.binary("mul", size, size)
    below = call.shifted(call.unary("sqrt", call.shifted(square, 1)), 1)
    grown = call.binary("add", size, call.binary("div", square, below))
    result = or_large(call, size, log_of_one_more(call, grown))
    return call.binary("mul", call.unary("sign", x), result)


def acosh(call: Call, x: Node) -> Node:
    """log1p(t + sqrt(t) sqrt(t + 2)) with t = x - 1; log(2 x) for large x; NaN below 1."""
    t = call.shifted(x, -1)
    root = call.binary("mul", call.unary("sqrt", t), call.unary("sqrt", call.shifted(t, 2)))
    return or_large(call, x, log_of_one_more(call, call.binary("add", t, root)))


def or_large(call: Call, x: Node, y: Node) -> Node:
    """y, but log(2 x) for large x."""
    large = call.binary("greater", x, call.scalar(LARGE, x.dtype))
    return call.where(large, call.shifted(call.unary("log", x), math.log(2)), y)


def atanh(call: Call, x: Node) -> Node:
    """sign(x) log1p(2 a / (1 - a)) / 2 with a = |x|."""
    size = call.unary("abs", x)
    ratio = call.binary("div", call.scaled(size, 2), call.shifted(call.unary("neg", size), 1))
    half = call.scaled(log_of_one_more(call, ratio), 0.5)
    return call.binary("mul", call.unary("sign", x), half)


def log_of_one_more(call: Call, x: Node) -> Node:
    """log(1 + x), exact for small x: log(y) x / (y - 1) for the y that 1 + x is rounded to."""
    y = call.shifted(x, 1)
    # Not the sum with -1: (x + 1) + -1 would be simplified.
    step = call.binary("sub", y, call.scalar(1, x.dtype))
    zero = call.scalar(0, x.dtype)
    rounded_away = call.binary("equal", step, zero)
    ratio = call.binary("div", x, call.where(rounded_away, call.scalar(1, x.dtype), step))
    infinite = call.binary("equal", y, x)  # and everything so large that 1 is nothing to it
    exact = call.where(infinite, call.unary("log", y),
                       call.binary("mul", call.unary("log", y), ratio))
    return call.where(rounded_away, x, exact)


_FUNCTIONS: dict[str, Callable[[Call, Node], Node]] = {
    "Asin": asin, "Acos": acos, "Atan": atan, "Asinh": asinh, "Acosh": acosh, "Atanh": atanh,
    "Sinh": sinh, "Cosh": cosh,
}
