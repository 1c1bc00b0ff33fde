"""The rewrite engine: small rules, applied bottom-up until none fires.

A rule is a function `(node) -> Node | None` registered for the ops it looks at, with its algebra as
the docstring. It sees a node whose inputs are already simplified and returns an equal node of the
same type, or None. Nodes are interned, so common subexpressions merge by themselves and nodes that
nobody reaches any more are gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from llmc.errors import CompileError
from llmc.ir.graph import Graph, Node, intern_node, map_graph, merge_origins
from llmc.ir.ops import make

Apply = Callable[[Node], Node | None]


@dataclass(frozen=True)
class Rule:
    """A rewrite and the ops of the nodes it looks at."""

    name: str
    ops: tuple[str, ...]
    apply: Apply


def rule(*ops: str) -> Callable[[Apply], Rule]:
    """Decorator: make a function (node) -> Node | None a rule for nodes of these ops."""

    def register(function: Apply) -> Rule:
        return Rule(function.__name__, ops, function)

    return register


def rewrite(graph: Graph, rules: Iterable[Rule]) -> Graph:
    """The graph after applying the rules to a fixed point, in its bodies too.

    Returns the very same graph if no rule fires. CompileError, naming the rule, if rules undo each
    other or never come to an end.
    """
    return _Rewriter(rules).graph(graph)


def with_inputs(node: Node, inputs: Iterable[Node], bodies: Iterable[Graph] | None = None) -> Node:
    """The same op on other inputs; its type is inferred again only where theirs changed."""
    inputs = tuple(inputs)
    bodies = node.bodies if bodies is None else tuple(bodies)
    if inputs == node.inputs and bodies == node.bodies:
        return node
    if all(new.type == old.type for new, old in zip(inputs, node.inputs, strict=True)):
        made = intern_node(node.op, node.attributes, inputs, bodies, node.type)
    else:
        made = make(node.op, *inputs, bodies=bodies, **dict(node.attributes))
    if made is not node:
        merge_origins(made, node)
    return made


def with_roots(graph: Graph, change: Callable[[Node], Node]) -> Graph:
    """The graph whose outputs and state updates are replaced by what `change` maps them to."""
    outputs = tuple((name, change(node)) for name, node in graph.outputs)
    updates = tuple((state, change(node)) for state, node in graph.updates)
    if outputs == graph.outputs and updates == graph.updates:
        return graph
    return replace(graph, outputs=outputs, updates=updates)


def with_repeats(graph: Graph, change: Callable[[Graph], Graph]) -> Graph:
    """The graph with the body of each of its repeats changed, also where one feeds the next."""

    def changed(node: Node) -> Node | None:
        if node.op != "repeat":
            return None
        return with_inputs(node, node.inputs, map(change, node.bodies))

    return map_graph(graph, changed)


def only_user(users: dict[Node, list[Node]], node: Node) -> Node | None:
    """The node that alone reads `node`, or None if several nodes, or none, do."""
    found = users.get(node, [])
    return found[0] if len(found) == 1 else None


class _Rewriter:
    def __init__(self, rules: Iterable[Rule]):
        self.rules: dict[str, list[Rule]] = {}
        for each in rules:
            for op in each.ops:
                self.rules.setdefault(op, []).append(each)
        self.done: dict[Node, Node] = {}
        self.waiting: dict[Node, tuple[Node, Rule]] = {}
        self.fired: Counter[str] = Counter()
        self.budget = 0

    def graph(self, graph: Graph) -> Graph:
        self.budget += 1000 + 50 * len(graph.nodes())
        return with_roots(graph, self.node)

    def node(self, root: Node) -> Node:
        """The fixed point of a node. The stack holds nodes whose inputs or rewrites are pending."""
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self.done:
                stack.pop()
            elif node in self.waiting:
                self._finish(node)
            else:
                pending = [each for each in node.inputs if each not in self.done]
                if pending:
                    stack.extend(reversed(pending))
                else:
                    self._visit(node, stack)
        return self.done[root]

    def _visit(self, node: Node, stack: list[Node]) -> None:
        bodies = tuple(map(self.graph, node.bodies))
        current = with_inputs(node, [self.done[each] for each in node.inputs], bodies)
        if current is not node and current in self.done:
            self.done[node] = self.done[current]
            return
        for each in self.rules.get(current.op, ()):
            result = each.apply(current)
            if result is not None and result is not current:
                self._count(each)
                merge_origins(result, current)
                self.waiting[node] = result, each
                stack.append(result)
                return
        self.done[node] = self.done[current] = current

    def _finish(self, node: Node) -> None:
        """The rewrite of a node has come to its own fixed point, which is the node's too."""
        result, each = self.waiting.pop(node)
        if result not in self.done:
            raise CompileError(f"rewrite rule {each.name} rewrites {node!r} to itself, round and "
                               f"round")
        self.done[node] = self.done[result]

    def _count(self, each: Rule) -> None:
        self.fired[each.name] += 1
        if self.fired.total() > self.budget:
            name, times = self.fired.most_common(1)[0]
            raise CompileError(f"rewriting does not end: rule {name} has fired {times} times")
