"""Cuts a model that has text or loops into a plan: programs, and steps that the host does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import get_attribute_value

from llmc.errors import ModelError
from llmc.frontend.onnx.check import TEXT_OPERATORS, node_name, unsupported_operators
from llmc.frontend.onnx.host_loops import captured_names, is_host_loop, loop_step
from llmc.frontend.onnx.interface import drop_initializers
from llmc.frontend.onnx.protobuf import is_external, parse_model, stored_tensor
from llmc.ir.plan import HostStep, LoopStep, Plan, ProgramStep

# What takes text as it is: computed by the host only where an input or output is text.
ON_TEXT = frozenset({"Cast", "CastLike", "Concat", "Equal", "Gather", "Identity", "LabelEncoder",
                     "Reshape", "Squeeze", "Unsqueeze"})
TEXT_RESULTS = {"StringConcat": 1, "StringNormalizer": 1, "StringSplit": 1}
LOOPS = ("Loop", "Scan")
NO_TEXT = frozenset({"Equal", "RegexFullMatch", "TfIdfVectorizer"})


def host_plan(content: bytes, path: str = "model.onnx", fed: Collection[str] = ()
              ) -> Plan | None:
    """The plan of an .onnx file's content, or None if it has nothing for the host to do. `fed`:
    overridable initializers that are inputs.

    ModelError lists the operators that nothing computes, or says what is damaged.
    """
    model = parse_model(content, Path(path))
    drop_initializers(model, fed)
    try:
        return _planned(model, path)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path}: damaged: {error}") from error


def _planned(model: ModelProto, path: str) -> Plan | None:
    text = _texts(model.graph)
    if not any(_is_hosted(node, text) or node.op_type in LOOPS for node in model.graph.node):
        return None
    _take_in(model, Path(path))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    loops = not any("Sequence" in node.op_type or "Optional" in node.op_type
                    for node in model.graph.node)
    hosted = [_is_hosted(node, text) or (loops and is_host_loop(node, model, constants))
              for node in model.graph.node]
    if not any(hosted):
        return None
    others = [node for node, own in zip(model.graph.node, hosted, strict=True) if not own]
    functions = {(function.domain, function.name) for function in model.functions}
    if missing := unsupported_operators(others, functions):
        raise ModelError(f"{path}: unsupported operators: {'; '.join(missing)}")
    outputs = tuple(output.name for output in model.graph.output)
    levels = list(_levels(model.graph.node, hosted))
    steps: list[HostStep | ProgramStep | LoopStep] = []
    for number, (own, nodes) in enumerate(levels):
        if own:
            steps += [loop_step(model, node) if node.op_type in LOOPS else _host_step(node)
                      for node in nodes]
        else:
            later = (node for _, group in levels[number + 1 :] for node in group)
            steps.append(_program_step(model, nodes, {*outputs, *_used(later)}))
    read = {name for step in steps for name in step.inputs} | set(outputs)
    return Plan(tuple(steps), {k: v for k, v in constants.items() if k in read}, outputs)


def _take_in(model: ModelProto, path: Path) -> None:
    """Constants become initializers, as which every step can have them; so does external data."""
    graph = model.graph
    for tensor in graph.initializer:
        if is_external(tensor):
            stored = stored_tensor(tensor.name, tensor, path).read()
            tensor.CopyFrom(numpy_helper.from_array(stored, tensor.name))
    kept: list[NodeProto] = []
    for node in graph.node:
        array = None if _text_constant(node) else _constant(node)
        if array is None:
            kept.append(node)
        else:
            graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def _constant(node: NodeProto) -> np.ndarray[Any, Any] | None:
    """The value of a Constant node that is small and plain."""
    if node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    [attribute] = node.attribute
    value = get_attribute_value(attribute)
    if attribute.name == "value" and not is_external(value):
        return numpy_helper.to_array(value)
    dtype = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32,
             "value_floats": np.float32}.get(attribute.name)
    return None if dtype is None else np.asarray(value, dtype)


def _used(nodes: Iterable[NodeProto]) -> set[str]:
    """All names that nodes, and graphs inside them, read."""
    return {name for node in nodes
            for name in (*node.input, *(n for a in node.attribute for n in captured_names(a.g)))}


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
    if node.op_type in TEXT_OPERATORS:
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
        number = max((level.get(name, 0) for name in _used([node])), default=0)
        number += (number % 2 == 0) != own  # even levels are the host's
        level.update(dict.fromkeys(node.output, number))
        groups.setdefault(number, []).append(node)
    return [(number % 2 == 0, groups[number]) for number in sorted(groups)]


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


def _program_step(model: ModelProto, nodes: Sequence[NodeProto], wanted: set[str]) -> ProgramStep:
    """The nodes as a model of their own; it puts out what is wanted of all that they make."""
    graph = model.graph
    made = [name for node in nodes for name in node.output if name]
    used = _used(nodes) - {""}
    weights = [tensor for tensor in graph.initializer
               if tensor.name in used and tensor.data_type != TensorProto.STRING]
    inside = {tensor.name for tensor in weights} | set(made)
    known = {value.name: value for value in graph.input}
    names = _outside(used - inside, graph)
    part = helper.make_graph(
        nodes, "part",
        [known.get(name) or helper.make_empty_tensor_value_info(name) for name in names],
        [helper.make_empty_tensor_value_info(name) for name in made if name in wanted], weights)
    whole = helper.make_model(part, opset_imports=model.opset_import, functions=model.functions)
    whole.ir_version = model.ir_version
    return ProgramStep(whole.SerializeToString(), tuple(names),
                       tuple(name for name in made if name in wanted))


def _outside(names: set[str], graph: GraphProto) -> list[str]:
    """Those of the names that the graph's inputs or nodes give, in order."""
    given = [value.name for value in graph.input]
    given += [name for node in graph.node for name in node.output if name]
    return [name for name in given if name in names]


def declared_part(
    model: bytes,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    varying: Mapping[str, Collection[int]],
) -> bytes:
    """A program step's model with the types of its inputs as the arrays have them; axes that vary
    become symbols."""
    part = ModelProto.FromString(model)
    for number, value in enumerate(part.graph.input):
        if not value.type.HasField("tensor_type"):
            array = arrays[value.name]
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            free = varying.get(value.name, ())
            shape = [f"i{number}.{axis}" if axis in free else size
                     for axis, size in enumerate(array.shape)]
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))
    return part.SerializeToString()
