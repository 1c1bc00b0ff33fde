"""Reductions, arg-reductions, cumulative sums, top-k, softmax and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmc.errors import ShapeError
from llmc.ir import dtypes
from llmc.ir.dims import Dim, bounds, format_dim, known_at_least
from llmc.ir.graph import Node, TensorType, Type
from llmc.ir.ops_core import (
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    axes,
    axis,
    compute_dtype,
    dim,
    flag,
    make,
    number,
    reject,
    require_float,
    require_same_dim,
    round_to,
    widen,
    widened,
)
from llmc.ir.ops_elementwise import cast, scalar

# ---- reductions --------------------------------------------------------------------------------


def _reduced(shape: Sequence[Dim], gone: Sequence[int], keep: bool) -> tuple[Dim, ...]:
    if keep:
        return tuple(1 if i in gone else size for i, size in enumerate(shape))
    return tuple(size for i, size in enumerate(shape) if i not in gone)


def _infer_reduce(op: str, kinds: str):
    def infer(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
        kind = inputs[0].dtype.kind
        if kind not in kinds.split():
            reject(op, f"cannot reduce {inputs[0].dtype}", inputs)
        shape = _reduced(inputs[0].shape, attributes["axes"], attributes["keep"])
        return TensorType(inputs[0].dtype, shape)

    return infer


def _lowest(dtype: np.dtype) -> float | int | bool:
    if dtype.kind == "b":
        return False
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _highest(dtype: np.dtype) -> float | int | bool:
    if dtype.kind == "b":
        return True
    return np.inf if dtype.kind == "f" else np.iinfo(dtype).max


_REDUCE: dict[str, tuple[str, Callable[..., Array]]] = {
    "reduce_sum": ("float int uint", lambda x, **how: np.sum(x, dtype=x.dtype, **how)),
    "reduce_prod": ("float int uint", lambda x, **how: np.prod(x, dtype=x.dtype, **how)),
    "reduce_mean": ("float", lambda x, **how: np.mean(x, dtype=x.dtype, **how)),
    "reduce_max": (
        "float int uint bool", lambda x, **how: np.max(x, initial=_lowest(x.dtype), **how)
    ),
    "reduce_min": (
        "float int uint bool", lambda x, **how: np.min(x, initial=_highest(x.dtype), **how)
    ),
}


def _reduce(function: Callable[..., Array]):
    def reference(node: Node, arrays: Sequence[Array], context: Context) -> Array:
        [x] = widened(node, arrays, context)
        with np.errstate(all="ignore"):
            result = function(x, axis=node["axes"], keepdims=node["keep"])
        return round_to(result, node.dtype, context.exact)

    return reference


def _infer_arg(op: str):
    def infer(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
        shape = _reduced(inputs[0].shape, (attributes["axis"],), attributes["keep"])
        return TensorType(dtypes.i64, shape)

    return infer


def _arg(function: Callable[..., Array]):
    """The first extreme value's index, with `last` the last one's."""

    def reference(node: Node, arrays: Sequence[Array], context: Context) -> Array:
        [x] = widened(node, arrays, context)
        along = node["axis"]
        if x.shape[along] == 0:
            raise ShapeError(f"{node.op} over an axis of size 0")
        if node["last"]:
            found = x.shape[along] - 1 - function(np.flip(x, along), axis=along)
        else:
            found = function(x, axis=along)
        return np.expand_dims(found, along) if node["keep"] else np.asarray(found)

    return reference


# ---- along one axis ----------------------------------------------------------------------------


def _infer_cumulative(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    if inputs[0].dtype is dtypes.bool_:
        reject("cumsum", "cannot add or multiply bool; cast it", inputs)
    return inputs[0].type


def _cumulative(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    [x] = widened(node, arrays, context)
    along, sums = node["axis"], node.op == "cumsum"
    x = np.flip(x, along) if node["reverse"] else x
    total = (np.cumsum if sums else np.cumprod)(x, axis=along, dtype=x.dtype)
    if node["exclusive"]:
        total = np.roll(total, 1, axis=along)
        total[(slice(None),) * along + (slice(0, 1),)] = 0 if sums else 1
    total = np.flip(total, along) if node["reverse"] else total
    return round_to(total, node.dtype, context.exact)


def _infer_top_k(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """(values, indices i64), largest first; of equal values the lower index comes first."""
    k, along, x = attributes["k"], attributes["axis"], inputs[0]
    if bounds(k)[0] < 0 or known_at_least(k - 1, x.shape[along]):
        reject("top_k", f"k = {format_dim(k)} of {format_dim(x.shape[along])}", inputs)
    shape = (*x.shape[:along], k, *x.shape[along + 1 :])
    return TensorType(x.dtype, shape), TensorType(dtypes.i64, shape)


def _top_k(node: Node, arrays: Sequence[Array], context: Context) -> tuple[Array, Array]:
    along, [x] = node["axis"], widened(node, arrays, context)
    backwards = np.argsort(np.flip(x, along), axis=along, kind="stable")
    order = x.shape[along] - 1 - np.flip(backwards, along)
    best = np.take(order, np.arange(context.size(node["k"])), axis=along)
    return np.take_along_axis(arrays[0], best, axis=along), best


def _infer_softmax(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    require_float("softmax", inputs)
    return inputs[0].type


def softmax(x: Array, along: int) -> Array:
    """exp(x) / sum(exp(x)), without overflow; NaN where all of a row is -inf."""
    with np.errstate(all="ignore"):
        e = np.exp(x - np.max(x, axis=along, keepdims=True, initial=-np.inf))
        return e / np.sum(e, axis=along, keepdims=True)


def _softmax(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    [x] = widened(node, arrays, context)
    return round_to(softmax(x, node["axis"]), node.dtype, context.exact)


def _decompose_softmax(node: Node) -> Node:
    x = cast(node.inputs[0], compute_dtype(node.dtype))
    high = make("reduce_max", x, axes=node["axis"], keep=True)
    e = make("exp", make("sub", x, high))
    total = make("reduce_sum", e, axes=node["axis"], keep=True)
    return cast(make("div", e, total), node.dtype)


# ---- norms over the last axis ------------------------------------------------------------------


def _infer_norm(op: str):
    def infer(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
        require_float(op, inputs)
        if inputs[0].rank == 0:
            reject(op, "needs at least one axis", inputs)
        for each in inputs[1:]:
            if each.rank != 1:
                reject(op, "weight and bias have one axis", inputs)
            require_same_dim(op, inputs, "last axis", each.shape[0], inputs[0].shape[-1])
        return inputs[0].type

    return infer


def _norm_operands(node: Node, arrays: Sequence[Array], context: Context) -> list[Array]:
    """All operands in the type that x computes in, whatever the weight is stored as."""
    wide = np.float64 if context.exact else compute_dtype(node.dtype).numpy
    pairs = zip(arrays, node.inputs, strict=True)
    return [widen(array, operand.dtype).astype(wide, copy=False) for array, operand in pairs]


def _rms_norm(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    x, weight = _norm_operands(node, arrays, context)
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=x.dtype)
    scaled = x / np.sqrt(mean + x.dtype.type(node["epsilon"]))
    return round_to(scaled * weight, node.dtype, context.exact)


def _layer_norm(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    x, weight, bias = _norm_operands(node, arrays, context)
    x = x - np.mean(x, axis=-1, keepdims=True, dtype=x.dtype)
    variance = np.mean(x * x, axis=-1, keepdims=True, dtype=x.dtype)
    scaled = x / np.sqrt(variance + x.dtype.type(node["epsilon"]))
    return round_to(scaled * weight + bias, node.dtype, context.exact)


def _normalised(node: Node, x: Node) -> Node:
    """x / sqrt(mean(x * x) + epsilon) along the last axis."""
    mean = make("reduce_mean", make("mul", x, x), axes=-1, keep=True)
    inverse = make("rsqrt", make("add", mean, scalar(node["epsilon"], x)))
    return make("mul", x, inverse)


def _decompose_rms_norm(node: Node) -> Node:
    x, weight = (cast(each, compute_dtype(node.dtype)) for each in node.inputs)
    return cast(make("mul", _normalised(node, x), weight), node.dtype)


def _decompose_layer_norm(node: Node) -> Node:
    x, weight, bias = (cast(each, compute_dtype(node.dtype)) for each in node.inputs)
    centred = make("sub", x, make("reduce_mean", x, axes=-1, keep=True))
    scaled = make("mul", _normalised(node, centred), weight)
    return cast(make("add", scaled, bias), node.dtype)


_AXIS = Attribute(axis)
_FALSE = Attribute(flag, False)
_EPSILON = Attribute(number)
_ARG = {"axis": _AXIS, "keep": _FALSE, "last": _FALSE}

TABLE = [
    *(Op(name, _infer_reduce(name, kinds), _reduce(function), arity=(1, 1),
         attributes={"axes": Attribute(axes), "keep": _FALSE})
      for name, (kinds, function) in _REDUCE.items()),
    Op("argmax", _infer_arg("argmax"), _arg(np.argmax), arity=(1, 1), attributes=_ARG),
    Op("argmin", _infer_arg("argmin"), _arg(np.argmin), arity=(1, 1), attributes=_ARG),
    *(Op(name, _infer_cumulative, _cumulative, arity=(1, 1),
         attributes={"axis": _AXIS, "exclusive": _FALSE, "reverse": _FALSE})
      for name in ("cumsum", "cumprod")),
    Op("top_k", _infer_top_k, _top_k, arity=(1, 1),
       attributes={"k": Attribute(dim), "axis": Attribute(axis, -1)}),
    Op("softmax", _infer_softmax, _softmax, _decompose_softmax, arity=(1, 1),
       attributes={"axis": Attribute(axis, -1)}),
    Op("rms_norm", _infer_norm("rms_norm"), _rms_norm, _decompose_rms_norm, arity=(2, 2),
       attributes={"epsilon": _EPSILON}),
    Op("layer_norm", _infer_norm("layer_norm"), _layer_norm, _decompose_layer_norm, arity=(3, 3),
       attributes={"epsilon": _EPSILON}),
]
