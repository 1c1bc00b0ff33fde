"""simplify: constants folded through the reference, and identities that never make a graph worse.

Sums and products keep a constant operand on the right; other rules rely on that.
"""

from __future__ import annotations

import operator

import numpy as np

from llmc.errors import LlmcError
from llmc.ir.dims import evaluate, maximum, minimum, product
from llmc.ir.dtypes import DType
from llmc.ir.graph import Graph, Node
from llmc.ir.interpret import evaluate_constant
from llmc.ir.ops import ELEMENTWISE, constant, make
from llmc.passes.match import REDUCTIONS, is_static, scalar_of, uniform_value
from llmc.passes.movement import MOVEMENT_RULES
from llmc.passes.rewrite import Rule, rewrite, rule, with_inputs

FOLDED_BYTES = 64 * 1024
DIM_OPERATIONS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul,
                  "floor_div": operator.floordiv, "mod": operator.mod,
                  "max": maximum, "min": minimum}
FOLDABLE = (
    *sorted(ELEMENTWISE), *sorted(REDUCTIONS), "reshape", "transpose", "slice", "concat", "pad",
    "gather", "gather_elements", "gather_nd", "cumsum", "cumprod", "matmul",
)


def simplify(graph: Graph) -> Graph:
    """The graph with every rule of this file applied until none fires."""
    return rewrite(graph, SIMPLIFY_RULES)


@rule(*FOLDABLE)
def fold_constants(node: Node) -> Node | None:
    """op(constants...) -> constant, if small and evaluable"""
    if not node.inputs or any(each.op not in ("constant", "iota") for each in node.inputs):
        return None
    if not all(is_static(each) for each in (node, *node.inputs)):
        return None
    size = max(evaluate(product(each.shape), {}) for each in (node, *node.inputs))
    if size * node.dtype.bits > FOLDED_BYTES * 8:
        return None
    try:
        value = evaluate_constant(node)
    except LlmcError:  # an index out of range, say: the step itself must report it
        return None
    return constant(value, node.dtype) if value is not None else None


@rule("add", "mul", "max", "min", "and", "or", "equal")
def constant_to_the_right(node: Node) -> Node | None:
    """c + x -> x + c"""
    left, right = node.inputs
    if uniform_value(left) is None or uniform_value(right) is not None:
        return None
    return with_inputs(node, (right, left))


@rule("add", "sub", "mul", "div", "pow")
def neutral_operand(node: Node) -> Node | None:
    """x + 0, x - 0, x * 1, x / 1, x ** 1 -> x"""
    left, right = node.inputs
    neutral = 0 if node.op in ("add", "sub") else 1
    if uniform_value(right) != neutral or left.type != node.type:
        return None
    return left


@rule("and", "or")
def neutral_truth(node: Node) -> Node | None:
    """x and true -> x, x or false -> x"""
    left, right = node.inputs
    is_neutral = node.dtype.kind == "bool" and uniform_value(right) == (node.op == "and")
    return left if is_neutral and left.type == node.type else None


@rule("neg", "not", "abs", "relu", "floor", "ceil", "round")
def unary_twice(node: Node) -> Node | None:
    """-(-x) -> x, not not x -> x; |(|x|)| -> |x| and the like"""
    inner = node.inputs[0]
    if inner.op != node.op:
        return None
    return inner.inputs[0] if node.op in ("neg", "not") else inner


@rule("add", "sub")
def sum_with_negative(node: Node) -> Node | None:
    """x + -y -> x - y, x - -y -> x + y, -x + y -> y - x"""
    left, right = node.inputs
    if right.op == "neg":
        return make("sub" if node.op == "add" else "add", left, right.inputs[0])
    if node.op == "add" and left.op == "neg":
        return make("sub", right, left.inputs[0])
    return None


@rule("mul", "add")
def constants_together(node: Node) -> Node | None:
    """(x * a) * b -> x * (a * b), (x + a) + b -> x + (a + b)"""
    inner, second = node.inputs
    if inner.op != node.op or not node.dtype.is_float:
        return None
    a, b = uniform_value(inner.inputs[1]), uniform_value(second)
    if a is None or b is None or inner.inputs[0].type != node.type:
        return None
    total = a * b if node.op == "mul" else a + b
    return make(node.op, inner.inputs[0], constant(total, node.dtype))


@rule("mul")
def scale_of_sum(node: Node) -> Node | None:
    """(x * a + b) * c -> x * (a * c) + b * c, for constants a, b, c"""
    inner, scale = node.inputs
    factor = uniform_value(scale)
    if inner.op != "add" or factor is None or inner.type != node.type or not node.dtype.is_float:
        return None
    product_, offset = inner.inputs
    if product_.op != "mul" or None in (uniform_value(product_.inputs[1]), uniform_value(offset)):
        return None
    return make("add", make("mul", product_, scale), make("mul", offset, scale))


@rule("div")
def division_by_power_of_two(node: Node) -> Node | None:
    """x / 2**n -> x * 2**-n (exact)"""
    left, right = node.inputs
    value = uniform_value(right)
    if not node.dtype.is_float or not value or left.type != node.type:
        return None
    if abs(np.frexp(value)[0]) != 0.5 or not 2.0**-14 <= abs(value) <= 2.0**14:
        return None
    return make("mul", left, constant(1.0 / value, node.dtype))


@rule("div", "mul")
def reciprocal_forms(node: Node) -> Node | None:
    """1 / x -> reciprocal(x), x * reciprocal(y) -> x / y"""
    left, right = node.inputs
    if node.op == "div" and uniform_value(left) == 1 and right.type == node.type:
        return make("reciprocal", right) if node.dtype.is_float else None
    if node.op == "mul" and right.op == "reciprocal":
        return make("div", left, right.inputs[0])
    if node.op == "mul" and left.op == "reciprocal":
        return make("div", right, left.inputs[0])
    return None


@rule("reciprocal")
def reciprocal_of_sqrt(node: Node) -> Node | None:
    """reciprocal(sqrt(x)) -> rsqrt(x), reciprocal(reciprocal(x)) stays: it may overflow"""
    inner = node.inputs[0]
    return make("rsqrt", inner.inputs[0]) if inner.op == "sqrt" else None


@rule("div")
def division_by_sqrt(node: Node) -> Node | None:
    """x / sqrt(y) -> x * rsqrt(y)"""
    left, right = node.inputs
    if right.op != "sqrt" or not node.dtype.is_float:
        return None
    return make("mul", left, make("rsqrt", right.inputs[0]))


@rule("pow")
def small_powers(node: Node) -> Node | None:
    """x ** 2 -> x * x, x ** 3 -> (x * x) * x, x ** 0.5 -> sqrt(x), x ** -0.5 -> rsqrt(x)"""
    base, exponent = node.inputs
    power = uniform_value(exponent)
    if base.type != node.type:
        return None
    if power in (2, 3):
        square = make("mul", base, base)
        return square if power == 2 else make("mul", square, base)
    if node.dtype.is_float and power in (0.5, -0.5):
        return make("sqrt" if power == 0.5 else "rsqrt", base)
    return None


def is_lossless(source: DType, target: DType) -> bool:
    """Whether a cast keeps every value apart and unchanged."""
    if source is target or source.kind == "bool":
        return True
    if source.is_float:
        pairs = {"f32": ("f64",), "f16": ("f32", "f64"), "bf16": ("f32", "f64")}
        return target.name in pairs.get(source.name, ())
    if target.is_float:
        return source.bits <= {"f64": 32, "f32": 16}.get(target.name, 0)
    unsigned = source.name.startswith("u")
    if target.is_integer and target.name.startswith("u") == unsigned:
        return target.bits >= source.bits
    return target.is_integer and unsigned and target.bits > source.bits


@rule("cast")
def needless_cast(node: Node) -> Node | None:
    """cast(x, own dtype) -> x, cast(cast(x, a), b) -> cast(x, b) where the inner one is lossless"""
    inner = node.inputs[0]
    if inner.dtype is node.dtype:
        return inner
    if inner.op == "cast" and is_lossless(inner.inputs[0].dtype, inner.dtype):
        return make("cast", inner.inputs[0], dtype=node.dtype)
    return None


@rule("where")
def constant_condition(node: Node) -> Node | None:
    """where(true, a, b) -> a, where(c, a, a) -> a"""
    condition, yes, no = node.inputs
    if yes is no and yes.type == node.type:
        return yes
    value = uniform_value(condition)
    if value is None:
        return None
    chosen = yes if value else no
    return chosen if chosen.type == node.type else make("broadcast", chosen, shape=node.shape)


@rule("not")
def negated_comparison(node: Node) -> Node | None:
    """not (a == b) -> a != b (order comparisons stay: NaN)"""
    opposite = {"equal": "not_equal", "not_equal": "equal"}.get(node.inputs[0].op)
    return make(opposite, *node.inputs[0].inputs) if opposite else None


@rule("add", "sub", "mul", "floor_div", "mod", "max", "min")
def dim_arithmetic(node: Node) -> Node | None:
    """dim(a) + dim(b) -> dim(a + b), and so for the other integer operations"""
    left, right = (scalar_of(each) for each in node.inputs)
    if node.rank or left is None or right is None or not node.dtype.is_integer:
        return None
    if "dim" not in (node.inputs[0].op, node.inputs[1].op):
        return None
    if node.op in ("floor_div", "mod") and not (isinstance(right, int) and right > 0):
        return None
    value = DIM_OPERATIONS[node.op](left, right)
    return make("dim", value=value, dtype=node.dtype)


@rule("cast")
def cast_of_dim(node: Node) -> Node | None:
    """cast(dim(a), integer) -> dim(a)"""
    inner = node.inputs[0]
    if inner.op != "dim" or not node.dtype.is_integer:
        return None
    return make("dim", value=inner["value"], dtype=node.dtype)


@rule("dim")
def known_dim(node: Node) -> Node | None:
    """dim(4) -> constant 4"""
    value = node["value"]
    return constant(value, node.dtype) if isinstance(value, int) else None


@rule(*sorted(ELEMENTWISE))
def broadcast_operand(node: Node) -> Node | None:
    """op(x, broadcast(y)) -> op(x, y), where broadcasting as NumPy does gives the same shape"""
    if len(node.inputs) < 2:
        return None
    for index, each in enumerate(node.inputs):
        if each.op != "broadcast":
            continue
        inputs = (*node.inputs[:index], each.inputs[0], *node.inputs[index + 1:])
        if _broadcast_shape(inputs) == node.shape:
            return with_inputs(node, inputs)
    return None


def _broadcast_shape(inputs: tuple[Node, ...]) -> tuple | None:
    """The NumPy broadcast of the inputs' shapes; None where dims differ and none is 1."""
    rank = max(each.rank for each in inputs)
    shape = []
    for axis in range(rank):
        dims = {each.shape[axis - rank + each.rank] for each in inputs
                if axis - rank + each.rank >= 0} - {1}
        if len(dims) > 1:
            return None
        shape.append(dims.pop() if dims else 1)
    return tuple(shape)


SIMPLIFY_RULES: list[Rule] = [
    fold_constants, constant_to_the_right, neutral_operand, neutral_truth, unary_twice,
    sum_with_negative, constants_together, scale_of_sum, division_by_power_of_two,
    reciprocal_forms, reciprocal_of_sqrt, division_by_sqrt, small_powers, needless_cast,
    constant_condition, negated_comparison, dim_arithmetic, cast_of_dim, known_dim,
    broadcast_operand, *MOVEMENT_RULES,
]
