"""What attention reads and writes, seen through movement."""

from __future__ import annotations

from llmc.ir.graph import Graph, Node
from llmc.ir.program import Stage, unsupported
from llmc.ir.views import View, source_of, view_of


def operand_view(stage: Stage, node: Node) -> tuple[Node, View]:
    """(the body's input, how node reads it) for a node that is movement of one input.

    Casts on the way are passed over: whoever loads converts. Raises CompileError for other ops and
    for reshapes that would need a copy.
    """
    source, view = source_of(node), view_of(node)
    if source.op != "input":
        raise unsupported(stage, f"an operand is computed by {source.op}, not just moved")
    if view is None:
        raise unsupported(stage, "an operand's reshape needs a copy")
    return source, view


def result_view(stage: Stage, body: Graph, node: Node) -> View:
    """Where node's elements go in the stage's only result, through reshapes and transposes."""
    if len(body.outputs) != 1:
        raise unsupported(stage, "attention has one result")
    chain = []
    result = body.outputs[0][1]
    while result is not node:
        if result.op not in ("reshape", "transpose", "cast"):
            raise unsupported(stage, f"{result.op} follows attention, which is no movement")
        chain.append(result)
        result = result.inputs[0]
    view = View.rows(body.outputs[0][1].shape)
    for step in chain:
        if step.op == "transpose":
            permutation = step["permutation"]
            view = view.transpose([permutation.index(axis) for axis in range(len(permutation))])
        elif step.op == "reshape":
            moved = view.reshape(step.inputs[0].shape)
            if moved is None:
                raise unsupported(stage, f"the reshape to {list(step.shape)} needs a copy")
            view = moved
    return view
