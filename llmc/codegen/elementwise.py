"""Elementwise ops on registers: one table, op -> function(e, dtype, *values).

Values have one LLVM type each (scalars or vectors of equal lanes); dtype is that of the operands
after the op's type rule made them equal. Comparisons yield i1.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir as ir

from llmc.codegen import math
from llmc.codegen.llvm import Emitter, lanes_of, splat_constant
from llmc.ir.dtypes import DType

Emit = Callable[..., ir.Value]


def _number(x: ir.Value, value: float) -> ir.Constant:
    return splat_constant(x.type, value)


def _arithmetic(of_floats: str, of_integers: str) -> Emit:
    def emit(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
        return getattr(e.b, of_floats if dtype.is_float else of_integers)(a, b)
    return emit


def _compare(symbol: str) -> Emit:
    def emit(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
        if dtype.is_float:
            # Only != holds for NaN.
            compare = e.b.fcmp_unordered if symbol == "!=" else e.b.fcmp_ordered
            return compare(symbol, a, b)
        signed = dtype.kind == "int"
        return (e.b.icmp_signed if signed else e.b.icmp_unsigned)(symbol, a, b)
    return emit


def _extreme(symbol: str) -> Emit:
    compare = _compare(symbol)

    def emit(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
        chosen = compare(e, dtype, a, b)
        if dtype.is_float:  # a NaN on either side wins, as in NumPy
            chosen = e.b.or_(chosen, e.b.fcmp_unordered("uno", a, a))
        return e.b.select(chosen, a, b)
    return emit


maximum = _extreme(">")
minimum = _extreme("<")


def _bits(name: str) -> Emit:
    def emit(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
        return getattr(e.b, name)(a, b)
    return emit


def _math(name: str) -> Emit:
    def emit(e: Emitter, dtype: DType, *values: ir.Value) -> ir.Value:
        return getattr(math, name)(e, *values)
    return emit


def _float_or(name: str, of_integers: Emit) -> Emit:
    """A function of codegen.math for floats, another for integers."""
    def emit(e: Emitter, dtype: DType, *values: ir.Value) -> ir.Value:
        if dtype.is_float:
            return getattr(math, name)(e, *values)
        return of_integers(e, dtype, *values)
    return emit


# ---- integers --------------------------------------------------------------------------------


def _minus(e: Emitter, x: ir.Value) -> ir.Value:
    return e.b.sub(_number(x, 0), x)


def _same(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    return x


def _absolute_integer(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    if dtype.kind != "int":
        return x
    return e.b.select(e.b.icmp_signed("<", x, _number(x, 0)), _minus(e, x), x)


def _sign_integer(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    zero, one = _number(x, 0), _number(x, 1)
    positive = e.b.select(e.b.icmp_unsigned("!=", x, zero), one, zero)
    if dtype.kind != "int":
        return positive
    return e.b.select(e.b.icmp_signed("<", x, zero), _number(x, -1), positive)


def _safe_divisor(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
    """b, or 1 where dividing would trap: by zero, and the least integer by -1 (which is -a)."""
    unsafe = e.b.icmp_signed("==", b, _number(b, 0))
    if dtype.kind == "int":
        unsafe = e.b.or_(unsafe, e.b.icmp_signed("==", b, _number(b, -1)))
    return e.b.select(unsafe, _number(b, 1), b)


def _floor_div_integer(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
    """Rounds down; x // 0 is 0, as in NumPy."""
    divisor = _safe_divisor(e, dtype, a, b)
    zero = _number(a, 0)
    if dtype.kind != "int":
        result = e.b.udiv(a, divisor)
    else:
        quotient = e.b.sdiv(a, divisor)
        inexact = e.b.icmp_signed("!=", e.b.mul(quotient, divisor), a)
        differ = e.b.icmp_signed("<", e.b.xor(a, divisor), zero)
        lower = e.b.sub(quotient, _number(a, 1))
        result = e.b.select(e.b.and_(inexact, differ), lower, quotient)
        result = e.b.select(e.b.icmp_signed("==", b, _number(b, -1)), _minus(e, a), result)
    return e.b.select(e.b.icmp_signed("==", b, zero), zero, result)


def _mod_integer(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
    """Has b's sign; x % 0 is 0, as in NumPy."""
    quotient = _floor_div_integer(e, dtype, a, b)
    rest = e.b.sub(a, e.b.mul(quotient, b))
    return e.b.select(e.b.icmp_signed("==", b, _number(b, 0)), b, rest)


def _divide(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
    """Floats: true division. Integers: towards zero, as ONNX asks; by zero gives 0."""
    if dtype.is_float:
        return e.divide(a, b)
    divisor = _safe_divisor(e, dtype, a, b)
    result = (e.b.sdiv if dtype.kind == "int" else e.b.udiv)(a, divisor)
    if dtype.kind == "int":
        result = e.b.select(e.b.icmp_signed("==", b, _number(b, -1)), _minus(e, a), result)
    return e.b.select(e.b.icmp_signed("==", b, _number(b, 0)), b, result)


def _power_integer(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
    """By squaring; exponents above 63 only matter for bases -1, 0 and 1, by their parity."""
    result, base, bits = _number(a, 1), a, min(6, a.type.element.width if lanes_of(a) > 1
                                               else a.type.width)
    for bit in range(bits):
        is_set = e.b.icmp_signed("!=", e.b.and_(b, _number(b, 1 << bit)), _number(b, 0))
        result = e.b.select(is_set, e.b.mul(result, base), result)
        base = e.b.mul(base, base)
    return result


def _shift(right: bool) -> Emit:
    """By the width or more, or by a negative number, all is shifted out."""
    def emit(e: Emitter, dtype: DType, a: ir.Value, b: ir.Value) -> ir.Value:
        last = (a.type.element if lanes_of(a) > 1 else a.type).width - 1
        inside = e.b.icmp_unsigned("<=", b, _number(b, last))
        if right and dtype.kind == "int":
            return e.b.ashr(a, e.b.select(inside, b, _number(b, last)))
        shifted = (e.b.lshr if right else e.b.shl)(a, e.b.select(inside, b, _number(b, 0)))
        return e.b.select(inside, shifted, _number(a, 0))
    return emit


# ---- floats ----------------------------------------------------------------------------------


def _negate(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    return e.b.fneg(x) if dtype.is_float else _minus(e, x)


def _reciprocal(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    return e.b.fdiv(_number(x, 1.0), x)


def _relu(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    return maximum(e, dtype, x, _number(x, 0.0 if dtype.is_float else 0))


def _silu(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    return e.b.fmul(x, math.sigmoid(e, x))


def _not(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    return e.b.not_(x)


def _is_nan(e: Emitter, dtype: DType, x: ir.Value) -> ir.Value:
    if not dtype.is_float:
        return e.b.icmp_signed("!=", x, x)
    return e.b.fcmp_unordered("uno", x, x)


def _clamp(e: Emitter, dtype: DType, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    return minimum(e, dtype, maximum(e, dtype, x, low), high)


def gelu(e: Emitter, x: ir.Value, approximate: str) -> ir.Value:
    """x times the normal distribution function of x, exact or by tanh."""
    if approximate != "tanh":
        return math.gelu(e, x)
    cube = e.b.fmul(e.b.fmul(x, x), x)
    inner = e.fma(cube, _number(x, 0.044715), x)
    bend = math.tanh(e, e.b.fmul(inner, _number(x, 0.7978845608028654)))
    half = e.b.fmul(x, _number(x, 0.5))
    return e.fma(half, bend, half)


ELEMENTWISE: dict[str, Emit] = {
    "neg": _negate,
    "abs": _float_or("absolute", _absolute_integer),
    "exp": _math("exp"),
    "log": _math("log"),
    "sqrt": _math("sqrt"),
    "rsqrt": _math("rsqrt"),
    "reciprocal": _reciprocal,
    "sin": _math("sin"),
    "cos": _math("cos"),
    "tanh": _math("tanh"),
    "erf": _math("erf"),
    "floor": _float_or("floor", _same),
    "ceil": _float_or("ceil", _same),
    "round": _float_or("round_half_even", _same),
    "sign": _float_or("sign", _sign_integer),
    "not": _not,
    "is_nan": _is_nan,
    "relu": _relu,
    "sigmoid": _math("sigmoid"),
    "silu": _silu,
    "softplus": _math("softplus"),
    "add": _arithmetic("fadd", "add"),
    "sub": _arithmetic("fsub", "sub"),
    "mul": _arithmetic("fmul", "mul"),
    "div": _divide,
    "floor_div": _float_or("floor_div", _floor_div_integer),
    "mod": _float_or("mod", _mod_integer),
    "pow": _float_or("power", _power_integer),
    "max": maximum,
    "min": minimum,
    "equal": _compare("=="),
    "not_equal": _compare("!="),
    "less": _compare("<"),
    "less_equal": _compare("<="),
    "greater": _compare(">"),
    "greater_equal": _compare(">="),
    "and": _bits("and_"),
    "or": _bits("or_"),
    "xor": _bits("xor"),
    "shift_left": _shift(right=False),
    "shift_right": _shift(right=True),
    "clamp": _clamp,
}
