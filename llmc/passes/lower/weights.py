"""Which layout every weight and state gets. Depends on the graph and the target alone, never on the
shape key, so that all variants share one copy."""

from __future__ import annotations

from collections.abc import Iterator

from llmc.errors import CompileError
from llmc.ir.graph import Graph, Node
from llmc.ir.layouts import Columns, KeyPages, Layout, Panels, ValuePages
from llmc.ir.program import Capabilities
from llmc.ir.quantized import stored_operands


def scopes(graph: Graph) -> Iterator[Graph]:
    """The graph and the bodies of its repeats (not those of fusions)."""
    yield graph
    for node in graph.nodes():
        if node.op == "repeat":
            yield from scopes(node.bodies[0])


def find_anchor(body: Graph, op: str) -> Node | None:
    """The only node of that op in a fusion's body, or None."""
    found = [node for node in body.nodes() if node.op == op]
    return found[0] if len(found) == 1 else None


def anchor_of(body: Graph, op: str) -> Node:
    """The only node of that op in a fusion's body; CompileError if there is not exactly one."""
    anchor = find_anchor(body, op)
    if anchor is None:
        raise CompileError(f"the fusion {body.name!r} does not hold exactly one {op}")
    return anchor


def weight_layouts(matmul: Node, body: Graph, capabilities: Capabilities) -> dict[Node, Layout]:
    """How the right operand of a fusion's matmul lies; of a quantised one, its codes, and its
    scales and zeros, whose rows are read whole."""
    parts = matmul["parts"] if matmul.op == "grouped_matmul" else matmul_parts(matmul, body)
    layouts: dict[Node, Layout] = {}
    for operand in stored_operands(matmul.inputs[1]):
        interleave = 1 if layouts else capabilities.interleave(operand.dtype)
        if matmul.inputs[1].dtype.is_integer:
            whole = capabilities.packed_activation(operand.dtype, matmul.inputs[0].dtype) != "i16"
            interleave = 4 if whole else 2  # bytes, or pairs of i16
        layouts[operand] = Columns() if capabilities.weight_layout == "columns" else Panels(
            capabilities.panel_columns, interleave, parts)
    return layouts


def matmul_parts(matmul: Node, body: Graph) -> int:
    """2 where the body reads the product only as halves of its last axis (gate and up), else 1.

    Any number of equal parts that tile the last axis counts, in the same way.
    """
    users = body.users().get(matmul, [])
    width = matmul.shape[-1]
    if not users or not isinstance(width, int) or any(user.op != "slice" for user in users):
        return 1
    sizes = {user.shape[-1] for user in users}
    if len(sizes) != 1 or any(user.shape[:-1] != matmul.shape[:-1] for user in users):
        return 1
    size = sizes.pop()
    if not isinstance(size, int):
        return 1
    starts = sorted(user["starts"][-1] for user in users)
    return len(starts) if starts == list(range(0, width, size)) else 1


def weight_uses(graph: Graph, capabilities: Capabilities) -> dict[Node, Layout]:
    """Parameter -> layout, for parameters that some fusion multiplies by; others stay in rows."""
    uses: dict[Node, Layout] = {}
    for scope in scopes(graph):
        for node in scope.nodes():
            if node.op == "fusion" and node["anchor"] in ("matmul", "grouped_matmul"):
                body = node.bodies[0]
                matmul = anchor_of(body, node["anchor"])
                for stand_in, layout in weight_layouts(matmul, body, capabilities).items():
                    uses[node.inputs[body.inputs.index(stand_in)]] = layout
    return uses


def tied_sources(graph: Graph, panels: dict[Node, Layout]) -> dict[Node, Node]:
    """Parameter -> packed parameter that is its transpose (an embedding tied to the output head).

    A tied matrix exists once: whoever gathers from the first reads the second's panels.
    """
    preludes = dict(graph.prelude)
    transposed = {}
    for packed in panels:
        expression = _expression(packed, preludes)
        if expression.op == "transpose" and expression["permutation"] == (1, 0):
            transposed[expression.inputs[0]] = packed
    tied = {}
    for scope in scopes(graph):
        for parameter in scope.parameters():
            twin = transposed.get(_expression(parameter, preludes))
            if twin is not None and parameter not in panels:
                tied[parameter] = twin
    return tied


def _expression(parameter: Node, preludes: dict[str, Graph]) -> Node:
    graph = preludes.get(parameter["name"])
    return graph.outputs[0][1] if graph is not None else parameter


def state_layouts(graph: Graph, capabilities: Capabilities) -> dict[Node, Layout]:
    """State leaf -> layout, from how attention reads it."""
    keys: Layout = ValuePages() if capabilities.weight_layout == "columns" else KeyPages()
    layouts: dict[Node, Layout] = {}
    for scope in scopes(graph):
        for node in scope.nodes():
            if node.op != "fusion" or node["anchor"] != "attention":
                continue
            body = node.bodies[0]
            attention = find_anchor(body, "paged_attention")
            if attention is not None:
                operands = (*attention.inputs[1:3], *attention.inputs[7:])
                of_scales = (KeyPages(), KeyPages())[:len(operands) - 2]
                for operand, layout in zip(operands, (keys, ValuePages(), *of_scales),
                                           strict=True):
                    state = root_state(node.inputs[body.inputs.index(operand)])
                    layouts[state] = layout
    return layouts


def root_state(node: Node) -> Node:
    """The state leaf whose (updated) value a node is."""
    while node.op != "state":
        index = node["index"] if node.op == "get" else 0
        fusion = node.inputs[0] if node.op == "get" else node
        body = fusion.bodies[0]
        value = body.outputs[index][1]
        node = fusion.inputs[body.inputs.index(first_state(value))]
    return node


def first_state(value: Node) -> Node:
    """The body input that a chain of updates (cache_append ...) starts from."""
    while value.op != "input":
        value = value.inputs[0]
    return value

