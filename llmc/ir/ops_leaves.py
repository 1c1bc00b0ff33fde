"""Leaves: inputs, parameters, states, constants, iota, dims, and what differs by turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmc.errors import GraphError
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
    data,
    dim,
    dims,
    element_type,
    make,
    numbers,
    reject,
    round_to,
    tensor_type,
    text,
    texts,
)

CONSTANT_BYTES = 64 * 1024


def constant(value: Any, dtype: DType | str | None = None) -> Node:
    """The constant node of an array, a (nested) list or a scalar.

    Without `dtype`, arrays keep theirs; Python floats become f32, ints i64. GraphError above
    64 KiB: larger values are parameters.
    """
    if dtype is not None:
        wanted = dtypes.dtype(dtype)
    elif isinstance(value, (np.ndarray, np.generic)):
        wanted = dtypes.from_numpy(value.dtype)
    else:
        wanted = dtypes.from_numpy(np.asarray(value).dtype)
        wanted = dtypes.f32 if wanted is dtypes.f64 else wanted
    array = np.asarray(value).astype(wanted.numpy)
    return make("constant", dtype=wanted, shape=array.shape, data=array.tobytes())


def constant_value(node: Node) -> np.ndarray:
    """The array of a constant node, in its dtype (read-only)."""
    flat = np.frombuffer(node["data"], dtype=node.dtype.numpy)
    return flat.reshape(node["shape"])


def _infer_leaf(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    return attributes["type"]


def _read(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return context.read(node)


def _infer_constant(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    shape, dtype, content = attributes["shape"], attributes["dtype"], attributes["data"]
    if not all(isinstance(each, int) for each in shape):
        reject("constant", f"shape {shape} is not made of integers")
    if len(content) > CONSTANT_BYTES:
        reject("constant", f"{len(content)} bytes exceed {CONSTANT_BYTES}; make it a parameter")
    expected = math.prod(shape) * dtype.numpy.itemsize
    if len(content) != expected:
        reject("constant", f"{dtype}{list(shape)} needs {expected} bytes, got {len(content)}")
    return TensorType(dtype, shape)


def _constant(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return round_to(constant_value(node), node.dtype, context.exact)


def _infer_iota(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    rank = len(attributes["shape"])
    if not 0 <= attributes["axis"] < rank:
        reject("iota", f"axis {attributes['axis']} is not an axis of a tensor of rank {rank}")
    return TensorType(attributes["dtype"], attributes["shape"])


def _iota_axis(op: str, name: str, value: Any, inputs: Inputs) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise GraphError(f"{op}: attribute '{name}' must be an integer, not {value!r}")
    return value


def _iota(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    shape = context.shape(node["shape"])
    along = np.arange(shape[node["axis"]])
    lifted = along.reshape([-1 if i == node["axis"] else 1 for i in range(len(shape))])
    return round_to(np.broadcast_to(lifted, shape), node.dtype, context.exact)


def _infer_scalar(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    return TensorType(attributes["dtype"], ())


def _dim(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return round_to(np.asarray(context.size(node["value"])), node.dtype, context.exact)


def _layer(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return round_to(np.asarray(context.turn), node.dtype, context.exact)


def _infer_table(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    if not attributes["values"]:
        reject("table", "needs at least one value")
    return TensorType(attributes["dtype"], ())


def _table(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return round_to(np.asarray(node["values"][context.turn]), node.dtype, context.exact)


_NAMES = Attribute(texts, ())

TABLE = [
    Op("input", _infer_leaf, _read,
       attributes={"name": Attribute(text), "type": Attribute(tensor_type)}),
    Op("parameter", _infer_leaf, _read,
       attributes={"name": Attribute(text), "type": Attribute(tensor_type), "names": _NAMES}),
    Op("state", _infer_leaf, _read,
       attributes={"name": Attribute(text), "type": Attribute(tensor_type),
                   "kind": Attribute(text, "paged"), "group": Attribute(text, "full"),
                   "names": _NAMES}),
    Op("constant", _infer_constant, _constant,
       attributes={"dtype": Attribute(element_type), "shape": Attribute(dims),
                   "data": Attribute(data)}),
    Op("iota", _infer_iota, _iota,
       attributes={"dtype": Attribute(element_type), "shape": Attribute(dims),
                   "axis": Attribute(_iota_axis)}),
    Op("dim", _infer_scalar, _dim,
       attributes={"value": Attribute(dim), "dtype": Attribute(element_type)}),
    Op("layer", _infer_scalar, _layer, attributes={"dtype": Attribute(element_type)}),
    Op("table", _infer_table, _table,
       attributes={"dtype": Attribute(element_type), "values": Attribute(numbers)}),
]
