"""`verify(graph)`: does the graph keep the rules of the IR? Every pass leaves a verified graph."""

from typing import NoReturn

from llmc.errors import GraphError
from llmc.ir.graph import Graph, Node, format_type, origin_of
from llmc.ir.ops import OPS, make, updated_state
from llmc.ir.text import format_lines

_CONTEXT_LINES = 5


def verify(graph: Graph) -> None:
    """Checks types, scopes, states and constants of the graph, its bodies and its preludes.

    Raises GraphError; its text shows the lines round the culprit, which is marked with `>`.
    """
    _Verifier(graph).graph(graph)


class _Verifier:
    def __init__(self, root: Graph) -> None:
        self.root = root

    def graph(self, graph: Graph, turns: int | None = None, in_prelude: bool = False) -> None:
        """`turns`: how often the innermost repeat round the graph runs it; None: there is none."""
        self.interface(graph)
        for node in graph.nodes():
            self.node(graph, node)
            if not in_prelude:
                self.turn(node, turns)
            inner = node["count"] if node.op == "repeat" else turns
            for body in node.bodies:
                self.graph(body, inner, in_prelude)
        self.states(graph)
        for _, maker in graph.prelude:
            self.graph(maker, None, in_prelude=True)

    def interface(self, graph: Graph) -> None:
        for node in graph.inputs:
            if node.op != "input":
                self.fail(graph, f"graph {graph.name} has a {node.op} node among its inputs")
        for what, names in (
            ("inputs", [node["name"] for node in graph.inputs]),
            ("outputs", [name for name, _ in graph.outputs]),
            ("preludes", [name for name, _ in graph.prelude]),
        ):
            for name in names:
                if names.count(name) > 1:
                    self.fail(graph, f"graph {graph.name} has two {what} named '{name}'")

    def node(self, graph: Graph, node: Node) -> None:
        if node.op not in OPS:
            self.fail(node, f"there is no op '{node.op}'")
        if node.op == "input" and node not in graph.inputs:
            self.fail(node, f"input '{node['name']}' is not among the inputs of graph {graph.name}")
        try:
            made = make(node.op, *node.inputs, bodies=node.bodies, **dict(node.attributes))
        except GraphError as error:
            self.fail(node, str(error))
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            self.fail(node, f"malformed attributes: {type(error).__name__}, {error}")
        if made.type != node.type:
            self.fail(node, f"type {format_type(node.type)} should be {format_type(made.type)}")
        if made is not node:
            self.fail(node, f"attributes {node.attributes} should be {made.attributes}")

    def turn(self, node: Node, turns: int | None) -> None:
        """What differs from turn to turn of a repeat stands inside one of as many turns."""
        attribute = {"parameter": "names", "state": "names", "table": "values"}.get(node.op)
        values = node.get_attribute(attribute, ()) if attribute else ()
        if turns is None and (node.op == "layer" or values):
            self.fail(node, "outside a repeat nothing differs by turn")
        if values and len(values) != turns:
            self.fail(node, f"{len(values)} {attribute} in a repeat of {turns} turns")

    def states(self, graph: Graph) -> None:
        """Updates are linear: what an update overwrites has no other reader."""
        updates = dict(graph.updates)
        if len(updates) != len(graph.updates):
            self.fail(graph, "a state is updated twice")
        for state, value in graph.updates:
            if state.op != "state":
                self.fail(graph, f"'update' of a {state.op} node, which is no state")
            if state.type != value.type:
                self.fail(value, f"updates a state of type {format_type(state.type)}")
        olds = {node: old for node in graph.nodes() if (old := overwritten(node)) is not None}
        users = graph.users()
        for node, old in olds.items():
            self.overwriting(graph, node, old, users[old])
            if old not in olds and old.op not in ("state", "input"):
                self.fail(node, f"overwrites the result of a {old.op} node, which is no state")
            first = _first(node)
            is_last = node not in olds.values()
            if is_last and first.op == "state" and updates.get(first) is not node:
                self.fail(node, "is the new value of a state, but not among the updates")

    def overwriting(self, graph: Graph, node: Node, old: Node, users: list[Node]) -> None:
        writer = node.inputs[0] if node.op == "get" else node
        for user in users:
            if user is not writer:
                self.fail(user, f"reads a state that a {writer.op} node overwrites")
        returned = [value for _, value in (*graph.outputs, *graph.updates)]
        if old in returned:
            self.fail(writer, "overwrites a value that the graph returns")

    def fail(self, culprit: Node | Graph, message: str) -> NoReturn:
        """Raises GraphError with the text round the node, or round the graph's `return`."""
        if isinstance(culprit, Node):
            origin = origin_of(culprit)
            message = f"{culprit.op} node{f' ({origin})' if origin else ''}: {message}"
        raise GraphError(f"{message}\n{self.neighbourhood(culprit)}".rstrip())

    def neighbourhood(self, culprit: Node | Graph) -> str:
        try:
            lines, line_of = format_lines(self.root)
        except GraphError as error:
            return f"(no text of graph {self.root.name}: {error})"
        line = line_of[culprit]
        first, last = max(0, line - _CONTEXT_LINES), line + _CONTEXT_LINES + 1
        return "\n".join(
            f"{'>' if number == line else ' '} {text}"
            for number, text in enumerate(lines[first:last], first)
        )


def overwritten(node: Node) -> Node | None:
    """The state value whose memory the node's result takes over, if the node is an update: a
    cache_append, the second result of a slot op, or a fusion (read by `get`, if it has several
    results) with one inside."""
    if (old := updated_state(node)) is not None:
        return old
    if node.op == "fusion":
        return _overwritten_by_body(node, 0) if len(node.bodies[0].outputs) == 1 else None
    if node.op == "get" and node.inputs[0].op == "fusion":
        return _overwritten_by_body(node.inputs[0], node["index"])
    return None


def _overwritten_by_body(fusion: Node, index: int) -> Node | None:
    body = fusion.bodies[0]
    result = body.outputs[index][1]
    first = _first(result)
    if first is result or first not in body.inputs:
        return None
    return fusion.inputs[body.inputs.index(first)]


def _first(node: Node) -> Node:
    """The value that a chain of updates started from."""
    while (old := overwritten(node)) is not None:
        node = old
    return node
