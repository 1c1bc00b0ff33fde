"""Structure: `get`, and the ops that own a body graph.

A body's inputs are `input` nodes with the operands' types, in order. A fusion or repeat with one
result has that result's type; with several, a tuple that `get` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.ir.graph import Graph, Node, Type, format_type
from llmc.ir.ops_core import (
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    dim,
    integer,
    reject,
    text,
)


def _infer_get(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    parts, index = inputs[0].type, attributes["index"]
    if not isinstance(parts, tuple):
        reject("get", "the operand is a tensor, not a tuple", inputs)
    if not 0 <= index < len(parts):
        reject("get", f"index {index} is outside a tuple of {len(parts)}", inputs)
    return parts[index]


def _get(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return arrays[0][node["index"]]


def _one_or_tuple(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tuple(parts)


def _the_body(op: str, inputs: Inputs, bodies: Bodies) -> Graph:
    if len(bodies) != 1:
        reject(op, f"needs one body, got {len(bodies)}", inputs)
    body = bodies[0]
    if not body.outputs:
        reject(op, "the body has no outputs", inputs)
    if len(body.inputs) != len(inputs):
        reject(op, f"the body has {len(body.inputs)} inputs, {len(inputs)} operands", inputs)
    for position, (inner, outer) in enumerate(zip(body.inputs, inputs, strict=True)):
        if inner.type != outer.type:
            reject(op, f"input {position} of the body is {format_type(inner.type)}", inputs)
    return body


def _infer_fusion(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    body = _the_body("fusion", inputs, bodies)
    return _one_or_tuple([node.type for _, node in body.outputs])


def _fusion(node: Node, arrays: Sequence[Array], context: Context) -> Any:
    return _one_or_tuple(context.run(node.bodies[0], arrays, context.turn))


def _infer_repeat(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    body, carried = _the_body("repeat", inputs, bodies), attributes["carried"]
    if not 0 < carried <= len(inputs) or len(body.outputs) != carried:
        reject("repeat", f"{carried} carried values, {len(body.outputs)} outputs of the body",
               inputs)
    for position, (_, output) in enumerate(body.outputs):
        if output.type != inputs[position].type:
            reject("repeat", f"carried value {position} becomes {format_type(output.type)}", inputs)
    return _one_or_tuple([each.type for each in inputs[:carried]])


def _repeat(node: Node, arrays: Sequence[Array], context: Context) -> Any:
    carried = list(arrays[: node["carried"]])
    invariant = list(arrays[node["carried"] :])
    for turn in range(context.size(node["count"])):
        carried = context.run(node.bodies[0], carried + invariant, turn)
    return _one_or_tuple(carried)


TABLE = [
    Op("get", _infer_get, _get, arity=(1, 1), attributes={"index": Attribute(integer)}),
    Op("fusion", _infer_fusion, _fusion, arity=(0, None),
       attributes={"anchor": Attribute(text), "name": Attribute(text, "")}),
    Op("repeat", _infer_repeat, _repeat, arity=(1, None),
       attributes={"count": Attribute(dim), "carried": Attribute(integer)}),
]
