"""raise_patterns: norms, activations, softmax, rope, attention and quantised products that an
exporter took to pieces.

The rules see simplified graphs: constants on the right, x ** 2 as x * x, 1 / sqrt as rsqrt.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmc.ir.graph import Graph, Node
from llmc.ir.ops import make
from llmc.passes.match import is_last_axis, uniform_value, without_cast
from llmc.passes.raise_attention import ATTENTION_RULES
from llmc.passes.raise_masks import MASK_RULES
from llmc.passes.raise_quantized import QUANTIZED_RULES
from llmc.passes.rewrite import Rule, rewrite, rule

TOLERANCE = 1e-3  # of constants such as sqrt(1/2), which exporters round to the graph's dtype


def raise_patterns(graph: Graph) -> Graph:
    """The graph with composite ops where it had their pieces."""
    return rewrite(graph, RAISE_RULES)


def either_way(node: Node) -> Iterator[tuple[Node, Node]]:
    """The two operands in both orders."""
    left, right = node.inputs
    yield left, right
    yield right, left


def is_close(value: float | int | None, wanted: float) -> bool:
    return value is not None and abs(value - wanted) <= TOLERANCE * abs(wanted)


def mean_of_square(node: Node) -> tuple[Node, float] | None:
    """(x, epsilon) for mean(x * x) + epsilon over the last axis."""
    if node.op != "add" or uniform_value(node.inputs[1]) is None:
        return None
    mean, epsilon = node.inputs[0], uniform_value(node.inputs[1])
    square = mean.inputs[0] if mean.op == "reduce_mean" else None
    if square is None or not is_last_axis(mean["axes"], square.rank) or not mean["keep"]:
        return None
    if square.op != "mul" or square.inputs[0] is not square.inputs[1]:
        return None
    return square.inputs[0], float(epsilon or 0.0)


def normalised(node: Node) -> tuple[Node, float] | None:
    """(x, epsilon) for x * rsqrt(mean(x * x) + epsilon)."""
    if node.op != "mul":
        return None
    for x, scale in either_way(node):
        found = mean_of_square(scale.inputs[0]) if scale.op == "rsqrt" else None
        if found is not None and found[0] is x:
            return found
    return None


def weight_like(node: Node, x: Node) -> bool:
    return node.rank == 1 and x.rank >= 1 and node.shape == x.shape[-1:]


@rule("mul")
def raise_rms_norm(node: Node) -> Node | None:
    """w * (x * rsqrt(mean(x * x) + e)) -> rms_norm(x, w)"""
    for weight, scaled in either_way(node):
        found = normalised(without_cast(scaled))
        if found is None or not weight_like(weight, node):
            continue
        x, epsilon = found
        x = without_cast(x)
        raised = make("rms_norm", _cast(x, node), _cast(weight, node), epsilon=epsilon)
        return raised if raised.type == node.type else None
    return None


@rule("add")
def raise_layer_norm(node: Node) -> Node | None:
    """rms_norm(x - mean(x), w) + b -> layer_norm(x, w, b)"""
    for norm, bias in either_way(node):
        if norm.op != "rms_norm" or not weight_like(bias, node):
            continue
        x = _centred(without_cast(norm.inputs[0]))
        if x is not None and norm.type == node.type:
            return make("layer_norm", _cast(without_cast(x), node), norm.inputs[1],
                        _cast(bias, node), epsilon=norm["epsilon"])
    return None


def _centred(node: Node) -> Node | None:
    """x for x - mean(x) over the last axis."""
    if node.op != "sub":
        return None
    x, mean = node.inputs
    is_mean = mean.op == "reduce_mean" and mean["keep"] and mean.inputs[0] is x
    return x if is_mean and is_last_axis(mean["axes"], x.rank) else None


def _cast(node: Node, like: Node) -> Node:
    return node if node.dtype is like.dtype else make("cast", node, dtype=like.dtype)


# ---- activations -------------------------------------------------------------------------------


def factors(node: Node) -> tuple[float, list[Node]]:
    """A product as its constant and its other factors, in a fixed order."""
    constant, found, pending = 1.0, [], [node]
    while pending:
        each = pending.pop()
        value = uniform_value(each)
        if value is not None:
            constant *= value
        elif each.op == "mul" and each.type == node.type:
            pending += each.inputs
        elif each.op == "div" and uniform_value(each.inputs[1]) and each.type == node.type:
            constant /= uniform_value(each.inputs[1]) or 1.0
            pending.append(each.inputs[0])
        else:
            found.append(each)
    return constant, sorted(found, key=id)


def _gate(node: Node, op: str) -> tuple[float, Node, list[Node]] | None:
    """(constant, u, rest) for a product of (op(u) + 1) and the rest."""
    constant, found = factors(node)
    for each in found:
        if each.op == "add" and each.inputs[0].op == op and uniform_value(each.inputs[1]) == 1:
            rest = [other for other in found if other is not each]
            return constant, each.inputs[0].inputs[0], rest
    return None


@rule("mul")
def raise_gelu(node: Node) -> Node | None:
    """x * 0.5 * (1 + erf(x / sqrt 2)) -> gelu(x)"""
    found = _gate(node, "erf")
    if found is None or not is_close(found[0], 0.5):
        return None
    scale, inner = factors(found[1])
    if not is_close(scale, 0.5**0.5) or inner != found[2]:
        return None
    return _gelu(node, found[1], "none")


@rule("mul")
def raise_tanh_gelu(node: Node) -> Node | None:
    """x * 0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) -> gelu(x, tanh)"""
    found = _gate(node, "tanh")
    if found is None or not is_close(found[0], 0.5):
        return None
    scale, inner = factors(found[1])
    if not is_close(scale, 0.7978845608) or len(inner) != 1 or inner[0].op != "add":
        return None
    for x, cube in either_way(inner[0]):
        constant, base = factors(cube)
        own = factors(x)
        if is_close(constant, 0.044715) and own[0] == 1 and sorted(own[1] * 3, key=id) == base \
                and own[1] == found[2]:
            return make("gelu", x, approximate="tanh")
    return None


def _gelu(node: Node, scaled: Node, approximate: str) -> Node | None:
    """gelu of what the argument of erf is a multiple of."""
    for x in scaled.inputs:
        if x.type == node.type and uniform_value(x) is None:
            return make("gelu", x, approximate=approximate)
    return None


@rule("mul")
def raise_silu(node: Node) -> Node | None:
    """x * sigmoid(x) -> silu(x)"""
    for x, gate in either_way(node):
        if gate.op == "sigmoid" and gate.inputs[0] is x:
            return make("silu", x)
    return None


@rule("reciprocal", "div")
def raise_sigmoid(node: Node) -> Node | None:
    """1 / (1 + exp(-x)) -> sigmoid(x), y / (1 + exp(-x)) -> y * sigmoid(x)"""
    below = node.inputs[-1]
    if below.op != "add" or uniform_value(below.inputs[1]) != 1 or below.inputs[0].op != "exp":
        return None
    power = below.inputs[0].inputs[0]
    if power.op != "neg":
        return None
    gate = make("sigmoid", power.inputs[0])
    return gate if node.op == "reciprocal" else make("mul", node.inputs[0], gate)


@rule("div")
def raise_softmax(node: Node) -> Node | None:
    """e / sum(e), where e = exp(x - max(x)) or exp(x) -> softmax(x)"""
    e, total = node.inputs
    if e.op != "exp" or total.op != "reduce_sum" or total.inputs[0] is not e or not total["keep"]:
        return None
    if len(total["axes"]) != 1:
        return None
    x, axis = e.inputs[0], total["axes"][0]
    if x.op == "sub" and x.inputs[1].op == "reduce_max" and x.inputs[1].inputs[0] is x.inputs[0]:
        x = x.inputs[0]
    return make("softmax", x, axis=axis) if x.type == node.type else None


RAISE_RULES: list[Rule] = [
    raise_rms_norm, raise_layer_norm, raise_gelu, raise_tanh_gelu, raise_sigmoid, raise_silu,
    raise_softmax, *ATTENTION_RULES, *MASK_RULES, *QUANTIZED_RULES,
]
