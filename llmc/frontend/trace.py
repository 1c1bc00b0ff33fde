"""Plain Python functions over tensors become graphs.

    def swiglu(x, gate, up):
        return trace.silu(x @ gate) * (x @ up)

    graph = trace.trace(swiglu, Spec("x", "f32", (symbol("tokens"), 64)), ...)

Every op of the table has a function here; Python scalars and dims take the dtype of the tensor
they meet. Control flow on values cannot be traced: TraceError names the user's line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from llmc.errors import GraphError, TraceError
from llmc.frontend.tensor import (
    Operand,
    Shape,
    Tensor,
    apply,
    fail,
    make_node,
    node_of,
    scope,
)
from llmc.ir import dtypes, ops
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType
from llmc.ir.graph import Graph, Node, TensorType

__all__ = ["Spec", "Tensor", "scope", "trace"]  # and a function for every op

Axes = int | Sequence[int]


# ---- tracing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """An input of a traced function: `Spec("ids", "i32", (tokens,))`."""

    name: str
    dtype: DType | str
    shape: Shape


@dataclass
class _Trace:
    updates: dict[Node, Node] = field(default_factory=dict)


_current: ContextVar[_Trace | None] = ContextVar("current trace", default=None)


def trace(function: Callable[..., Any], *specs: Spec) -> Graph:
    """The graph of a function that takes one Tensor per spec.

    It returns a Tensor (the output `output`), a tuple of them (`output0` ...) or a dict by name.
    TraceError: Python code that cannot become a graph, operands that do not fit; names the line.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise TraceError(f"two inputs have one name: {', '.join(names)}")
    inputs = [_leaf("input", spec.name, spec.dtype, spec.shape) for spec in specs]
    current = _Trace()
    token = _current.set(current)
    try:
        result = function(*inputs)
    finally:
        _current.reset(token)
    name = getattr(function, "__name__", "")
    graph = Graph(
        name if name.isidentifier() else "graph",
        tuple(each.node for each in inputs),
        _outputs(result),
        tuple(current.updates.items()),
    )
    for node in graph.nodes():
        if node.op == "input" and node not in graph.inputs:
            raise TraceError(f"'{node['name']}' is an input of another traced function")
    return graph


def _outputs(result: Any) -> tuple[tuple[str, Node], ...]:
    if isinstance(result, Tensor):
        named = {"output": result}
    elif isinstance(result, Mapping):
        named = dict(result)
    elif isinstance(result, (tuple, list)):
        named = {f"output{index}": each for index, each in enumerate(result)}
    else:
        named = {"output": result}
    for name, each in named.items():
        if not isinstance(each, Tensor):
            raise TraceError(f"the function's result '{name}' is a {type(each).__name__}, "
                             "not a Tensor")
    if not named:
        raise TraceError("the function returns nothing")
    return tuple((str(name), each.node) for name, each in named.items())


# ---- leaves ------------------------------------------------------------------------------------


def _leaf(op: str, name: str, dtype: DType | str, shape: Shape, **attributes: Any) -> Tensor:
    try:
        type = TensorType(dtypes.dtype(dtype), tuple(shape))
    except GraphError as error:
        fail(f"{op} '{name}': {error}")
    return Tensor(make_node(op, name=name, type=type, **attributes))


def parameter(name: str, dtype: DType | str, shape: Shape) -> Tensor:
    """A named weight."""
    return _leaf("parameter", name, dtype, shape)


def state(
    name: str, dtype: DType | str, shape: Shape, kind: str = "paged", group: str = "full"
) -> Tensor:
    """A tensor that lives from step to step; `update` gives its next value."""
    return _leaf("state", name, dtype, shape, kind=kind, group=group)


def update(state: Tensor, new: Tensor) -> None:
    """Makes `new` the state's value after the step; once for each state."""
    current = _current.get()
    if current is None:
        fail("update() outside a traced function")
    if state.node.op != "state":
        fail("update() of a tensor that is no state")
    if state.node in current.updates:
        fail(f"state '{state.node['name']}' is updated twice")
    if state.node.type != new.node.type:
        fail(f"state '{state.node['name']}' is {state.node.type}, its new value {new.node.type}")
    current.updates[state.node] = new.node


def constant(value: Any, dtype: DType | str | None = None) -> Tensor:
    """An array or scalar of at most 64 KiB (floats f32, ints i64 unless `dtype` says)."""
    try:
        return Tensor(ops.constant(value, dtype))
    except (GraphError, ValueError, OverflowError) as error:
        fail(str(error))


def iota(dtype: DType | str, shape: Shape, axis: int = 0) -> Tensor:
    """Each element's index along the axis."""
    return Tensor(make_node("iota", dtype=dtype, shape=tuple(shape), axis=axis % len(shape)))


def dim(value: Dim, dtype: DType | str = "i64") -> Tensor:
    """A dim as a scalar tensor."""
    return Tensor(make_node("dim", value=value, dtype=dtype))


# ---- elementwise -------------------------------------------------------------------------------


def _function(op: str, doc: str) -> Callable[..., Tensor]:
    def function(*operands: Operand) -> Tensor:
        return apply(op, *operands)

    function.__name__ = function.__qualname__ = op
    function.__doc__ = doc
    return function


neg = _function("neg", "-x")
abs = _function("abs", "|x|")
sign = _function("sign", "-1, 0 or 1")
exp = _function("exp", "e ** x")
log = _function("log", "the natural logarithm")
sqrt = _function("sqrt", "the square root")
rsqrt = _function("rsqrt", "1 / sqrt(x)")
reciprocal = _function("reciprocal", "1 / x")
sin = _function("sin", "the sine")
cos = _function("cos", "the cosine")
atan = _function("atan", "the inverse of the tangent")
tanh = _function("tanh", "the hyperbolic tangent")
erf = _function("erf", "the error function")
floor = _function("floor", "the integer below")
ceil = _function("ceil", "the integer above")
round = _function("round", "the nearest integer, halves to even")
is_nan = _function("is_nan", "bool: whether x is NaN")
relu = _function("relu", "max(x, 0)")
sigmoid = _function("sigmoid", "1 / (1 + exp(-x))")
silu = _function("silu", "x * sigmoid(x)")
softplus = _function("softplus", "log(1 + exp(x))")
not_ = _function("not", "logical for bool, bitwise for integers")
and_ = _function("and", "logical for bool, bitwise for integers")
or_ = _function("or", "logical for bool, bitwise for integers")
xor = _function("xor", "logical for bool, bitwise for integers")
shift_left = _function("shift_left", "a * 2 ** b, without the bits that fall off")
shift_right = _function("shift_right", "floor(a / 2 ** b)")
add = _function("add", "a + b")
sub = _function("sub", "a - b")
mul = _function("mul", "a * b")
div = _function("div", "a / b; integers truncate toward zero")
floor_div = _function("floor_div", "floor(a / b)")
mod = _function("mod", "a - floor(a / b) * b")
pow = _function("pow", "a ** b")
max = _function("max", "the greater; NaN if either is")
min = _function("min", "the lesser; NaN if either is")
equal = _function("equal", "bool: a == b")
not_equal = _function("not_equal", "bool: a != b")
less = _function("less", "bool: a < b")
less_equal = _function("less_equal", "bool: a <= b")
greater = _function("greater", "bool: a > b")
greater_equal = _function("greater_equal", "bool: a >= b")
clamp = _function("clamp", "min(max(x, low), high)")


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x * normal_cdf(x), by erf or by the "tanh" approximation."""
    return apply("gelu", x, approximate=approximate)


def where(condition: Tensor, a: Operand, b: Operand) -> Tensor:
    """a where the condition is true, else b."""
    like = a if isinstance(a, Tensor) else b
    dtype = like.dtype if isinstance(like, Tensor) else constant(a).dtype
    return Tensor(make_node("where", condition.node, node_of(a, dtype), node_of(b, dtype)))


def cast(x: Tensor, dtype: DType | str) -> Tensor:
    """x in another dtype; x itself if it has it."""
    return x.cast(dtype)


def bitcast(x: Tensor, dtype: DType | str) -> Tensor:
    """The same bits read as another dtype of the same size."""
    return apply("bitcast", x, dtype=dtype)


# ---- movement ----------------------------------------------------------------------------------


def broadcast(x: Tensor, shape: Shape) -> Tensor:
    """x repeated along its axes of size 1, and new leading ones, to this shape."""
    return apply("broadcast", x, shape=tuple(shape))


def reshape(x: Tensor, shape: Shape) -> Tensor:
    """The elements in another shape; one size may be -1."""
    return x.reshape(*shape)


def transpose(x: Tensor, permutation: Sequence[int]) -> Tensor:
    """Axis i of the result is axis permutation[i] of x."""
    return apply("transpose", x, permutation=tuple(permutation))


def slice(x: Tensor, starts: Shape, stops: Shape, steps: Sequence[int] | None = None) -> Tensor:
    """start <= i < stop along each axis, every step-th; step -1 reads the interval backwards."""
    return apply("slice", x, starts=tuple(starts), stops=tuple(stops),
                  steps=None if steps is None else tuple(steps))


def concat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """The tensors one after another along the axis."""
    return apply("concat", *tensors, axis=axis)


def pad(x: Tensor, value: Operand, low: Shape, high: Shape) -> Tensor:
    """x with `low` and `high` elements of the scalar before and after, along each axis."""
    return apply("pad", x, value, low=tuple(low), high=tuple(high))


def gather(x: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    """numpy.take: x[:axis] + index.shape + x[axis + 1:]; indices in 0..size-1."""
    return apply("gather", x, index, axis=axis)


def gather_elements(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x[.., index[.., i, ..], ..]: one element for each index (numpy.take_along_axis)."""
    return apply("gather_elements", x, index, axis=axis)


def gather_nd(x: Tensor, index: Tensor, batch_dims: int = 0) -> Tensor:
    """Slices of x that the vectors along the index's last axis address."""
    return apply("gather_nd", x, index, batch_dims=batch_dims)


def scatter_nd(x: Tensor, index: Tensor, updates: Tensor, reduction: str = "none") -> Tensor:
    """x with slices written (or added ...) where `gather_nd` would read them."""
    return apply("scatter_nd", x, index, updates, reduction=reduction)


def scatter_elements(
    x: Tensor, index: Tensor, updates: Tensor, axis: int, reduction: str = "none"
) -> Tensor:
    """x with elements written (or added ...) where `gather_elements` would read them."""
    return apply("scatter_elements", x, index, updates, axis=axis, reduction=reduction)


# ---- reductions and norms ----------------------------------------------------------------------


def _all_axes(x: Tensor, axes: Axes | None) -> Axes:
    return tuple(range(x.rank)) if axes is None else axes


def reduce_sum(x: Tensor, axes: Axes | None = None, keep: bool = False) -> Tensor:
    """The sum over the axes (all, if none is given)."""
    return apply("reduce_sum", x, axes=_all_axes(x, axes), keep=keep)


def reduce_mean(x: Tensor, axes: Axes | None = None, keep: bool = False) -> Tensor:
    """The mean over the axes."""
    return apply("reduce_mean", x, axes=_all_axes(x, axes), keep=keep)


def reduce_max(x: Tensor, axes: Axes | None = None, keep: bool = False) -> Tensor:
    """The greatest over the axes."""
    return apply("reduce_max", x, axes=_all_axes(x, axes), keep=keep)


def reduce_min(x: Tensor, axes: Axes | None = None, keep: bool = False) -> Tensor:
    """The least over the axes."""
    return apply("reduce_min", x, axes=_all_axes(x, axes), keep=keep)


def reduce_prod(x: Tensor, axes: Axes | None = None, keep: bool = False) -> Tensor:
    """The product over the axes."""
    return apply("reduce_prod", x, axes=_all_axes(x, axes), keep=keep)


def argmax(x: Tensor, axis: int = -1, keep: bool = False, last: bool = False) -> Tensor:
    """i64: where the greatest value is first (or last) found along the axis."""
    return apply("argmax", x, axis=axis, keep=keep, last=last)


def argmin(x: Tensor, axis: int = -1, keep: bool = False, last: bool = False) -> Tensor:
    """i64: where the least value is first (or last) found along the axis."""
    return apply("argmin", x, axis=axis, keep=keep, last=last)


def cumsum(x: Tensor, axis: int, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Sums of all elements up to each (without itself if exclusive; from the end if reverse)."""
    return apply("cumsum", x, axis=axis, exclusive=exclusive, reverse=reverse)


def cumprod(x: Tensor, axis: int, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Products of all elements up to each (as cumsum)."""
    return apply("cumprod", x, axis=axis, exclusive=exclusive, reverse=reverse)


def top_k(x: Tensor, k: Dim, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The k greatest values, greatest first, and their i64 indices."""
    both = apply("top_k", x, k=k, axis=axis).node
    return Tensor(make_node("get", both, index=0)), Tensor(make_node("get", both, index=1))


def group_rows(numbers: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, place, starts), i32: rows sorted by their group's number, where each row went, and
    where each group starts (at last: the end)."""
    found = apply("group_rows", numbers, groups=groups).node
    order, place, starts = (Tensor(make_node("get", found, index=index)) for index in range(3))
    return order, place, starts


def grouped_matmul(x: Tensor, w: Tensor, starts: Tensor, groups: int, parts: int = 1) -> Tensor:
    """Row r of group g of x [r, k] times columns n of each part's g-th block of
    w [k, parts * groups * n]: [r, parts * n]."""
    return apply("grouped_matmul", x, w, starts, groups=groups, parts=parts)


def routed_experts(
    x: Tensor,
    numbers: Tensor,
    scores: Tensor,
    gates: Tensor,
    ups: Tensor,
    downs: Tensor,
    *,
    experts: int,
    activation: str,
) -> Tensor:
    """x [t, h] through the chosen experts: the sum over c of scores [t, c] * down(activation(
    gate(x)) * up(x)), with gates and ups [e * i, h], downs [e * h, i] of expert numbers [t, c]."""
    return apply("routed_experts", x, numbers, scores, gates, ups, downs, experts=experts,
                 activation=activation)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along the axis."""
    return apply("softmax", x, axis=axis)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x * x) + epsilon) * weight along the last axis, rounded once."""
    return apply("rms_norm", x, weight, epsilon=epsilon)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias along the last axis."""
    return apply("layer_norm", x, weight, bias, epsilon=epsilon)


# ---- matmul and attention ----------------------------------------------------------------------


def matmul(a: Tensor, b: Tensor, dtype: DType | str | None = None) -> Tensor:
    """numpy.matmul, accumulated in f32 (or wider); `dtype` is the result's."""
    return apply("matmul", a, b, dtype=dtype)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group: int,
    dtype: DType | str | None = None,
) -> Tensor:
    """(codes - zeros) * scales; `group` codes along the last axis share a scale and a zero."""
    operands = (codes, scales) if zeros is None else (codes, scales, zeros)
    return apply("dequantize", *operands, group=group, dtype=dtype)


def quantize(
    matrix: Tensor, moments: Tensor | None = None, *, dtype: DType | str, group: int
) -> tuple[Tensor, ...]:
    """Codes and scales (and, of unsigned codes, zeros) of a matrix of parameters [n, k], as
    `dequantize` takes them; moments [k, k] of what it is multiplied by say which errors count."""
    operands = (matrix,) if moments is None else (matrix, moments)
    whole = apply("quantize", *operands, dtype=dtype, group=group).node
    assert isinstance(whole.type, tuple)
    return tuple(Tensor(make_node("get", whole, index=index)) for index in range(len(whole.type)))


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [.., heads, size] with the first 2r of each head rotated by cos and sin [.., r]."""
    return apply("rope", x, cos, sin, interleaved=interleaved)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """q [b, h, s, d] over k, v [b, g, t, d]; the mask is bool or added. scale: 1 / sqrt(d)."""
    operands = (q, k, v) if mask is None else (q, k, v, mask)
    return apply("attention", *operands, scale=scale, causal=causal, window=window,
                  softcap=softcap)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """q, k, v [tokens, heads, d]: each token attends within its sequence (offsets[i]..), to the
    first lengths[i] tokens of it (all, if not given)."""
    operands = (q, k, v, offsets) if lengths is None else (q, k, v, offsets, lengths)
    return apply("packed_attention", *operands, scale=scale, causal=causal, window=window,
                  softcap=softcap)


def cache_append(
    state: Tensor, values: Tensor, page_table: Tensor, sequence: Tensor, positions: Tensor
) -> Tensor:
    """The paged state with values [tokens, g, d] written at each token's position."""
    return apply("cache_append", state, values, page_table, sequence, positions)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    sequence: Tensor,
    positions: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """q [tokens, h, d] over the paged states k and v: a token sees its sequence up to itself."""
    return apply("paged_attention", q, k, v, page_table, sequence, positions, offsets,
                  scale=scale, window=window, softcap=softcap)


# ---- recurrences -------------------------------------------------------------------------------


def _both(op: str, *operands: Tensor | None, **attributes: Any) -> tuple[Tensor, Tensor]:
    """The two results of an op; operands that are None are left out."""
    both = apply(op, *(each for each in operands if each is not None), **attributes).node
    return Tensor(make_node("get", both, index=0)), Tensor(make_node("get", both, index=1))


def linear_attention(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    rule: str = "gated",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [b, s, h, e], new state) of state [b, h, d, e], q, k [b, s, h, d], v [b, s, h, e]."""
    return _both("linear_attention", state, q, k, v, decay, beta, rule=rule, scale=scale)


def slot_linear_attention(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    offsets: Tensor,
    positions: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    rule: str = "gated",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [tokens, h, e], new state) of packed tokens; each sequence has its slot of the state."""
    return _both("slot_linear_attention", state, q, k, v, slots, offsets, positions, decay, beta,
                 rule=rule, scale=scale)


def slot_conv(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    offsets: Tensor,
    positions: Tensor,
    sequence: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """(y [tokens, c], new state): x's channels, each over its sequence's last tokens."""
    return _both("slot_conv", state, x, weight, slots, offsets, positions, sequence, bias,
                 activation=activation)
