"""split_prelude: what depends on parameters only is evaluated once, not in every step.

Each such expression that the rest of the graph reads becomes a new `parameter`, named for its
sources; the expressions are kept in `graph.prelude` as (name, graph) pairs, those of the bodies of
repeats too (their parameters have `names`, one per turn). A parameter that is read as it is stays.

A quantised matrix that a matmul multiplies by is not evaluated, where the target's matmul reads
codes: its codes, scales and zeros become parameters, each [k, n] as packed weights are, and
`dequantize` stays in the graph. Their expressions may hold a `quantize`, which `llmc/weights.py`
evaluates once for all three.
"""

from __future__ import annotations

from dataclasses import replace

from llmc.ir.dtypes import bf16, f16, f32, f64
from llmc.ir.graph import Graph, Node, map_graph, rebuild, walk
from llmc.ir.ops import make
from llmc.ir.program import QUANTIZED_MATMUL, Capabilities
from llmc.ir.quantized import SWAP, Quantized, quantized, stored
from llmc.passes.match import is_static
from llmc.passes.names import result_name
from llmc.passes.rewrite import with_inputs, with_repeats

VIEWED = ("broadcast",)  # evaluated in the step: storing the result would only take more memory

SCALES = (f32, f16, bf16)


def split_prelude(graph: Graph, capabilities: Capabilities) -> Graph:
    """The graph over prelude results, with the expressions in `graph.prelude`."""
    splitter = _Splitter(graph, QUANTIZED_MATMUL in capabilities.kernels)
    return replace(splitter.scope(graph), prelude=tuple(splitter.prelude.items()))


def weight_expressions(graph: Graph) -> set[Node]:
    """Parameters, and the nodes that depend on parameters and constants only (on one at least)."""
    fixed: set[Node] = set()
    weights: set[Node] = set()
    for node in graph.nodes():
        if node.op == "parameter":
            weights.add(node)
        elif node.op in ("constant", "iota") and is_static(node):
            fixed.add(node)
        elif node.inputs and (is_static(node) or node.op == "quantize") and not node.bodies and all(
                each in fixed or each in weights for each in node.inputs):
            (weights if any(each in weights for each in node.inputs) else fixed).add(node)
    return weights


def _store_quantized(graph: Graph, weights: set[Node]) -> tuple[Graph, set[Node]]:
    """The graph whose matmuls read quantised matrices from operands as they are stored, and the
    nodes between these and the matmuls: they stay in the graph."""
    kept: set[Node] = set()

    def store(node: Node) -> Node | None:
        if node.op != "matmul" or node.inputs[0].dtype is f64:
            return None
        left, right = node.inputs
        found = quantized(right)
        if found is None or not _is_read_in_codes(found, weights):
            return None
        matrix = found.with_operands([_as_stored(each) for each in found.operands]).matrix()
        kept.update((matrix, matrix.inputs[0], *matrix.inputs[0].inputs))
        return with_inputs(node, (left, matrix))

    return map_graph(graph, store), kept


def _is_read_in_codes(found: Quantized, weights: set[Node]) -> bool:
    """Whether the matmul kernel reads the matrix as it is: whole lanes of codes to each group."""
    codes, zeros = found.codes.dtype, found.zeros
    return (all(each in weights for each in found.operands) and codes.bits <= 8
            and found.group * codes.bits % 32 == 0
            and found.dtype is not f64 and found.scales.dtype in SCALES
            and (zeros is None or 8 <= zeros.dtype.bits <= 32))


def _as_stored(operand: Node) -> Node:
    """The operand as the transpose of what is stored: codes[k, n], scales[k / group, n]."""
    own = stored(operand) or make("transpose", operand, permutation=SWAP)
    return make("transpose", own, permutation=SWAP)


class _Splitter:
    def __init__(self, graph: Graph, keeps_quantized: bool):
        self.keeps_quantized = keeps_quantized
        self.prelude: dict[str, Graph] = dict(graph.prelude)
        self.made: dict[Node, Node] = {}
        leaves = (*graph.parameters(), *graph.states())
        self.names = {node["name"] for node in leaves}
        self.names.update(name for node in leaves for name in node["names"] or ())
        self.names.update(node["name"] for node in graph.inputs)

    def scope(self, graph: Graph) -> Graph:
        """The graph, or a repeat's body, with its weight expressions replaced by parameters."""
        graph = with_repeats(graph, self.scope)
        weights = weight_expressions(graph)
        if self.keeps_quantized:
            graph, kept = _store_quantized(graph, weights)
            weights = weight_expressions(graph) - kept
        users = graph.users()
        results = {node for _, node in graph.outputs}
        roots = [node for node in graph.nodes()
                 if node in weights and node.op not in ("parameter", *VIEWED)
                 and (node in results or any(user not in weights or user.op in VIEWED
                                             for user in users[node]))]
        return rebuild(graph, {root: self._parameter(root) for root in roots})

    def _parameter(self, root: Node) -> Node:
        if root in self.made:
            return self.made[root]
        sources = list(dict.fromkeys(leaf for leaf in walk([root]) if leaf.op == "parameter"))
        name = self._unique(result_name([leaf["name"] for leaf in sources]))
        attributes: dict = {"name": name, "type": root.type}
        turns = [leaf.get_attribute("names") for leaf in sources]
        count = max((len(each) for each in turns if each), default=0)
        if count:
            attributes["names"] = tuple(
                self._unique(result_name([each[turn] if each else leaf["name"]
                                          for each, leaf in zip(turns, sources, strict=True)]))
                for turn in range(count))
        self.prelude[name] = Graph(name, (), (("value", root),))
        self.made[root] = make("parameter", **attributes)
        return self.made[root]

    def _unique(self, name: str) -> str:
        unique, number = name, 1
        while unique in self.names:
            number += 1
            unique = f"{name}_{number}"
        self.names.add(unique)
        return unique
