"""split_prelude: what depends on parameters only is evaluated once, not in every step.

Each such expression that the rest of the graph reads becomes a new `parameter`, named for its
sources; the expressions are kept in `graph.prelude` as (name, graph) pairs, those of the bodies of
repeats too (their parameters have `names`, one per turn). A parameter that is read as it is stays.
"""

from __future__ import annotations

from dataclasses import replace

from llmc.ir.graph import Graph, Node, rebuild, walk
from llmc.ir.ops import make
from llmc.passes.match import is_static
from llmc.passes.names import result_name
from llmc.passes.rewrite import with_repeats

VIEWED = ("broadcast",)  # evaluated in the step: storing the result would only take more memory


def split_prelude(graph: Graph) -> Graph:
    """The graph over prelude results, with the expressions in `graph.prelude`."""
    splitter = _Splitter(graph)
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
        elif node.inputs and is_static(node) and not node.bodies and all(
                each in fixed or each in weights for each in node.inputs):
            (weights if any(each in weights for each in node.inputs) else fixed).add(node)
    return weights


class _Splitter:
    def __init__(self, graph: Graph):
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
