"""Values from the middle of a model: its graph cut to the nodes that are asked for, compiled, run.

The code that runs is compiled as for any model; only that what is asked for is written to memory,
so that nothing is fused across it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmc.codegen.target import Target
from llmc.driver import FEW, compile_imported
from llmc.errors import LlmcError, ShapeError
from llmc.frontend.model import ImportedModel
from llmc.ir.dims import evaluate
from llmc.ir.graph import Graph, Node, TensorType, origin_of, walk
from llmc.ir.interpret import bind_symbols
from llmc.runtime.artifact import Artifact
from llmc.runtime.executor import Executor
from llmc.runtime.pages import PAGE
from llmc.runtime.pools import Pools

LEAVES = ("input", "parameter", "state", "constant", "iota", "dim", "layer", "table")
STATE_OPS = ("cache_append",)

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class TappedModel:
    """A model, where it runs, and on what: `inputs` are the graph's own, by name.

    States begin empty, so a language model's tokens are those of new sequences.
    """

    model: ImportedModel
    target: Target
    inputs: Arrays
    threads: int = 1

    @property
    def graph(self) -> Graph:
        return self.model.graph

    def read(self, nodes: Sequence[Node]) -> list[np.ndarray]:
        """The values of nodes of the graph, in their order and dtypes."""
        cut = replace(self.model, graph=cut_graph(self.graph, nodes), kind="graph",
                      token_interface=None)
        with tempfile.TemporaryDirectory(prefix="llmc-taps-") as directory:
            compiled = compile_imported(cut, self.target, limits=self._limits())
            path = compiled.write(Path(directory) / "taps")
            executor = self._executor(path)
            try:
                if executor.states:
                    executor.allocate_states(Pools(self._pool_pages(), 1).symbols())
                results = executor.run(dict(self.inputs))
            finally:
                executor.close()
        return [results[_name(number)] for number in range(len(nodes))]

    def bytes_of(self, nodes: Sequence[Node]) -> int:
        """Memory that the values of the nodes take."""
        values = bind_symbols(self.graph, self.inputs, {})
        return sum(math.prod(evaluate(dim, values) for dim in node.shape) * node.dtype.bits // 8
                   for node in nodes)

    def _limits(self) -> dict[str, tuple[int, int]]:
        """Sizes from these inputs' on: variants for fewer are not compiled."""
        values = bind_symbols(self.graph, self.inputs, {})
        return {symbol.name: (values[symbol.name], symbol.high)
                for symbol in self.graph.symbols() if symbol.name in FEW}

    def _executor(self, path: Path) -> Executor:
        artifact = Artifact(path)
        if self.target.kind == "host":
            return Executor(artifact, self.threads)
        from llmc.runtime.cuda_executor import CudaExecutor

        return CudaExecutor(artifact, 0)

    def _pool_pages(self) -> int:
        return int(self.inputs["page_table"].max()) + 1 if "page_table" in self.inputs else 1


def cut_graph(graph: Graph, nodes: Sequence[Node]) -> Graph:
    """The part of the graph that the nodes need; they become its outputs, and the states that are
    written on the way are still updated."""
    needed = set(walk(nodes))
    updates = tuple((state, value) for state, value in graph.updates if value in needed)
    outputs = tuple((_name(number), node) for number, node in enumerate(nodes))
    return Graph(graph.name, graph.inputs, outputs, updates)


def _name(number: int) -> str:
    return f"tap.{number}"


# ---- which nodes -------------------------------------------------------------------------------


def depends_on_inputs(graph: Graph) -> set[Node]:
    """The nodes whose values the inputs or states have a part in."""
    found: set[Node] = set()
    for node in graph.nodes():
        if node.op in ("input", "state") or any(operand in found for operand in node.inputs):
            found.add(node)
    return found


def tap_points(graph: Graph) -> list[Node]:
    """The nodes that are worth comparing, in the order in which they are computed: tensors made of
    the inputs; neither leaves nor whole caches."""
    varying = depends_on_inputs(graph)
    return [node for node in graph.nodes()
            if node in varying and node.op not in LEAVES and node.op not in STATE_OPS
            and isinstance(node.type, TensorType)]


def module_of(node: Node) -> str | None:
    """The path of the module that made the node (`model.layers.0.mlp`), if that is known; of an
    ONNX file the exporter's note, or what stands before the last slash of the node's name."""
    origin = origin_of(node)
    if origin is None:
        return None
    if origin.module is not None:
        return origin.module
    path = (origin.node or "").strip("/").split("/")[:-1]
    return ".".join(path) or None


def describe(node: Node) -> str:
    """The op and where it came from, for people."""
    origin = origin_of(node)
    return f"{node.op} ({origin})" if origin else node.op


# ---- inputs ------------------------------------------------------------------------------------


def token_inputs(model: ImportedModel, tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """The graph's inputs for one new sequence of tokens.

    ShapeError if the graph has inputs that tokens do not tell.
    """
    if not len(tokens):
        raise ShapeError("there must be at least one token")
    return {node["name"]: _token_input(node, np.asarray(tokens, np.int64))
            for node in model.graph.inputs}


def _token_input(node: Node, tokens: np.ndarray) -> np.ndarray:
    count, name = len(tokens), node["name"]
    places = np.arange(count)
    packed = {
        "ids": tokens, "positions": places, "sequence": np.zeros(count), "rows": places,
        "offsets": np.array([0, count]), "token_types": np.zeros(count),
        "lengths": np.array([count]), "pooled": np.zeros(1), "slots": np.zeros(1),
        "page_table": np.arange(-(-count // PAGE))[None],
    }
    dense = {"input_ids": tokens[None], "attention_mask": np.ones((1, count)),
             "position_ids": places[None], "token_type_ids": np.zeros((1, count))}
    value = (packed | dense).get(name)
    if value is None and "past" in name and node.rank == 4:
        value = np.zeros([1, *(dim if isinstance(dim, int) else 0 for dim in node.shape[1:])])
    if value is None or value.ndim != node.rank:
        raise ShapeError(f"tokens do not tell the input {name} {node.type}: give every input "
                         "with --input NAME=FILE.npy")
    return value.astype(node.dtype.numpy)


def checked_inputs(model: ImportedModel, arrays: Arrays) -> dict[str, np.ndarray]:
    """Arrays that were given by name, in the dtypes of the graph's inputs; ShapeError."""
    wanted = {node["name"]: node for node in model.graph.inputs}
    if unknown := arrays.keys() - wanted.keys():
        raise ShapeError(f"{model.path} has no input {', '.join(sorted(unknown))}; it has "
                         f"{', '.join(wanted)}")
    if missing := wanted.keys() - arrays.keys():
        raise ShapeError(f"{model.path} also needs the input {', '.join(sorted(missing))}")
    return {name: np.ascontiguousarray(arrays[name], node.dtype.numpy)
            for name, node in wanted.items()}


def parse_tokens(text: str) -> list[int]:
    """`1,2,3` as token ids."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise LlmcError(f"--tokens: {text!r} is not a list of ids such as 1,2,3") from None
