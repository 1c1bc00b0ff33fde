"""Cuts a model that has text into a plan: programs, and steps that the host does itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import get_attribute_value

from llmc.errors import ModelError
from llmc.frontend.onnx.check import node_name, unsupported_operators
from llmc.frontend.onnx.protobuf import parse_model
from llmc.ir.plan import HostStep, Plan, ProgramStep

# What takes text as it is: computed by the host only where an input or output is text.
ON_TEXT = frozenset({"Cast", "CastLike", "Concat", "Equal", "Gather", "Identity", "LabelEncoder",
                     "Reshape", "Squeeze", "Unsqueeze"})
HOST_OPS = frozenset({"RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit",
                      "TfIdfVectorizer"})
TEXT_RESULTS = {"StringConcat": 1, "StringNormalizer": 1, "StringSplit": 1}
NO_TEXT = frozenset({"Equal", "RegexFullMatch", "TfIdfVectorizer"})


def host_plan(content: bytes, path: str = "model.onnx") -> Plan | None:
    """The plan of an .onnx file's content, or None if it has nothing for the host to do.

    ModelError lists the operators that nothing computes.
    """
    model = parse_model(content, Path(path))
    text = _texts(model.graph)
    hosted = [_is_hosted(node, text) for node in model.graph.node]
    if not any(hosted):
        return None
    others = [node for node, own in zip(model.graph.node, hosted, strict=True) if not own]
    functions = {(function.domain, function.name) for function in model.functions}
    if missing := unsupported_operators(others, functions):
        raise ModelError(f"{path}: unsupported operators: {'; '.join(missing)}")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    steps: list[HostStep | ProgramStep] = []
    for own, nodes in _levels(model.graph.node, hosted):
        steps += [_host_step(node) for node in nodes] if own else [_program_step(model, nodes)]
    return Plan(tuple(steps), constants, tuple(output.name for output in model.graph.output))


def _texts(graph: GraphProto) -> set[str]:
    """The names of all values that are text."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.value_info)
             if value.type.tensor_type.elem_type == TensorProto.STRING}
    names |= {t.name for t in graph.initializer if t.data_type == TensorProto.STRING}
    for node in graph.node:
        if node.op_type in TEXT_RESULTS:
            names |= set(node.output[: TEXT_RESULTS[node.op_type]])
        elif node.op_type == "Constant":
            names |= set(node.output if _text_constant(node) else ())
        elif node.op_type in ("Cast", "LabelEncoder"):
            names |= set(node.output if _makes_text(node) else ())
        elif node.op_type in ON_TEXT - NO_TEXT and node.input[0] in names:
            names |= set(node.output)
    return names


def _text_constant(node: NodeProto) -> bool:
    return any(a.name in ("value_string", "value_strings")
               or (a.name == "value" and a.t.data_type == TensorProto.STRING)
               for a in node.attribute)


def _makes_text(node: NodeProto) -> bool:
    return any((a.name == "to" and a.i == TensorProto.STRING) or a.name == "values_strings"
               or (a.name == "values_tensor" and a.t.data_type == TensorProto.STRING)
               for a in node.attribute)


def _is_hosted(node: NodeProto, text: set[str]) -> bool:
    if node.op_type in HOST_OPS:
        return True
    touches = not text.isdisjoint((*node.input, *node.output))
    return touches and (node.op_type in ON_TEXT or node.op_type == "Constant")


def _levels(
    nodes: Sequence[NodeProto], hosted: Sequence[bool]
) -> Iterable[tuple[bool, list[NodeProto]]]:
    """Nodes of one kind (host or program) that can run together, in an order that works."""
    level: dict[str, int] = {}
    groups: dict[int, list[NodeProto]] = {}
    for node, own in zip(nodes, hosted, strict=True):
        inputs = [*node.input, *(name for a in node.attribute for name in _captured(a.g))]
        number = max((level.get(name, 0) for name in inputs), default=0)
        number += (number % 2 == 0) != own  # even levels are the host's
        level.update(dict.fromkeys(node.output, number))
        groups.setdefault(number, []).append(node)
    return [(number % 2 == 0, groups[number]) for number in sorted(groups)]


def _captured(graph: GraphProto) -> list[str]:
    """Names that the nodes of a graph that is an attribute use, its own among them."""
    return [name for node in graph.node
            for name in (*node.input, *(n for a in node.attribute for n in _captured(a.g)))]


def _host_step(node: NodeProto) -> HostStep:
    attributes = {each.name: _plain(get_attribute_value(each)) for each in node.attribute}
    return HostStep(
        node.op_type, node_name(node), tuple(node.input), tuple(node.output), attributes)


def _plain(value: Any) -> Any:
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _program_step(model: ModelProto, nodes: Sequence[NodeProto]) -> ProgramStep:
    """The nodes as a model of their own; it puts out all that they make."""
    graph = model.graph
    made = [name for node in nodes for name in node.output if name]
    used = {name for node in nodes for name in node.input if name} | {
        name for node in nodes for a in node.attribute for name in _captured(a.g)}
    weights = [tensor for tensor in graph.initializer
               if tensor.name in used and tensor.data_type != TensorProto.STRING]
    inside = {tensor.name for tensor in weights} | set(made)
    known = {value.name: value for value in graph.input}
    names = _outside(used - inside, graph)
    part = helper.make_graph(
        nodes, "part",
        [known.get(name) or helper.make_empty_tensor_value_info(name) for name in names],
        [helper.make_empty_tensor_value_info(name) for name in made], weights)
    whole = helper.make_model(part, opset_imports=model.opset_import, functions=model.functions)
    whole.ir_version = model.ir_version
    return ProgramStep(whole.SerializeToString(), tuple(names), tuple(made))


def _outside(names: set[str], graph: GraphProto) -> list[str]:
    """Those of the names that the graph's inputs or nodes give, in order."""
    given = [value.name for value in graph.input]
    given += [name for node in graph.node for name in node.output if name]
    return [name for name in given if name in names]


def declared_part(model: bytes, arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """A program step's model with the types of its inputs as the arrays have them."""
    part = ModelProto.FromString(model)
    for value in part.graph.input:
        if not value.type.HasField("tensor_type"):
            array = arrays[value.name]
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind, array.shape))
    return part.SerializeToString()
