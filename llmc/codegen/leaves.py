"""Leaves of a body: constants, iota, dims, and what differs by turn of a repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import llvmlite.ir as ir
import numpy as np

from llmc.codegen import elements
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I8, I64, i64, like, splat_constant, vector
from llmc.ir.graph import Node
from llmc.ir.layouts import Rows

if TYPE_CHECKING:
    from llmc.codegen.expr import Expression


def _constant(x: Expression, node: Node, index: tuple[Index, ...], lanes: int,
              mask: ir.Value | None) -> ir.Value:
    values = np.frombuffer(node["data"], node.dtype.numpy)
    if values.size == 1 or (values.size and node["data"] == values[:1].tobytes() * values.size):
        return literal(node, values.flat[0], lanes)
    data = _global_bytes(x, node["data"])
    place = Rows().address([x.dim(size) for size in node.shape], list(index))
    return elements.load(x.e, data, x.emit_index(place), node.dtype, lanes)


def literal(node: Node, value: object, lanes: int) -> ir.Constant:
    """One element as a constant in a register."""
    type_ = vector(elements.register_type(node.dtype), lanes)
    if node.dtype.is_float:
        return splat_constant(type_, float(value))  # type: ignore[arg-type]
    return splat_constant(type_, int(value))  # type: ignore[call-overload]


def _global_bytes(x: Expression, data: bytes) -> ir.GlobalVariable:
    """Read-only data; padded so that a vector load at its end stays inside."""
    padded = bytearray(data + bytes(64))
    type_ = ir.ArrayType(I8, len(padded))
    module = x.e.module
    variable = ir.GlobalVariable(module, type_, module.get_unique_name("constant"))
    variable.linkage = "internal"
    variable.global_constant = True
    variable.align = 64
    variable.initializer = ir.Constant(type_, padded)
    return variable


def _iota(x: Expression, node: Node, index: tuple[Index, ...], lanes: int,
          mask: ir.Value | None) -> ir.Value:
    axis = node["axis"] % node.rank
    start = x.emit_index(index[axis])
    if lanes > 1 and axis == node.rank - 1:
        steps = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        value = x.e.b.add(x.e.splat(start, lanes), steps)
    else:
        value = x.e.splat(start, lanes)
    return from_index(x, value, node)


def from_index(x: Expression, value: ir.Value, node: Node) -> ir.Value:
    """An i64 value in the register form of node's dtype."""
    type_ = like(value, elements.register_type(node.dtype))
    if node.dtype.is_float:
        return x.e.b.sitofp(value, type_)
    return value if type_ == value.type else x.e.b.trunc(value, type_)


def _dim(x: Expression, node: Node, index: tuple[Index, ...], lanes: int,
         mask: ir.Value | None) -> ir.Value:
    return x.e.splat(from_index(x, x.frame.dim(node["value"]), node), lanes)


def _turn(x: Expression) -> ir.Value:
    return x.frame.layer if x.frame.layer is not None else i64(0)


def _layer(x: Expression, node: Node, index: tuple[Index, ...], lanes: int,
           mask: ir.Value | None) -> ir.Value:
    return x.e.splat(from_index(x, _turn(x), node), lanes)


def _table(x: Expression, node: Node, index: tuple[Index, ...], lanes: int,
           mask: ir.Value | None) -> ir.Value:
    values = np.asarray(node["values"]).astype(node.dtype.numpy)
    data = _global_bytes(x, values.tobytes())
    return x.e.splat(elements.load(x.e, data, _turn(x), node.dtype), lanes)


LEAVES = {"constant": _constant, "iota": _iota, "dim": _dim, "layer": _layer, "table": _table}
