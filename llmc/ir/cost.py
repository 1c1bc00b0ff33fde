"""What a stage must move and compute at a shape: the floor that its time is judged by.

Counted once per tile-independent need: a weight that is read whole counts whole, one that is only
gathered from counts the rows that are taken, a paged cache counts what the sequences can see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod

from llmc.ir.dims import evaluate
from llmc.ir.graph import Node, TensorType
from llmc.ir.program import Loop, Program, Stage

_MOVEMENT = {
    "input", "constant", "get", "iota", "dim", "layer", "table", "broadcast", "reshape",
    "transpose", "slice", "concat", "pad", "gather", "gather_elements", "gather_nd", "cast",
    "cache_append", "scatter_nd", "scatter_elements",
}
_PER_ELEMENT = {"rms_norm": 4, "layer_norm": 7, "softmax": 5, "rope": 3}
_REDUCTIONS = {
    "reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin",
    "cumsum", "cumprod", "top_k",
}
_GATHERS = {"gather", "gather_nd", "gather_elements"}


@dataclass(frozen=True)
class Shape:
    """Values of the symbols, and tokens of each sequence that attention may see (past and new)."""

    symbols: Mapping[str, int]
    context: int = 0

    def sizes(self, type_: TensorType) -> list[int]:
        return [evaluate(dim, self.symbols) for dim in type_.shape]

    def elements(self, type_: TensorType) -> int:
        return prod(self.sizes(type_))

    def bytes(self, type_: TensorType) -> int:
        return -(-self.elements(type_) * type_.dtype.bits // 8)


@dataclass(frozen=True)
class Cost:
    """Bytes by where they lie, and floating-point operations; `products` are those of matrix
    products and attention, which alone count towards a machine's peak."""

    weight_bytes: int = 0
    state_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    flops: int = 0
    products: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def times(self, count: int) -> Cost:
        return Cost(*(getattr(self, f.name) * count for f in fields(Cost)))


def program_cost(program: Program, shape: Shape) -> Cost:
    """All stages, those of loops as often as they run."""
    total = Cost()
    for step in program.steps:
        stages, count = (step.stages, step.count) if isinstance(step, Loop) else ((step,), 1)
        for stage in stages:
            total += stage_cost(stage, program, shape).times(count)
    return total


def stage_cost(stage: Stage, program: Program, shape: Shape) -> Cost:
    """One run of a stage. read_bytes are activations; states and weights count on their own."""
    bytes_of = {"weight": 0, "state": 0, "read": 0}
    users = _users(stage)
    for name, node in zip(stage.operands, stage.body.inputs, strict=True):
        role = program.buffers[name].role
        role = role if role in bytes_of else "read"
        bytes_of[role] += _touched(node, users.get(node, []), role, shape)
    appended = sum(shape.bytes(_tensor(n.inputs[1])) for n in _nodes(stage)
                   if n.op == "cache_append")
    written = sum(shape.bytes(_tensor(node))
                  for name, (_, node) in zip(stage.results, stage.body.outputs, strict=True)
                  if program.buffers[name].role != "state")
    products = sum(_products(node, shape) for node in _nodes(stage))
    others = sum(_elementwise(node, shape) for node in _nodes(stage))
    return Cost(bytes_of["weight"], bytes_of["state"], bytes_of["read"], written + appended,
                products + others, products)


def _nodes(stage: Stage) -> list[Node]:
    return [node for node in stage.body.nodes() if not isinstance(node.type, tuple)]


def _users(stage: Stage) -> dict[Node, list[Node]]:
    """Who reads each input, looking through views of it."""
    users: dict[Node, list[Node]] = {}
    source = {node: node for node in stage.body.inputs}
    for node in _nodes(stage):
        for each in node.inputs:
            if each not in source:
                continue
            if node.op in ("transpose", "reshape"):
                source[node] = source[each]
            else:
                users.setdefault(source[each], []).append(node)
    return users


def _touched(node: Node, users: list[Node], role: str, shape: Shape) -> int:
    """Bytes of an operand that its users read."""
    if role == "state":
        return sum(_visible_bytes(node, user, shape) for user in users)
    whole = shape.bytes(_tensor(node))
    if users and all(user.op in _GATHERS for user in users):
        return min(whole, sum(shape.bytes(_tensor(user)) for user in users))
    return whole


def _visible_bytes(state: Node, user: Node, shape: Shape) -> int:
    """What attention reads of one paged state [pages, PAGE, heads, size]."""
    if user.op != "paged_attention":
        return 0
    sequences = shape.sizes(_tensor(user.inputs[3]))[0]
    context = min(shape.context, user["window"]) if user["window"] else shape.context
    type_ = _tensor(state)
    return sequences * context * prod(shape.sizes(type_)[2:]) * type_.dtype.bits // 8


def _products(node: Node, shape: Shape) -> int:
    """Flops of matrix products: two for each multiply-add."""
    out = shape.elements(_tensor(node))
    if node.op in ("matmul", "grouped_matmul"):
        return 2 * out * shape.sizes(_tensor(node.inputs[0]))[-1]
    if node.op in ("attention", "packed_attention", "paged_attention"):
        return 4 * out * _visible_keys(node, shape)
    return 0


def _visible_keys(node: Node, shape: Shape) -> int:
    """Keys that a query sees, on average."""
    if node.op == "attention":
        queries = shape.sizes(_tensor(node.inputs[0]))[2]
        keys, causal = shape.sizes(_tensor(node.inputs[1]))[2], node["causal"]
    else:
        tokens = shape.sizes(_tensor(node))[0]
        paged = node.op == "paged_attention"
        sequences = shape.sizes(_tensor(node.inputs[-1]))[0] - 1
        queries = max(1, tokens // max(1, sequences))
        keys, causal = (shape.context, True) if paged else (queries, node["causal"])
    seen = keys - (queries - 1) // 2 if causal else keys
    return min(seen, node["window"]) if node["window"] else seen


def _elementwise(node: Node, shape: Shape) -> int:
    if node.op in _MOVEMENT or _products(node, shape):
        return 0
    if node.op in _REDUCTIONS:
        return shape.elements(_tensor(node.inputs[0]))
    return shape.elements(_tensor(node)) * _PER_ELEMENT.get(node.op, 1)


def _tensor(node: Node) -> TensorType:
    assert isinstance(node.type, TensorType), node.op
    return node.type
