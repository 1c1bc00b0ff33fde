"""Conversions between element types: Cast, CastLike, BitCast."""

from __future__ import annotations

import ml_dtypes

from llmc.frontend.onnx import shape_array
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.protobuf import element_dtype
from llmc.frontend.onnx.registry import Result, Value, converter
from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.ir.dtypes import DType, bool_, f8e8m0, f32, f64, i32, u8
from llmc.ir.graph import Node

MANTISSA = 23  # bits of an f32's
NOT_A_NUMBER = 255  # code of f8e8m0


@converter("Cast", inputs=1)
def cast(call: Call) -> Result:
    return cast_value(call, call.value(0), element_dtype(call.required("to"), call.location))


@converter("CastLike", inputs=2)
def cast_like(call: Call) -> Result:
    return cast_value(call, call.value(0), call.value(1).dtype)


@converter("BitCast", inputs=1)
def bit_cast(call: Call) -> Result:
    x, to = call.input(0), element_dtype(call.required("to"), call.location)
    return x if x.dtype is to else call.make("bitcast", x, dtype=to)


def cast_value(call: Call, value: Value, to: DType) -> Value:
    """Casts; shape arithmetic stays shape arithmetic where the dtype allows it."""
    if isinstance(value, Node):
        return to_exponent(call, value) if to is f8e8m0 else cast_node(call, value, to)
    if to.is_integer and value.dtype is not bool_ and shape_array.is_shape_dtype(to):
        return ShapeArray(value.items, to)
    known = value.known()
    if known is None:
        return call.cast(call.tensor(value), to)
    if shape_array.is_shape_dtype(to):
        return shape_array.from_numpy(known.astype(to.numpy), to)
    return call.constant(known.astype(to.numpy), to)


def cast_node(call: Call, x: Node, to: DType) -> Node:
    """A cast that saturates to 8-bit floats if the attribute says so, as by default."""
    if to.name.startswith("f8e") and call.attribute("saturate", 1):
        x = saturated(call, x, to)
    return call.cast(x, to)


def saturated(call: Call, x: Node, to: DType) -> Node:
    """x, as a float, within the finite range of a small float."""
    wide = x if x.dtype.is_float and x.dtype.bits > 8 else call.cast(x, f32)
    limit = float(ml_dtypes.finfo(to.numpy).max)
    return call.clamp(wide, call.scalar(-limit, wide.dtype), call.scalar(limit, wide.dtype))


def to_exponent(call: Call, x: Node) -> Node:
    """x as f8e8m0, a power of 2: an f32's exponent, rounded as `round_mode` says.

    Saturating, zero becomes the least and what is too large the greatest power; else NaN. What
    negative numbers become is not defined.
    """
    if x.dtype is f8e8m0:
        return x
    saturate, mode = call.attribute("saturate", 1), str(call.attribute("round_mode", "up"))
    least = {"up": 1, "nearest": 1 << (MANTISSA - 1), "down": 1 << MANTISSA}.get(mode)
    if least is None:
        raise call.error(f"round_mode={mode!r} is not 'up', 'down' or 'nearest'")
    wide = call.cast(x, f32 if x.dtype is f64 or not x.dtype.is_float else x.dtype)
    bits = call.make("bitcast", call.cast(wide, f32), dtype=i32)
    bits = call.binary("and", bits, call.scalar((1 << 31) - 1, i32))
    rounded = call.shifted(bits, (1 << MANTISSA) - least)
    code = call.binary("floor_div", rounded, call.scalar(1 << MANTISSA, i32))
    special = call.binary("greater_equal", bits, call.scalar(255 << MANTISSA, i32))
    if saturate:
        code = call.binary("min", code, call.scalar(NOT_A_NUMBER - 1, i32))
    else:
        zero = call.binary("equal", bits, call.scalar(0, i32))
        special = call.binary("or", special, zero)
    code = call.where(special, call.scalar(NOT_A_NUMBER, i32), code)
    return call.make("bitcast", call.cast(code, u8), dtype=f8e8m0)
