"""Rewriting the bodies of fusions into the bodies of stages."""

from __future__ import annotations

from llmc.ir.dtypes import DType
from llmc.ir.graph import Graph, Node, TensorType, rebuild, with_inputs
from llmc.ir.ops import ELEMENTWISE, make

LEAVES_OF_A_BODY = {"constant", "iota", "dim", "layer", "table"}
ROW_WISE = {"softmax", "rms_norm", "layer_norm", "reduce_sum", "reduce_mean", "reduce_max",
            "reduce_min", "reduce_prod"}


def body_input(name: str, type_: TensorType) -> Node:
    return make("input", name=name, type=type_)


def copy_body(type_: TensorType) -> Graph:
    """The body of a stage that copies a tensor."""
    source = body_input("x", type_)
    return Graph("copy", (source,), (("result", source),))


def absorb(body: Graph, operands: list[Node]) -> tuple[Graph, list[Node]]:
    """Draw leaves and whole-buffer views into a body, so that every operand is a buffer.

    A constant, iota or dim becomes part of the body; reshape(x) as operand becomes x as operand and
    the reshape part of the body.
    """
    replace: dict[Node, Node] = {}
    inputs: dict[Node, Node] = {}
    for stand_in, operand in zip(body.inputs, operands, strict=True):
        chain = []
        while operand.op in VIEWS:
            chain.append(operand)
            operand = operand.inputs[0]
        if operand.op in LEAVES_OF_A_BODY:
            value = operand
        elif operand in inputs:
            value = inputs[operand]
        else:
            value = inputs[operand] = (
                body_input(stand_in["name"], operand.tensor_type) if chain else stand_in)
        for view in reversed(chain):
            attributes = {key: view[key] for key, _ in view.attributes}
            value = make(view.op, value, **attributes)
        if value is not stand_in:
            replace[stand_in] = value
    if not replace:
        return body, operands
    return retarget(body, replace, list(inputs.values())), list(inputs)


VIEWS = {"reshape", "transpose", "broadcast", "slice", "cast"}


def retarget(body: Graph, replace: dict[Node, Node], inputs: list[Node]) -> Graph:
    """The body with nodes replaced and new inputs (unreached ones are kept: order matters)."""
    bare = rebuild(Graph(body.name, tuple(dict.fromkeys((*body.inputs, *inputs))), body.outputs),
                   replace)
    return Graph(body.name, tuple(inputs), bare.outputs)


def prune(body: Graph, operands: list[str]) -> tuple[Graph, tuple[str, ...]]:
    """Drop the inputs that the outputs do not reach."""
    reached = set(body.nodes())
    kept = [(node, name) for node, name in zip(body.inputs, operands, strict=True)
            if node in reached]
    inputs = tuple(node for node, _ in kept)
    return Graph(body.name, inputs, body.outputs), tuple(name for _, name in kept)


def split_prologue(body: Graph, matmul: Node, packed: DType) -> tuple[Graph, Graph, Node]:
    """(prologue, rest, a): the left operand's computation as a body of its own, cast to `packed`,
    and the rest with a new input `a` in its place. Both keep all of the body's inputs."""
    left = matmul.inputs[0]
    value = left if left.dtype is packed else make("cast", left, dtype=packed)
    prologue = Graph("prologue", body.inputs, (("a", value),))
    stand_in = body_input("packed_rows", value.tensor_type)
    product = with_inputs(matmul, (stand_in, *matmul.inputs[1:]))
    rest = retarget(body, {matmul: product}, [*body.inputs, stand_in])
    return prologue, rest, stand_in


def is_row_wise(body: Graph) -> bool:
    """Whether a body needs the row-wise kernel rather than an elementwise map."""
    return any(node.op in ROW_WISE for node in body.nodes())


def is_rows_of_input(node: Node) -> bool:
    """Whether a node is a body input, or reshapes of one: rows that lie in memory as they are."""
    while node.op == "reshape":
        node = node.inputs[0]
    return node.op == "input"


def reads_in_place(body: Graph, source: Node, output: Node) -> bool:
    """Whether each element of output depends, of source, on the same element only.

    True when every path from source to output runs through elementwise ops of output's shape; then
    output may overwrite source.
    """
    users = body.users()
    pending, seen = [source], {source}
    while pending:
        node = pending.pop()
        if node is output:
            continue
        for user in users.get(node, ()):
            if not _same_element(user, node, output):
                return False
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return source.shape == output.shape


def _same_element(user: Node, node: Node, output: Node) -> bool:
    if user.op not in ELEMENTWISE or node.shape != output.shape:
        return False
    return user.type is not None and not isinstance(user.type, tuple) and user.shape == output.shape

