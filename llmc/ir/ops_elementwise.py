"""Elementwise ops: unary, binary and ternary, `where`, `clamp`, `cast`. They broadcast like NumPy;
operands share one dtype (casts are explicit)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from llmc.ir import dtypes
from llmc.ir.dtypes import DType
from llmc.ir.graph import Node, TensorType, Type
from llmc.ir.ops_core import (
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    broadcast_shape,
    choice,
    compute_dtype,
    element_type,
    make,
    reject,
    require_same_dtype,
    round_to,
    widen,
    widened,
)
from llmc.ir.ops_leaves import constant

# ---- NumPy formulas NumPy has no function for --------------------------------------------------


def erf(x: Array) -> Array:
    """The error function, by libm in f64, rounded to the array's dtype."""
    flat = np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size)
    return flat.reshape(x.shape).astype(x.dtype)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def gelu(x: Array, approximate: str) -> Array:
    """x * normal_cdf(x), by erf or by the tanh approximation."""
    if approximate == "none":
        return x * 0.5 * (1 + erf(x * x.dtype.type(math.sqrt(0.5))))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def divide(a: Array, b: Array) -> Array:
    """a / b; integers truncate toward zero, and division by zero gives 0."""
    if a.dtype.kind not in "iu":
        return a / b
    floor = floor_divide(a, b)
    inexact = floor * b != a
    return np.where(b == 0, 0, floor + (inexact & ((a < 0) != (b < 0)))).astype(a.dtype)


def floor_divide(a: Array, b: Array) -> Array:
    """floor(a / b); integer division by zero gives 0."""
    return np.floor_divide(a, b)


def _in_range(a: Array, b: Array) -> tuple[Array, Array]:
    """Whether b shifts less than a's width, and b with 0 where it does not."""
    inside = (b >= 0) & (b < 8 * a.dtype.itemsize)
    return inside, np.where(inside, b, b.dtype.type(0))


def shift_left(a: Array, b: Array) -> Array:
    """a << b on bits; 0 where b is negative or at least the width."""
    inside, by = _in_range(a, b)
    return np.where(inside, np.left_shift(a, by), a.dtype.type(0))


def shift_right(a: Array, b: Array) -> Array:
    """a >> b, of signed integers with their sign; all is shifted out where b is negative or at
    least the width."""
    inside, by = _in_range(a, b)
    return np.where(inside, np.right_shift(a, by), np.where(a < 0, -1, 0).astype(a.dtype))


def _not(x: Array) -> Array:
    return np.logical_not(x) if x.dtype == np.bool_ else np.invert(x)


# ---- type rules --------------------------------------------------------------------------------

_CLASSES: dict[str, Callable[[DType], bool]] = {
    "float": lambda dtype: dtype.is_float,
    "number": lambda dtype: dtype.is_float or dtype.is_integer,
    "integer": lambda dtype: dtype.is_integer,
    "bool or integer": lambda dtype: not dtype.is_float,
    "any": lambda dtype: True,
}


def _infer(op: str, allowed: str, result: DType | None = None):
    def infer(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
        shape = broadcast_shape(op, inputs, [each.shape for each in inputs])
        dtype = require_same_dtype(op, inputs)
        if not _CLASSES[allowed](dtype):
            reject(op, f"operands must be of type {allowed}, not {dtype}", inputs)
        return TensorType(result or dtype, shape)

    return infer


def _reference(function: Callable[..., Array]):
    def reference(node: Node, arrays: Sequence[Array], context: Context) -> Array:
        with np.errstate(all="ignore"):
            result = function(*widened(node, arrays, context))
            return round_to(result, node.dtype, context.exact)

    return reference


def _infer_where(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    if inputs[0].dtype is not dtypes.bool_:
        reject("where", f"the condition must be bool, not {inputs[0].dtype}", inputs)
    if inputs[1].dtype is not inputs[2].dtype:
        reject("where", f"the values are {inputs[1].dtype} and {inputs[2].dtype}; cast one", inputs)
    shape = broadcast_shape("where", inputs, [each.shape for each in inputs])
    return TensorType(inputs[1].dtype, shape)


def _infer_cast(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    return TensorType(attributes["dtype"], inputs[0].shape)


def _cast(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    """float to integer truncates toward zero (out of range: undefined); to bool is x != 0."""
    source, target = node.inputs[0].dtype, node.dtype
    if target.is_float and not context.exact:
        return np.asarray(arrays[0]).astype(target.numpy)
    wide = widen(arrays[0], source, context.exact)
    with np.errstate(all="ignore"):
        if target is dtypes.bool_:
            return wide != 0
        if target.is_integer and target.bits < 64 and source.is_float:
            wide = wide.astype(np.int64)
        return round_to(wide, target, context.exact)


def _infer_bitcast(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    if inputs[0].dtype.bits != attributes["dtype"].bits:
        reject("bitcast", f"{inputs[0].dtype} and {attributes['dtype']} differ in width", inputs)
    return TensorType(attributes["dtype"], inputs[0].shape)


def _bitcast(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    """The bits of one dtype read as those of another of the same width."""
    array = np.ascontiguousarray(arrays[0]).reshape(np.shape(arrays[0]))
    return array.astype(node.inputs[0].dtype.numpy).view(node.dtype.numpy)


def _gelu(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    with np.errstate(all="ignore"):
        [x] = widened(node, arrays, context)
        return round_to(gelu(x, node["approximate"]), node.dtype, context.exact)


# ---- decompositions ----------------------------------------------------------------------------


def scalar(value: float, like: Node) -> Node:
    """The constant scalar of the node's dtype."""
    return constant(value, like.dtype)


def cast(x: Node, dtype: DType) -> Node:
    """`cast`, or x itself when it has the dtype."""
    return x if x.dtype is dtype else make("cast", x, dtype=dtype)


def _in_compute_type(build: Callable[[Node, Node], Node]) -> Callable[[Node], Node]:
    """A decomposition that builds in f32 (f64 for f64) and rounds once, like the reference."""

    def decompose(node: Node) -> Node:
        x = node.inputs[0]
        return cast(build(node, cast(x, compute_dtype(x.dtype))), x.dtype)

    return decompose


def _build_sigmoid(node: Node, x: Node) -> Node:
    return make("reciprocal", make("add", make("exp", make("neg", x)), scalar(1, x)))


def _build_silu(node: Node, x: Node) -> Node:
    return make("div", x, make("add", make("exp", make("neg", x)), scalar(1, x)))


def _build_softplus(node: Node, x: Node) -> Node:
    tail = make("exp", make("neg", make("abs", x)))
    return make("add", make("max", x, scalar(0, x)), make("log", make("add", tail, scalar(1, x))))


def _build_gelu(node: Node, x: Node) -> Node:
    half = make("mul", x, scalar(0.5, x))
    if node["approximate"] == "none":
        inner = make("erf", make("mul", x, scalar(math.sqrt(0.5), x)))
    else:
        cube = make("mul", make("mul", x, x), make("mul", x, scalar(0.044715, x)))
        inner = make("tanh", make("mul", make("add", x, cube), scalar(math.sqrt(2 / math.pi), x)))
    return make("mul", half, make("add", inner, scalar(1, x)))


# Numerators and denominators in x*x, highest power first, of (atan(x) - x) / x**3 for |x| below
# tan(pi / 8): Cephes' atanf.c and atan.c.
_ATAN = {
    "f32": ((8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1), (1.0,)),
    "f64": ((-8.750608600031904122785e-1, -1.615753718733365076637e1, -7.500855792314704667340e1,
             -1.228866684490136173410e2, -6.485021904942025371773e1),
            (1.0, 2.485846490142306297962e1, 1.650270098316988542046e2, 4.328810604912902668951e2,
             4.853903996359136964868e2, 1.945506571482613964425e2)),
}


def _polynomial(x: Node, coefficients: Sequence[float]) -> Node:
    """By Horner's rule, highest power first."""
    total = scalar(coefficients[0], x)
    for each in coefficients[1:]:
        total = make("add", make("mul", total, x), scalar(each, x))
    return total


def _build_atan(node: Node, x: Node) -> Node:
    """atan(-x) = -atan(x), atan(x) = pi/4 + atan((x-1)/(x+1)), atan(x) = pi/2 - atan(1/x); at most
    3 ulp."""
    one, size = scalar(1, x), make("abs", x)
    steep = make("greater", size, scalar(math.tan(3 * math.pi / 8), x))
    middle = make("greater", size, scalar(math.tan(math.pi / 8), x))
    turned = make("div", make("sub", size, one), make("add", size, one))
    small = make("where", steep, make("neg", make("reciprocal", size)),
                 make("where", middle, turned, size))
    start = make("where", steep, scalar(math.pi / 2, x),
                 make("where", middle, scalar(math.pi / 4, x), scalar(0, x)))
    square = make("mul", small, small)
    above, below = (_polynomial(square, each) for each in _ATAN[x.dtype.name])
    bend = make("mul", make("mul", small, square), make("div", above, below))
    angle = make("add", start, make("add", small, bend))
    return make("where", make("less", x, scalar(0, x)), make("neg", angle), angle)


# ---- the table ---------------------------------------------------------------------------------

_Row = tuple[str, Callable[..., Array]]

_UNARY: dict[str, _Row] = {
    "neg": ("number", np.negative),
    "abs": ("number", np.abs),
    "sign": ("number", np.sign),
    "relu": ("number", lambda x: np.maximum(x, x.dtype.type(0))),
    "exp": ("float", np.exp),
    "log": ("float", np.log),
    "sqrt": ("float", np.sqrt),
    "rsqrt": ("float", lambda x: 1 / np.sqrt(x)),
    "reciprocal": ("float", lambda x: 1 / x),
    "sin": ("float", np.sin),
    "cos": ("float", np.cos),
    "tanh": ("float", np.tanh),
    "erf": ("float", erf),
    "floor": ("float", np.floor),
    "ceil": ("float", np.ceil),
    "round": ("float", np.rint),  # halves to even
    "not": ("bool or integer", _not),  # logical for bool, bitwise for integers
}
_COMPOSITE: dict[str, tuple[Callable[..., Array], Callable[[Node, Node], Node]]] = {
    "sigmoid": (sigmoid, _build_sigmoid),
    "silu": (silu, _build_silu),
    "softplus": (softplus, _build_softplus),
    "atan": (np.arctan, _build_atan),
}
_BINARY: dict[str, _Row] = {
    "add": ("number", np.add),
    "sub": ("number", np.subtract),
    "mul": ("number", np.multiply),
    "div": ("number", divide),  # integers truncate toward zero
    "floor_div": ("number", floor_divide),
    "mod": ("number", np.mod),  # the sign of the divisor, as floor_div
    "pow": ("number", np.power),
    "max": ("number", np.maximum),  # NaN if either is
    "min": ("number", np.minimum),
    "and": ("bool or integer", np.bitwise_and),
    "or": ("bool or integer", np.bitwise_or),
    "xor": ("bool or integer", np.bitwise_xor),
    "shift_left": ("integer", shift_left),
    "shift_right": ("integer", shift_right),
}
_COMPARISON: dict[str, _Row] = {
    "equal": ("any", np.equal),
    "not_equal": ("any", np.not_equal),
    "less": ("number", np.less),
    "less_equal": ("number", np.less_equal),
    "greater": ("number", np.greater),
    "greater_equal": ("number", np.greater_equal),
}

UNARY = (*_UNARY, *_COMPOSITE, "gelu", "is_nan")
BINARY = (*_BINARY, *_COMPARISON)
ELEMENTWISE = frozenset((*UNARY, *BINARY, "where", "clamp", "cast", "bitcast"))

TABLE = [
    *(Op(name, _infer(name, kind), _reference(function), arity=(1, 1))
      for name, (kind, function) in _UNARY.items()),
    *(Op(name, _infer(name, "float"), _reference(function), _in_compute_type(build), arity=(1, 1))
      for name, (function, build) in _COMPOSITE.items()),
    *(Op(name, _infer(name, kind), _reference(function), arity=(2, 2))
      for name, (kind, function) in _BINARY.items()),
    *(Op(name, _infer(name, kind, dtypes.bool_), _reference(function), arity=(2, 2))
      for name, (kind, function) in _COMPARISON.items()),
    Op("is_nan", _infer("is_nan", "float", dtypes.bool_), _reference(np.isnan), arity=(1, 1)),
    Op("gelu", _infer("gelu", "float"), _gelu, _in_compute_type(_build_gelu), arity=(1, 1),
       attributes={"approximate": Attribute(choice("none", "tanh"), "none")}),
    Op("where", _infer_where, _reference(np.where), arity=(3, 3)),
    Op("clamp", _infer("clamp", "number"), arity=(3, 3),
       reference=_reference(lambda x, low, high: np.minimum(np.maximum(x, low), high))),
    Op("cast", _infer_cast, _cast, arity=(1, 1), attributes={"dtype": Attribute(element_type)}),
    Op("bitcast", _infer_bitcast, _bitcast, arity=(1, 1),
       attributes={"dtype": Attribute(element_type)}),
]
