"""Operators that make shapes and constants: Shape, Range, Constant ..."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmc.frontend.onnx import shape_array
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.protobuf import small_array
from llmc.frontend.onnx.registry import Result, Value, converter
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType, f32, from_numpy
from llmc.ir.graph import Node


@converter("Shape", inputs=1)
def shape(call: Call) -> Result:
    value = call.value(0)
    stop = call.attribute("end")
    return shape_array.from_items(list(value.shape)[slice(call.attribute("start", 0), stop)])


@converter("Size", inputs=1)
def size(call: Call) -> Result:
    return shape_array.scalar(dims.product(call.value(0).shape))


@converter("Constant", inputs=0)
def constant(call: Call) -> Result:
    """Weights in Constant nodes are taken out as parameters before conversion (`importer`)."""
    given = [name for name in call.attributes if name.startswith(("value", "sparse"))]
    if len(given) != 1 or given[0] not in _CONSTANTS:
        raise call.error(f"expected one value, found: {', '.join(given) or 'none'}")
    value = call.attributes[given[0]]
    if given[0] == "value":
        array, dtype = small_array(value, call.location)
        return constant_value(call, array, dtype)
    return constant_value(call, np.asarray(value, dtype=_CONSTANTS[given[0]]))


_CONSTANTS: dict[str, Any] = {
    "value": None,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def constant_value(call: Any, array: np.ndarray[Any, Any], dtype: DType | None = None) -> Value:
    """Compile-time integers where shape arithmetic may need them, else a constant node."""
    dtype = dtype or from_numpy(array.dtype)
    if shape_array.is_shape_dtype(dtype) and array.size <= shape_array.LIMIT:
        return shape_array.from_numpy(array, dtype)
    node: Node = call.constant(array, dtype)
    return node


@converter("ConstantOfShape", inputs=1)
def constant_of_shape(call: Call) -> Result:
    extents = call.dims(0, "the shape")
    proto = call.attribute("value")
    if proto is None:
        array, dtype = np.zeros(1, np.float32), f32
    else:
        array, dtype = small_array(proto, call.location)
    if array.size != 1:
        raise call.error(f"value has {array.size} items instead of one")
    value = array.reshape(()).item()
    constant = shape_array.small_extents(extents)
    if constant is not None and shape_array.is_shape_dtype(dtype):
        return shape_array.from_numpy(np.full(constant, value), dtype)
    return call.broadcast(call.constant(array.reshape(()), dtype), extents)


@converter("Range", inputs=3)
def arange(call: Call) -> Result:
    bounds = call.shape_arrays()
    if bounds is None:
        return known_range(call)
    start, limit, delta = (bound.flat()[0] for bound in bounds)
    if not isinstance(delta, int) or delta == 0:
        raise call.error(f"step {delta} is not a non-zero constant")
    length = dims.maximum(dims.ceildiv((limit - start) * (1 if delta > 0 else -1), abs(delta)), 0)
    dtype = bounds[0].dtype
    if isinstance(length, int) and isinstance(start, int) and length <= shape_array.LIMIT:
        return shape_array.from_items((start + delta * k for k in range(length)), dtype)
    ramp = call.iota(length, dtype)
    ramp = call.scaled(ramp, delta) if delta != 1 else ramp
    return ramp if start == 0 else call.binary("add", ramp, call.dim(start, dtype))


def known_range(call: Call) -> Node:
    """A range of floats, or of numbers that depend on data."""
    start, limit, delta = (call.known(index, "its length").reshape(()) for index in range(3))
    dtype, wide = from_numpy(start.dtype), np.int64 if start.dtype.kind in "iu" else np.float64
    first, last, step = (float(each) for each in (start, limit, delta))
    length = max(math.ceil((last - first) / step), 0) if step else 0
    ramp = call.cast(call.iota(length), from_numpy(np.dtype(wide)))
    scaled = call.binary("mul", ramp, call.constant(delta.astype(wide)))
    return call.cast(call.binary("add", scaled, call.constant(start.astype(wide))), dtype)


@converter("EyeLike", inputs=1)
def eye_like(call: Call) -> Result:
    from llmc.frontend.onnx.protobuf import element_dtype

    value = call.value(0)
    rows, columns = value.shape
    code = call.attribute("dtype")
    dtype = value.dtype if code is None else element_dtype(code, call.location)
    row = call.shifted(call.unsqueeze(call.iota(rows), [1]), call.attribute("k", 0))
    return call.cast(call.binary("equal", row, call.unsqueeze(call.iota(columns), [0])), dtype)


def normalized(index: Dim, extent: Dim) -> Dim:
    """A possibly negative index, counted from the front."""
    low, _ = dims.bounds(index)
    return index if low >= 0 else index + extent
