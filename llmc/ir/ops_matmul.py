"""Matrix products and the dequantisation of weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.ir import dtypes
from llmc.ir.activation_codes import coded
from llmc.ir.dims import ceildiv
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
    element_type,
    integer,
    promote,
    reject,
    require_float,
    require_integer,
    require_same_dim,
    round_to,
    same_shape,
    widen,
)


def _result_dtype(inputs: Inputs) -> DType:
    """The promoted operand type; i32 for integers of fewer bits."""
    dtype = promote(inputs[0].dtype, inputs[1].dtype)
    return dtypes.i32 if dtype.is_integer and dtype.bits < 32 else dtype


def _infer_matmul(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """NumPy's matmul: [.., m, k] @ [.., k, n], leading axes broadcast, one axis allowed."""
    a, b = inputs
    for each in inputs:
        if each.rank == 0 or each.dtype is dtypes.bool_:
            reject("matmul", "operands must be numbers with at least one axis", inputs)
    if a.dtype.is_float != b.dtype.is_float:
        reject("matmul", "one operand is float, the other integer; cast one", inputs)
    if a.dtype.is_float != attributes["dtype"].is_float:
        reject("matmul", f"the result cannot be {attributes['dtype']}", inputs)
    block = attributes["activation_block"]
    if block < 0 or (block and a.dtype.is_integer):
        reject("matmul", "only floats become codes, in blocks of one k or more", inputs)
    inner = b.shape[-2] if b.rank > 1 else b.shape[0]
    require_same_dim("matmul", inputs, "contracted dims", a.shape[-1], inner)
    leading = broadcast_shape("matmul", inputs, (a.shape[:-2], b.shape[:-2]))
    rows = a.shape[-2:-1]
    columns = b.shape[-1:] if b.rank > 1 else ()
    return TensorType(attributes["dtype"], (*leading, *rows, *columns))


def _matmul(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    """Accumulates in f32 (f64 if an operand is f64), integers in i32 (i64 if one is wider). With an
    activation_block, the left operand is rounded to int8 codes first: see `activation_codes`."""
    a, b = (
        widen(array, operand.dtype, context.exact)
        for array, operand in zip(arrays, node.inputs, strict=True)
    )
    if a.dtype.kind in "iu":
        wide = np.int64 if max(a.dtype.itemsize, b.dtype.itemsize) > 4 else np.int32
        a, b = a.astype(wide), b.astype(wide)
    if node["activation_block"]:
        a = coded(a, node["activation_block"])
    with np.errstate(all="ignore"):
        return round_to(np.matmul(a, b), node.dtype, context.exact)


def _infer_dequantize(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """codes [.., K], scales [.., ceil(K / group)], zeros as scales: (codes - zeros) * scales."""
    codes, group = inputs[0], attributes["group"]
    require_integer("dequantize", inputs, 0)
    require_float("dequantize", inputs, 1)
    if codes.rank == 0 or group < 1:
        reject("dequantize", f"group is {group}; it must be positive", inputs)
    wanted = (*codes.shape[:-1], ceildiv(codes.shape[-1], group))
    if not all(same_shape(each.shape, wanted) for each in inputs[1:]):
        reject("dequantize", f"scales and zeros need one value per {group} codes", inputs)
    if not attributes["dtype"].is_float:
        reject("dequantize", f"the result cannot be {attributes['dtype']}", inputs)
    return TensorType(attributes["dtype"], codes.shape)


def _dequantize(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    wide = np.float64 if context.exact or node.dtype is dtypes.f64 else np.float32
    values = [
        widen(array, operand.dtype).astype(wide)
        for array, operand in zip(arrays, node.inputs, strict=True)
    ]
    columns = np.arange(values[0].shape[-1]) // node["group"]
    shifted = values[0] - values[2][..., columns] if len(values) == 3 else values[0]
    return round_to(shifted * values[1][..., columns], node.dtype, context.exact)


TABLE = [
    Op("matmul", _infer_matmul, _matmul, arity=(2, 2),
       attributes={"dtype": Attribute(element_type, _result_dtype),
                   "activation_block": Attribute(integer, 0)}),
    Op("dequantize", _infer_dequantize, _dequantize, arity=(2, 3),
       attributes={"group": Attribute(integer),
                   "dtype": Attribute(element_type, lambda inputs: inputs[1].dtype)}),
]
