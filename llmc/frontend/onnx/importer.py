"""An ONNX file to an ImportedModel: the nodes in order, each through its converter."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import get_attribute_value

from llmc.errors import GraphError, ModelError, ShapeError, ValueNeeded
from llmc.frontend.model import ImportedModel, StoredTensor
from llmc.frontend.onnx import (  # noqa: F401 - importing a group registers its converters
    attention,
    bits,
    casts,
    contrib,
    contrib_attention,
    contrib_experts,
    contrib_quantized,
    control,
    convolution,
    determinant,
    elementwise,
    images,
    linear_attention,
    losses,
    machine_learning,
    matmul,
    movement,
    normalization,
    pooling,
    quantization,
    random,
    rearrange,
    recurrent,
    reduction,
    resize,
    sampling,
    selection,
    sequences,
    shape,
    shape_array,
    signal,
    training,
    trigonometry,
)
from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.check import (
    check_model,
    module_path,
    node_name,
    opset_versions,
    unsupported_operators,
)
from llmc.frontend.onnx.interface import drop_initializers
from llmc.frontend.onnx.protobuf import (
    element_dtype,
    external_files,
    is_external,
    parse_model,
    read_model,
    stored_tensor,
)
from llmc.frontend.onnx.registry import AI_ONNX, CONVERTERS, Value
from llmc.frontend.onnx.sequences import is_tensor, outputs_of, sequence_input
from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.frontend.onnx.signature import (
    companion_files,
    mask_equation,
    model_info,
    token_interface,
    token_names,
)
from llmc.frontend.onnx.symbols import MAX_SOLUTIONS, SymbolSolved, SymbolTable
from llmc.ir.dims import Dim
from llmc.ir.graph import Graph, Node, Origin, TensorType

HEADER_BYTES = 1 << 20
MAX_DEPTH = 64


Values = Mapping[str, "np.ndarray[Any, Any]"]


def import_onnx(path: str | Path, values: Values | None = None, fed: Collection[str] = ()
                ) -> ImportedModel:
    """Import an .onnx file; its weights stay where they are and become parameters by name.

    Inputs and outputs keep their names and axes; symbolic axes are unified where operators
    demand it. ModelError names the file and the node or tensor, in one line; ValueNeeded asks for
    the value of a tensor that decides shapes: `values` has those by key. `fed`: overridable
    initializers that are inputs.
    """
    path = Path(path)
    model = read_model(path)
    drop_initializers(model, fed)

    def fingerprint() -> str:
        return _fingerprint(path, external_files(model, path))

    return _import(model, path, fingerprint, values or {})


def import_onnx_bytes(
    content: bytes, path: str | Path = "model.onnx", values: Values | None = None,
    fed: Collection[str] = (),
) -> ImportedModel:
    """As `import_onnx` for a file's content; `path` names it in errors, and is where its external
    data would be."""
    path = Path(path)
    model = parse_model(content, path)
    drop_initializers(model, fed)
    return _import(model, path, lambda: hashlib.sha256(content).hexdigest(), values or {})


def _import(
    model: ModelProto, path: Path, fingerprint: Callable[[], str], values: Values
) -> ImportedModel:
    """Axes may be empty where that leaves nothing open; else only those of caches may."""
    check_model(model, path)
    stored: dict[str, StoredTensor] = {}
    try:
        graph = _converted(model, path, stored, values, may_be_empty=True)
    except ModelError as error:
        try:
            graph = _converted(model, path, stored, values, may_be_empty=False)
        except ValueNeeded as needed:
            raise (error if isinstance(error, ValueNeeded) else needed) from None
    return _imported(model, path, graph, stored, fingerprint())


def _converted(
    model: ModelProto,
    path: Path,
    stored: dict[str, StoredTensor],
    values: Values,
    may_be_empty: bool,
) -> Graph:
    """The graph with its symbols unified: every solution starts the conversion over."""
    solutions: dict[str, Dim] = {}
    for _ in range(MAX_SOLUTIONS):
        symbols = SymbolTable(solutions, may_be_empty)
        conversion = Conversion(model, path, symbols, stored, values)
        try:
            return conversion.run()
        except SymbolSolved as solved:
            solutions[solved.name] = solved.value
        except ValueNeeded as needed:
            graph = Graph("value", conversion.inputs, (("value", needed.node),))
            needed.model = _imported(model, path, graph, stored, "")
            raise
    raise ModelError(f"{path}: its symbolic axes cannot be unified: {solutions}")


def _imported(
    model: ModelProto,
    path: Path,
    graph: Graph,
    stored: Mapping[str, StoredTensor],
    fingerprint: str,
) -> ImportedModel:
    parameters = {node["name"]: stored[node["name"]] for node in graph.parameters()}
    return ImportedModel(
        graph=graph,
        parameters=parameters,
        kind="onnx",
        config=model_info(model, path, graph),
        path=path,
        fingerprint=fingerprint,
        companion_files=companion_files(path),
        token_interface=token_interface(graph, token_names(path.parent)),
    )


def _fingerprint(path: Path, others: Sequence[Path]) -> str:
    """Of names, sizes and times of all files, and the first MiB of the model."""
    digest = hashlib.sha256()
    for file in (path, *others):
        status = os.stat(file)
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    with path.open("rb") as opened:
        digest.update(opened.read(HEADER_BYTES))
    return digest.hexdigest()


@dataclass
class Scope:
    """Names of one graph, function body or branch; names not found are looked up in `parent`.

    `prefix` tells nodes and parameters of function bodies apart; `attributes` are the arguments
    of a function's call.
    """

    opsets: Mapping[str, int]
    parent: Scope | None = None
    prefix: str = ""
    attributes: Mapping[str, AttributeProto] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    depth: int = 0

    def find(self, name: str) -> Value | None:
        owner = self.owner(name)
        return None if owner is None else owner.values[name]

    def owner(self, name: str) -> Scope | None:
        """The scope that a name is found in."""
        scope: Scope | None = self
        while scope is not None and name not in scope.values:
            scope = scope.parent
        return scope


class Conversion:
    """One attempt to convert the graph; `SymbolSolved` ends it when two dims turn out equal.

    `stored` collects the tensors by name and is shared by all attempts; `values` has what is known
    of tensors that depend on data, by scope and name.
    """

    def __init__(
        self,
        model: ModelProto,
        path: Path,
        symbols: SymbolTable,
        stored: dict[str, StoredTensor],
        values: Values,
    ) -> None:
        self.model, self.path, self.symbols, self.stored = model, path, symbols, stored
        self.values = values
        self.inputs: tuple[Node, ...] = ()
        self.functions: dict[tuple[str, str], FunctionProto] = {
            (function.domain, function.name): function for function in model.functions
        }

    def run(self) -> Graph:
        graph = self.model.graph
        scope = Scope(opset_versions(self.model.opset_import))
        self._graph_inputs(graph, scope)
        self._initializers(graph.initializer, scope)
        self._nodes(graph.node, scope)
        outputs = tuple(each for output in graph.output for each in self._output(output, scope))
        name = re.sub(r"\W", "_", graph.name or self.path.stem)
        result = Graph(name if name[:1].isalpha() else f"graph_{name}", self.inputs, outputs)
        equation = mask_equation(result, token_names(self.path.parent))
        if equation is not None:
            raise SymbolSolved(*equation)
        return result

    # ---- inputs, initializers, outputs ------------------------------------------------------

    def _graph_inputs(self, graph: GraphProto, scope: Scope) -> None:
        initialized = {tensor.name for tensor in graph.initializer}
        declared = [value for value in graph.input if value.name not in initialized]
        self._declare_symbols(declared)
        for value in declared:
            if is_tensor(value.type):
                node = self._input(value)
                self.inputs += (node,)
                self._bind(scope, value.name, node)
            else:
                location = f"{self.path}: input '{value.name}'"
                nodes, items = sequence_input(value.name, value.type, self.values, location)
                self.inputs += tuple(nodes)
                scope.values[value.name] = items

    def _declare_symbols(self, declared: Iterable[Any]) -> None:
        """Tells the table which named axes only caches have."""
        cache_only: dict[str, bool] = {}
        for value in declared:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param.isidentifier():
                    cached = axis > 0 and _is_cache(value.name)
                    cache_only[dim.dim_param] = cache_only.get(dim.dim_param, True) and cached
        for name, cached in cache_only.items():
            self.symbols.declare(name, cached)

    def _input(self, value: Any) -> Node:
        location = f"{self.path}: input '{value.name}'"
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            raise ModelError(f"{location}: it must be a tensor of known rank")
        dtype = element_dtype(tensor.elem_type, location)
        cached = _is_cache(value.name)
        shape = [
            self._input_dim(dim, f"{value.name}.{axis}", cached and axis > 0, location)
            for axis, dim in enumerate(tensor.shape.dim)
        ]
        builder = Builder(self.symbols, location, Origin(file=str(self.path), node=value.name))
        return builder.make("input", name=value.name, type=TensorType(dtype, tuple(shape)))

    def _input_dim(self, dim: Any, name: str, cached: bool, location: str) -> Dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            return int(dim.dim_value)
        if dim.HasField("dim_value") and dim.dim_value < -1:
            raise ModelError(f"{location}: dim {dim.dim_value}")
        text = dim.dim_param
        known = self.symbols.parse(text) if text else None
        return (
            known
            if known is not None
            else self.symbols.resolve(self.symbols.declare(text or name, cached))
        )

    def _initializers(self, tensors: Iterable[TensorProto], scope: Scope) -> None:
        for tensor in tensors:
            scope.values[tensor.name] = self._weight(tensor.name, tensor, scope)

    def _weight(self, name: str, tensor: TensorProto, scope: Scope) -> Value:
        """A small integer or single value is a constant, everything else a parameter."""
        full_name = scope.prefix + name
        stored = self._stored(full_name, tensor)
        builder = Builder(self.symbols, f"{self.path}: tensor '{name}'")
        items = 1
        for extent in stored.shape:
            items *= extent
        if items == 1 or (shape_array.is_shape_dtype(stored.dtype) and items <= shape_array.LIMIT):
            return shape.constant_value(builder, stored.read(), stored.dtype)
        if len(stored.shape) == 1 and stored.dtype.is_integer and stored.dtype.bits <= 8:
            values = stored.read()
            if not values.any():  # zero points of symmetric codes, one per channel
                return builder.full(0, stored.shape, stored.dtype)
        origin = Origin(file=str(self.path), node=full_name)
        builder = Builder(self.symbols, builder.location, origin)
        kind = TensorType(stored.dtype, stored.shape)
        return builder.make("parameter", name=full_name, type=kind)

    def _stored(self, name: str, tensor: TensorProto) -> StoredTensor:
        if name not in self.stored:
            self.stored[name] = stored_tensor(name, tensor, self.path)
        return self.stored[name]

    def _output(self, declared: Any, scope: Scope) -> list[tuple[str, Node]]:
        """The graph's outputs for one of the model: a sequence has several."""
        name = declared.name
        value = scope.find(name)
        location = f"{self.path}: output '{name}'"
        if value is None:
            raise ModelError(f"{location}: no node produces it")
        outputs = outputs_of(Builder(self.symbols, location), name, value)
        if outputs[0][0] == name:
            self._unify_declared_shape(outputs[0][1], declared)
        return outputs

    def _unify_declared_shape(self, node: Node, declared: Any) -> None:
        """Names that outputs share with inputs are equations; unknown names mean nothing."""
        extents = declared.type.tensor_type.shape.dim
        if len(extents) != node.rank:
            return
        for dim, actual in zip(extents, node.shape, strict=True):
            wanted = self.symbols.parse(dim.dim_param) if dim.dim_param else dim.dim_value or None
            if wanted is not None:
                self.symbols.require_equal(actual, wanted)

    # ---- nodes ------------------------------------------------------------------------------

    def _nodes(self, nodes: Iterable[NodeProto], scope: Scope) -> None:
        for node in nodes:
            try:
                results = self._node(node, scope)
            except ModelError:
                raise
            except (ShapeError, GraphError, ValueError, IndexError, TypeError, OverflowError) as e:
                raise ModelError(f"{self._location(node, scope)}: {e}") from e
            for name, result in zip(node.output, results, strict=False):
                if name and result is not None:
                    self._bind(scope, name, self._limited(result))

    def _bind(self, scope: Scope, name: str, value: Value) -> None:
        """Gives a value its name; what is known of its data takes its place."""
        known = self.values.get(scope.prefix + name)
        if known is None:
            scope.values[name] = value
            return
        location = f"{self.path}: tensor '{scope.prefix}{name}'"
        if known.dtype != value.dtype.numpy or known.ndim != len(value.shape):
            raise ShapeError(f"{location}: its value is {known.dtype}{list(known.shape)}")
        scope.values[name] = shape.constant_value(Builder(self.symbols, location), known)

    def _limited(self, value: Value) -> Value:
        """Shape arithmetic that grows beyond shapes goes on as a tensor."""
        if not isinstance(value, ShapeArray) or value.items.size <= shape_array.LIMIT:
            return value
        return Builder(self.symbols, str(self.path)).tensor(value)

    def _location(self, node: NodeProto, scope: Scope) -> str:
        return f"{self.path}: node '{scope.prefix}{node_name(node)}' ({node.op_type})"

    def _node(self, node: NodeProto, scope: Scope) -> Sequence[Value | None]:
        domain = AI_ONNX if node.domain == "ai.onnx" else node.domain
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            return self._inline(function, node, scope)
        if domain == AI_ONNX and node.op_type == "If":
            return self._if(node, scope)
        weight = self._constant_weight(node, scope)
        if weight is not None:
            return [weight]
        entry = CONVERTERS[domain, node.op_type]
        call = self._call(node, scope, domain)
        if len(call.inputs) < entry.low or len(call.inputs) > (entry.high or len(call.inputs)):
            wanted = (
                entry.low if entry.low == entry.high else f"{entry.low} to {entry.high or 'any'}"
            )
            raise call.error(f"it has {len(call.inputs)} inputs, not {wanted}")
        result = entry.function(call)
        return result if isinstance(result, (tuple, list)) else [result]  # type: ignore[list-item]

    def _call(self, node: NodeProto, scope: Scope, domain: str) -> Call:
        location = self._location(node, scope)
        inputs = [self._find(name, scope, location) if name else None for name in node.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        name = scope.prefix + node_name(node)
        origin = Origin(file=str(self.path), node=name, module=module_path(node))
        attributes = self._attributes(node, scope)
        version = scope.opsets.get(domain, 1)
        call = Call(self.symbols, location, origin, node, version, inputs, attributes)
        call.inline = partial(self._subgraph, call, scope)
        call.declared_shape = partial(self._declared_shape, node)
        call.keys = [f"{(scope.owner(each) or scope).prefix}{each}" for each in node.input]
        call.values = self.values
        call.stored = self.stored
        return call

    def _declared_shape(self, node: NodeProto, index: int) -> list[Dim | None] | None:
        """The shape that the graph declares for an output that it puts out; None where unknown."""
        name = node.output[index] if index < len(node.output) else ""
        declared = next((value for value in self.model.graph.output if value.name == name), None)
        if declared is None or not declared.type.tensor_type.HasField("shape"):
            return None
        return [
            dim.dim_value if dim.HasField("dim_value") else self.symbols.parse(dim.dim_param)
            for dim in declared.type.tensor_type.shape.dim
        ]

    def _find(self, name: str, scope: Scope, location: str) -> Value:
        value = scope.find(name)
        if value is None:
            raise ModelError(
                f"{location}: nothing before it produces its input '{name}'"
                " (a name that is missing, a cycle, or nodes out of order)"
            )
        return value

    def _attributes(self, node: NodeProto, scope: Scope) -> dict[str, Any]:
        """Attributes as Python values; references to a function's arguments are looked up."""
        found: dict[str, Any] = {}
        for attribute in node.attribute:
            name = attribute.name
            if attribute.ref_attr_name:
                if attribute.ref_attr_name not in scope.attributes:
                    continue
                attribute = scope.attributes[attribute.ref_attr_name]
            value = get_attribute_value(attribute)
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            found[name] = value
        return found

    def _constant_weight(self, node: NodeProto, scope: Scope) -> Value | None:
        """The parameter for a Constant node that is too large to be a constant, else None."""
        if node.op_type != "Constant" or len(node.attribute) != 1 or not node.output:
            return None
        attribute = node.attribute[0]
        tensor = attribute.t if attribute.name == "value" else None
        if tensor is None or attribute.ref_attr_name:
            return None
        items = 1
        for extent in tensor.dims:
            items *= extent
        if items <= shape_array.LIMIT and not is_external(tensor):
            return None
        return self._weight(node.output[0], tensor, scope)

    # ---- functions and branches -------------------------------------------------------------

    def _inline(
        self, function: FunctionProto, node: NodeProto, scope: Scope
    ) -> Sequence[Value | None]:
        """The body of a model-local function with this node's inputs and attributes."""
        location = self._location(node, scope)
        if scope.depth >= MAX_DEPTH:
            raise ModelError(f"{location}: functions are nested too deeply or call themselves")
        arguments = {attribute.name: attribute for attribute in function.attribute_proto}
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                if attribute.ref_attr_name in scope.attributes:
                    arguments[attribute.name] = scope.attributes[attribute.ref_attr_name]
            else:
                arguments[attribute.name] = attribute
        prefix = f"{scope.prefix}{node_name(node)}/"
        opsets = opset_versions(function.opset_import)
        inner = Scope(opsets, None, prefix, arguments, depth=scope.depth + 1)
        for name, given in zip(function.input, node.input, strict=False):
            if given:
                self._bind(inner, name, self._find(given, scope, location))
        self._nodes(function.node, inner)
        return [inner.find(name) for name in function.output]

    def _if(self, node: NodeProto, scope: Scope) -> Sequence[Value | None]:
        """The branch that its condition selects, in place."""
        call = self._call(node, scope, AI_ONNX)
        known = call.known(0, "its condition")
        branch = call.required("then_branch" if known.all() else "else_branch")
        return call.inline(branch, [])

    def _subgraph(
        self,
        call: Call,
        scope: Scope,
        graph: Any,
        arguments: Sequence[Value],
        turn: int | None = None,
    ) -> list[Value]:
        """The outputs of a graph that is an attribute of the node, given its inputs; `turn` tells
        the graphs of a loop apart."""
        if not isinstance(graph, GraphProto) or len(graph.input) != len(arguments):
            raise call.error(f"its body is no graph with {len(arguments)} inputs")
        missing = unsupported_operators(graph.node, self.functions)
        if missing:
            raise call.error(f"unsupported operators: {', '.join(missing)}")
        prefix = f"{scope.prefix}{node_name(call.node)}/"
        prefix = prefix if turn is None else f"{prefix}{turn}/"
        inner = Scope(scope.opsets, scope, prefix, scope.attributes, depth=scope.depth + 1)
        for declared, argument in zip(graph.input, arguments, strict=True):
            self._bind(inner, declared.name, argument)
        self._initializers(graph.initializer, inner)
        self._nodes(graph.node, inner)
        return [self._find(output.name, inner, call.location) for output in graph.output]


def _is_cache(name: str) -> bool:
    """Whether an input holds what earlier steps left, and may be empty."""
    return "past" in name or "cache" in name
