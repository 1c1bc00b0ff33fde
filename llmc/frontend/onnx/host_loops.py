"""Loops whose turns the host counts: their body is one program, however many turns there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.helper import get_attribute_value

from llmc.errors import ModelError
from llmc.frontend.onnx.check import node_name, opset_versions, unsupported_operators
from llmc.frontend.onnx.control import MOST_TURNS
from llmc.frontend.onnx.protobuf import element_dtype
from llmc.frontend.onnx.registry import AI_ONNX
from llmc.ir.plan import LoopStep, Scanned

FIRST_SCAN = 9  # the opset from which on a Scan has no batch of its own


def is_host_loop(
    node: NodeProto, model: ModelProto, constants: Mapping[str, np.ndarray[Any, Any]]
) -> bool:
    """Whether it is a loop over tensors whose turns nobody can count before it runs, or more than
    are written out; `constants` has what is known."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Loop", "Scan"):
        return False
    body = body_of(node)
    if not all(_is_tensor(value) for value in (*body.input, *body.output)):
        return False
    if node.op_type == "Scan":
        return opset_versions(model.opset_import).get(AI_ONNX, 1) >= FIRST_SCAN
    trips, condition = ([*node.input, "", ""][:2])
    few = trips in constants and constants[trips].reshape(-1)[0] <= MOST_TURNS
    always = not condition or (condition in constants and bool(constants[condition].all()))
    return not (few and always and _keeps_condition(body))


def body_of(node: NodeProto) -> GraphProto:
    """The graph that a loop repeats. ModelError if it has none."""
    for attribute in node.attribute:
        if attribute.name == "body":
            return attribute.g
    raise ModelError(f"node '{node_name(node)}' ({node.op_type}): attribute 'body' is missing")


def _is_tensor(value: ValueInfoProto) -> bool:
    kind = value.type.WhichOneof("value")
    return kind in (None, "tensor_type") and (
        value.type.tensor_type.elem_type != TensorProto.STRING)


def _keeps_condition(body: GraphProto) -> bool:
    """Whether the condition of the next turn is that of this one, or a constant."""
    name = body.output[0].name
    for node in body.node:
        if name in node.output:
            return node.op_type == "Constant" or (
                node.op_type == "Identity" and node.input[0] == body.input[1].name)
    return name == body.input[1].name


def captured_names(graph: GraphProto) -> list[str]:
    """Names that the nodes of a graph that is an attribute use, its own among them."""
    return [name for node in graph.node
            for name in (*node.input, *(n for a in node.attribute for n in captured_names(a.g)))]


def loop_step(model: ModelProto, node: NodeProto) -> LoopStep:
    """The loop as a step of a plan. ModelError lists operators of its body that are missing."""
    body, counted = body_of(node), node.op_type == "Loop"
    functions = {(function.domain, function.name) for function in model.functions}
    where = f"node '{node_name(node)}' ({node.op_type})"
    if missing := unsupported_operators(body.node, functions):
        raise ModelError(f"{where}: unsupported operators: {'; '.join(missing)}")
    attributes = {each.name: get_attribute_value(each) for each in node.attribute}
    scans = int(attributes.get("num_scan_inputs", 0))
    head = 2 if counted else 0
    carried = len(node.input) - head - scans
    if carried < 0 or len(body.input) != head + carried + scans or (
            len(body.output) < carried + head // 2):
        raise ModelError(f"{where}: its body does not fit its inputs")
    bounds = [*node.input[:head], "", ""]
    names = [*node.output, *[""] * len(body.output)]
    outputs = body.output[carried + head // 2 :]
    captured, content = _body_model(model, body)
    return LoopStep(
        name=node_name(node),
        model=content,
        counted=counted,
        trips=bounds[0],
        condition=bounds[1],
        carried=tuple(zip(node.input[head : head + carried], names, strict=False)),
        scanned=_scanned(node.input[head + carried :], attributes, "input"),
        captured=captured,
        put_out=_scanned(names[carried : carried + len(outputs)], attributes, "output", outputs),
        takes=tuple(value.name for value in body.input),
        gives=tuple(value.name for value in body.output),
    )


def _scanned(
    names: Sequence[str],
    attributes: Mapping[str, Any],
    side: str,
    declared: Iterable[ValueInfoProto] = (),
) -> tuple[Scanned, ...]:
    axes = attributes.get(f"scan_{side}_axes") or [0] * len(names)
    backwards = attributes.get(f"scan_{side}_directions") or [0] * len(names)
    empty = [_empty(value) for value in declared] or [None] * len(names)
    return tuple(Scanned(name, int(axis), bool(reverse), nothing) for name, axis, reverse, nothing
                 in zip(names, axes, backwards, empty, strict=True))


def _empty(declared: ValueInfoProto) -> np.ndarray[Any, Any] | None:
    """What no turns put out: no slices of the declared type; None where that is not declared."""
    tensor = declared.type.tensor_type
    if not tensor.elem_type:
        return None
    dtype = element_dtype(tensor.elem_type, f"output '{declared.name}'").numpy
    return np.zeros((0, *(dim.dim_value for dim in tensor.shape.dim)), dtype)


def _body_model(model: ModelProto, body: GraphProto) -> tuple[tuple[str, ...], bytes]:
    """(what it uses of the values outside, the body as a model of its own that takes those too)."""
    graph = model.graph
    own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    own |= {name for node in body.node for name in node.output}
    used = ({*captured_names(body), *(value.name for value in body.output)}) - own
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    known = {tensor.name for tensor in weights}
    given = [value.name for value in graph.input]
    given += [name for node in graph.node for name in node.output if name]
    captured = tuple(name for name in dict.fromkeys(given) if name in used - known)
    part = helper.make_graph(
        body.node, "turn",
        [helper.make_empty_tensor_value_info(name)
         for name in (*(value.name for value in body.input), *captured)],
        [helper.make_empty_tensor_value_info(value.name) for value in body.output],
        [*weights, *body.initializer])
    whole = helper.make_model(part, opset_imports=model.opset_import, functions=model.functions)
    whole.ir_version = model.ir_version
    return captured, whole.SerializeToString()
