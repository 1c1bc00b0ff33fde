"""Checks before conversion: what can be refused without looking at shapes."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto

from llmc.errors import ModelError
from llmc.frontend.onnx.registry import AI_ONNX, CONVERTERS

OLDEST_OPSET = 1
NEWEST_OPSET = 28
MAX_SHOWN = 20
CONTROL_FLOW = ("If",)
# What only the host computes, between programs (`plan.py`).
TEXT_OPERATORS = frozenset({"RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit",
                            "TfIdfVectorizer"})


def node_name(node: NodeProto) -> str:
    """The node's name, or its first output's where it has none."""
    return str(node.name or next(iter(node.output), node.op_type))


def module_path(node: NodeProto) -> str | None:
    """The torch module that an exporter noted for the node (`model.layers.0.self_attn`)."""
    namespace = next((p.value for p in node.metadata_props if p.key == "namespace"), "")
    scopes = [part.partition(":")[0].strip() for part in namespace.split("/")]
    return scopes[-2] or None if len(scopes) > 2 else None


def opset_versions(imports: Iterable[Any]) -> dict[str, int]:
    """Domain -> version; the domain 'ai.onnx' is the empty one."""
    return {AI_ONNX if o.domain == "ai.onnx" else o.domain: int(o.version) for o in imports}


def check_model(model: ModelProto, path: Path) -> None:
    """ModelError for opsets, operators, names that no conversion could get right."""
    _check_opsets(model, path)
    functions: dict[tuple[str, str], Any] = {(f.domain, f.name): f for f in model.functions}
    missing = unsupported_operators(model.graph.node, functions)
    for function in functions.values():
        missing += unsupported_operators(function.node, functions)
    if missing:
        shown = "; ".join(missing[:MAX_SHOWN])
        more = f" and {len(missing) - MAX_SHOWN} more" if len(missing) > MAX_SHOWN else ""
        text = " (for text, give the model to an InferenceSession or `llmc run`)" if all(
            label.split(" ")[0] in TEXT_OPERATORS for label in missing) else ""
        raise ModelError(f"{path}: unsupported operators: {shown}{more}{text}")
    _check_names(model.graph, path)
    if model.graph.sparse_initializer:
        raise ModelError(f"{path}: sparse initializers are not supported")


def _check_opsets(model: ModelProto, path: Path) -> None:
    version = opset_versions(model.opset_import).get(AI_ONNX)
    if version is None:
        if any(node.domain in ("", "ai.onnx") for node in model.graph.node):
            raise ModelError(f"{path}: it imports no ai.onnx opset")
    elif not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise ModelError(
            f"{path}: opset {version} is not supported; export it with opset"
            f" {OLDEST_OPSET} to {NEWEST_OPSET}"
        )


def unsupported_operators(
    nodes: Iterable[NodeProto], functions: Container[tuple[str, str]]
) -> list[str]:
    """`domain.Op (node names)` for every operator without converter, in order of appearance."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        domain = AI_ONNX if node.domain == "ai.onnx" else node.domain
        known = (domain, node.op_type) in CONVERTERS or (node.domain, node.op_type) in functions
        if known or (domain == AI_ONNX and node.op_type in CONTROL_FLOW):
            continue
        label = f"{domain}.{node.op_type}" if domain else node.op_type
        found.setdefault(label, []).append(node_name(node))
    return [f"{label} ({_shortened(names)})" for label, names in found.items()]


def _shortened(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _check_names(graph: GraphProto, path: Path) -> None:
    """Every name is given once; every output is one of them."""
    _refuse_repeats((v.name for v in graph.input), f"{path}: input")
    _refuse_repeats((v.name for v in graph.output), f"{path}: output")
    produced: dict[str, str] = {value.name: "an input" for value in graph.input}
    for tensor in graph.initializer:
        if produced.get(tensor.name, "an input") != "an input":
            raise ModelError(f"{path}: tensor '{tensor.name}' is defined twice")
        produced[tensor.name] = "an initializer"
    for node in graph.node:
        for name in filter(None, node.output):
            if name in produced:
                where = f"{path}: node '{node_name(node)}' ({node.op_type})"
                raise ModelError(f"{where}: its output '{name}' is already {produced[name]}")
            produced[name] = f"an output of node '{node_name(node)}'"
    for value in graph.output:
        if value.name not in produced:
            raise ModelError(f"{path}: output '{value.name}': no node produces it")


def _refuse_repeats(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise ModelError(f"{what} '{name}' has no name or one that is taken")
        seen.add(name)
