"""A graph and arrays in memory as a model: what `llmc.trace` made, ready to be compiled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmc.errors import ShapeError
from llmc.frontend.model import ImportedModel, ModelInfo, StoredTensor
from llmc.ir import dtypes
from llmc.ir.graph import Graph, Node
from llmc.ir.text import format_graph

_NOWHERE = Path("memory")


def traced_model(graph: Graph, parameters: Mapping[str, np.ndarray]) -> ImportedModel:
    """The model of a graph whose parameters have these values, by name.

    ShapeError if a parameter is missing, unknown, or of another shape or dtype than in the graph.
    """
    leaves = {leaf["name"]: leaf for leaf in graph.parameters()}
    if missing := leaves.keys() - parameters.keys():
        raise ShapeError(f"{graph.name} needs values of {', '.join(sorted(missing))}: pass "
                         "parameters={name: array}")
    if unknown := parameters.keys() - leaves.keys():
        raise ShapeError(f"{graph.name} has no parameter {', '.join(sorted(unknown))}; it has "
                         f"{', '.join(sorted(leaves)) or 'none'}")
    stored = {name: StoredTensor.from_array(name, _checked(leaf, parameters[name]), _NOWHERE)
              for name, leaf in leaves.items()}
    info = ModelInfo(architecture=graph.name, compute_dtype=dtypes.f32)
    return ImportedModel(graph, stored, "graph", info, _NOWHERE, traced_key(graph, parameters))


def traced_key(graph: Graph, parameters: Mapping[str, np.ndarray]) -> str:
    """Identity of a graph and its parameters' values: 32 hex digits."""
    digest = hashlib.blake2b(format_graph(graph).encode(), digest_size=16)
    for name, array in sorted(parameters.items()):
        digest.update(f"{name} {np.asarray(array).dtype} {np.shape(array)}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _checked(leaf: Node, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value, order="C")
    if array.shape != leaf.shape or array.dtype != leaf.dtype.numpy:
        raise ShapeError(f"parameter {leaf['name']} must be {leaf.type}, got {array.dtype}"
                         f"{list(array.shape)}")
    return array
