"""Inputs and outputs of chosen blocks of a model, saved: what a block's developer tests against.

    DIR/capture.json             the model, its inputs, and the blocks in the order they run
    DIR/inputs.safetensors       the inputs of the whole model, by name
    DIR/BLOCK/block.json         config, and what each tensor is
    DIR/BLOCK/inputs.safetensors, outputs.safetensors
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llmc.errors import LlmcError, ModelError
from llmc.examine.taps import (
    LEAVES,
    STATE_OPS,
    TappedModel,
    depends_on_inputs,
    describe,
    module_of,
    tap_points,
)
from llmc.frontend.json_file import read_json_object
from llmc.frontend.model import ImportedModel
from llmc.frontend.safetensors import open_safetensors
from llmc.ir.dtypes import DType, from_numpy
from llmc.ir.graph import Graph, Node, TensorType
from llmc.runtime.progress import Progress, silent

INDEX, BLOCK = "capture.json", "block.json"
MOST_NAMED = 24  # paths in a message
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
INPUTS, OUTPUTS = "inputs.safetensors", "outputs.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class Block:
    """A module of a model: what flows in, what flows out, and the parameters that it reads."""

    path: str
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    parameters: tuple[str, ...]
    states: tuple[str, ...]


def find_blocks(graph: Graph, pattern: str) -> list[Block]:
    """The modules whose paths match the pattern, in the order in which they run.

    A star stands for any characters but dots: `model.layers.*.mlp`. LlmcError lists what there is
    if nothing matches.
    """
    paths = list(dict.fromkeys(path for node in graph.nodes() for path in _paths(node)))
    chosen = [path for path in paths if _matches(path, pattern)]
    if not chosen:
        known = sorted({_NUMBER.sub("*", path) for path in paths}, key=lambda p: (p.count("."), p))
        some = ", ".join(known[:MOST_NAMED]) + (" ..." if len(known) > MOST_NAMED else "")
        raise LlmcError(f"no block matches {pattern!r}; there are {some or 'none with a name'}")
    return [block for path in chosen if (block := _block(graph, path)) is not None]


def _paths(node: Node) -> Iterator[str]:
    """The node's module and all modules around it."""
    parts = (module_of(node) or "").split(".")
    for end in range(1, len(parts) + 1):
        if path := ".".join(parts[:end]):
            yield path


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _block(graph: Graph, path: str) -> Block | None:
    varying = depends_on_inputs(graph)
    order = graph.nodes()
    inside = {node for node in order if node in varying and node.op not in LEAVES
              and path in _paths(node)}
    users = graph.users()
    results = {node for _, node in graph.outputs}
    flowing_in = [operand for node in order if node in inside for operand in node.inputs
                  if operand not in inside and operand in varying and _is_plain(operand)]
    outputs = [node for node in order if node in inside and _is_plain(node)
               and (node in results or any(user not in inside for user in users.get(node, ())))]
    if not outputs:
        return None
    leaves = [operand for node in order if path in _paths(node) for operand in node.inputs]
    return Block(path, tuple(dict.fromkeys(flowing_in)), tuple(outputs),
                 _names(leaves, "parameter"), _names(leaves, "state"))


def _is_plain(node: Node) -> bool:
    """Whether a node is a tensor that is worth saving: no state, no tuple."""
    return isinstance(node.type, TensorType) and node.op not in ("state", *STATE_OPS)


def _names(nodes: Sequence[Node], op: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node["name"] for node in nodes if node.op == op))


# ---- saving ------------------------------------------------------------------------------------


def capture(tapped: TappedModel, pattern: str, directory: Path,
            progress: Progress = silent) -> list[str]:
    """Run the model and save the matching blocks' inputs and outputs; the blocks' paths.

    One block at a time is in memory.
    """
    blocks = find_blocks(tapped.graph, pattern)
    numbers = {node: number for number, node in enumerate(tap_points(tapped.graph))}
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / INPUTS, tapped.inputs)
    for done, block in enumerate(blocks):
        progress("capture", done / len(blocks))
        _save_block(tapped, block, numbers, directory / _folder(block.path))
    _write_json(directory / INDEX, {
        "format": _FORMAT, "model": str(tapped.model.path.resolve()),
        "graph": tapped.graph.name, "fingerprint": tapped.model.fingerprint,
        "target": tapped.target.text(),
        "config": model_config(tapped.model), "blocks": [each.path for each in blocks]})
    progress("capture", 1.0)
    return [block.path for block in blocks]


def _save_block(tapped: TappedModel, block: Block, numbers: Mapping[Node, int],
                directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    given = [node for node in block.inputs if node.op == "input"]
    made = [node for node in (*block.inputs, *block.outputs) if node.op != "input"]
    values = dict(zip(made, tapped.read(made), strict=True))
    values |= {node: tapped.inputs[node["name"]] for node in given}
    for file, kind, nodes in ((INPUTS, "input", block.inputs), (OUTPUTS, "output", block.outputs)):
        save_tensors(directory / file, {f"{kind}.{number}": values[node]
                                        for number, node in enumerate(nodes)})
    _write_json(directory / BLOCK, {
        "block": block.path, "config": model_config(tapped.model),
        "inputs": [_description(node, values[node], numbers) for node in block.inputs],
        "outputs": [_description(node, values[node], numbers) for node in block.outputs],
        "parameters": block.parameters, "states": block.states})


def _description(node: Node, value: np.ndarray, numbers: Mapping[Node, int]) -> dict[str, Any]:
    """What a saved tensor is; `point` is its place in the order of computation."""
    return {"what": node["name"] if node.op == "input" else describe(node), "type": str(node.type),
            "shape": list(value.shape), "dtype": node.dtype.name, "point": numbers.get(node)}


def _folder(block: str) -> str:
    """A block's directory: models name their modules, and may name them `..`."""
    return re.sub(r"[^\w.-]", "_", block).lstrip(".") or "_"


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file; it appears whole or not at all."""
    unstorable = [name for name, array in arrays.items() if array.dtype.itemsize * 8
                  != from_numpy(array.dtype).bits and array.dtype != np.bool_]
    if unstorable:
        raise LlmcError(f"{path}: safetensors files have no dtype "
                        f"{arrays[unstorable[0]].dtype} ({unstorable[0]})")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()},
                  temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def model_config(model: ImportedModel) -> dict[str, Any]:
    """The checkpoint's config.json; of other models what llmc knows about them."""
    path = next((file for file in model.companion_files if file.name == "config.json"), None)
    if path is not None:
        return read_json_object(path)
    facts = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
    return {name: value.name if isinstance(value, DType) else value
            for name, value in facts.items() if not is_dataclass(value) or isinstance(value, DType)}


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captured:
    """A directory that `capture` wrote: values by their points."""

    directory: Path

    @property
    def _index(self) -> dict[str, Any]:
        return read_json_object(self.directory / INDEX)

    def inputs(self) -> dict[str, np.ndarray]:
        """The inputs of the whole model, by name."""
        return load_tensors(self.directory / INPUTS)

    def check(self, model: ImportedModel) -> None:
        """ModelError unless the captured blocks are those of this model."""
        wanted = self._index.get("graph")
        if wanted != model.graph.name:
            raise ModelError(f"{self.directory} was captured of a {wanted}, {model.path} is a "
                             f"{model.graph.name}")

    def points(self) -> dict[int, np.ndarray]:
        """Every captured value, by its place in the order of computation."""
        found: dict[int, np.ndarray] = {}
        for block in self._index.get("blocks", ()):
            directory = self.directory / _folder(str(block))
            facts = read_json_object(directory / BLOCK)
            for kind, file in (("inputs", INPUTS), ("outputs", OUTPUTS)):
                arrays = load_tensors(directory / file)
                for number, fact in enumerate(facts.get(kind, ())):
                    name = f"{kind[:-1]}.{number}"
                    if name not in arrays:
                        raise ModelError(f"{directory / file}: tensor '{name}' is missing")
                    if isinstance(fact.get("point"), int):
                        found[fact["point"]] = arrays[name]
        return found


def is_capture(path: Path) -> bool:
    return (path / INDEX).is_file()


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file; ModelError if it is damaged."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    return {name: stored.read() for name, stored in open_safetensors(path).tensors.items()}
