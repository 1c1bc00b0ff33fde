"""What an ONNX model declares of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto, TypeProto, ValueInfoProto

from llmc.frontend.onnx.protobuf import parse_model, read_model

NO_VERSION = 2**63 - 1  # as onnxruntime has it
OVERRIDING_VERSION = 4  # of the IR: before it, initializers had to be inputs too
Declared = tuple[str, str, list[int | str | None]]


def declared_interface(source: Path | bytes) -> tuple[list[Declared], list[Declared]]:
    """(name, type such as "tensor(float)", shape) of the inputs without initialisers, and of the
    outputs. An axis is an int, its name or None."""
    model = _parsed(source)
    initialized = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initialized]
    return [_declared(value) for value in inputs], [_declared(v) for v in model.graph.output]


def declared_overridable(source: Path | bytes) -> list[Declared]:
    """As `declared_interface`, of the inputs that have an initializer for when they are not fed."""
    return [_declared(value) for value in overridable_inputs(_parsed(source))]


def overridable_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs that an initializer stands for unless they are fed."""
    if model.ir_version < OVERRIDING_VERSION:
        return []
    initialized = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name in initialized]


def drop_initializers(model: ModelProto, fed: Collection[str]) -> None:
    """Make inputs of those overridable initializers, in place."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in fed]
    if len(kept) < len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)


def declared_metadata(source: Path | bytes) -> dict[str, Any]:
    """What a model says of itself, by onnxruntime's names for it. version: NO_VERSION if it has
    none."""
    model = _parsed(source)
    return {
        "producer_name": model.producer_name,
        "graph_name": model.graph.name,
        "domain": model.domain,
        "description": model.doc_string,
        "graph_description": model.graph.doc_string,
        "version": model.model_version if model.HasField("model_version") else NO_VERSION,
        "custom_metadata_map": {entry.key: entry.value for entry in model.metadata_props},
    }


def _parsed(source: Path | bytes) -> ModelProto:
    if isinstance(source, bytes):
        return parse_model(source, Path("model.onnx"))
    return read_model(source)


def _declared(value: Any) -> Declared:
    extents = value.type.tensor_type.shape.dim
    return value.name, type_text(value.type), [_extent(dim) for dim in extents]


def _extent(dim: Any) -> int | str | None:
    return int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or None


def type_text(kind: TypeProto) -> str:
    """A type as ONNX writes it: tensor(float), seq(tensor(int64)), optional(...)."""
    which = kind.WhichOneof("value")
    if which == "sequence_type":
        return f"seq({type_text(kind.sequence_type.elem_type)})"
    if which == "optional_type":
        return f"optional({type_text(kind.optional_type.elem_type)})"
    return f"tensor({TensorProto.DataType.Name(kind.tensor_type.elem_type).lower()})"
