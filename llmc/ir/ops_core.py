"""What the op table is built of: `Op`, `make`, attribute kinds, and helpers for type rules.

`ops.py` fills `OPS`; the `ops_*.py` files hold one group of ops each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from llmc.errors import GraphError, LlmcError
from llmc.ir import dtypes
from llmc.ir.dims import Dim, Expression, evaluate, format_dim, known_equal
from llmc.ir.dtypes import DType
from llmc.ir.graph import Graph, Node, TensorType, Type, format_type, intern_node

Array = Any
Inputs = tuple[Node, ...]
Attributes = dict[str, Any]
Bodies = tuple[Graph, ...]


# ---- evaluation context ------------------------------------------------------------------------


def _no_leaf(node: Node) -> Array:
    raise LlmcError(f"{node.op} node has no value outside an interpreted graph")


def _no_body(body: Graph, operands: Sequence[Array], turn: int) -> list[Array]:
    raise LlmcError("a body cannot run outside an interpreted graph")


@dataclass(frozen=True)
class Context:
    """What a reference evaluation may ask for.

    `exact`: compute and keep floats in f64. `dims`: the values of symbols. `turn`: the turn of the
    enclosing repeat. `read(leaf)`: the array of an input, parameter or state. `run(body, operands,
    turn)`: the outputs of a body.
    """

    exact: bool = False
    dims: Mapping[str, int] = field(default_factory=dict)
    turn: int = 0
    read: Callable[[Node], Array] = _no_leaf
    run: Callable[[Graph, Sequence[Array], int], list[Array]] = _no_body

    def size(self, dim: Dim) -> int:
        return evaluate(dim, self.dims)

    def shape(self, dims: Iterable[Dim]) -> tuple[int, ...]:
        return tuple(evaluate(dim, self.dims) for dim in dims)


def widen(array: Array, dtype: DType, exact: bool = False) -> Array:
    """The array as an op computes with it: floats in f32 (f64 for f64 or exact), 2- and 4-bit
    integers in i32."""
    if dtype.is_float:
        return np.asarray(array).astype(np.float64 if exact or dtype.bits == 64 else np.float32,
                                        copy=False)
    if dtype.is_integer and dtype.bits < 8:
        return np.asarray(array).astype(np.int32, copy=False)
    return np.asarray(array)


def round_to(array: Array, dtype: DType, exact: bool = False) -> Array:
    """The array rounded to the dtype; floats stay f64 in exact mode."""
    if dtype.is_float and exact:
        return np.asarray(array).astype(np.float64, copy=False)
    return np.asarray(array).astype(dtype.numpy, copy=False)


def widened(node: Node, arrays: Sequence[Array], context: Context) -> list[Array]:
    """All operands of the node, as `widen` gives them."""
    pairs = zip(node.inputs, arrays, strict=True)
    return [widen(array, operand.dtype, context.exact) for operand, array in pairs]


# ---- the op ------------------------------------------------------------------------------------

REQUIRED = object()
Kind = Callable[[str, str, Any, Inputs], Any]


@dataclass(frozen=True)
class Attribute:
    """An attribute's kind (checks and canonicalises a value) and default.

    A callable default is given the op's inputs.
    """

    kind: Kind
    default: Any = REQUIRED


@dataclass(frozen=True)
class Op:
    """One op of the closed table.

    `infer(inputs, attributes, bodies)` is the type rule; GraphError with a one-line reason.
    `reference(node, arrays, context)` evaluates with NumPy: computes in f32 (f64 for f64 or exact)
    and rounds to the op's type. `decompose(node)` gives the same value from simpler ops.
    `arity` is the number of inputs: (least, most), most None for any number.
    """

    name: str
    infer: Callable[[Inputs, Attributes, Bodies], Type]
    reference: Callable[[Node, Sequence[Array], Context], Any]
    decompose: Callable[[Node], Node] | None = None
    arity: tuple[int, int | None] = (0, 0)
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


OPS: dict[str, Op] = {}


def make(op: str, /, *inputs: Node, bodies: Iterable[Graph] = (), **attributes: Any) -> Node:
    """The node of this op, its attributes canonicalised and its type inferred.

    Negative axes count from the end of the first input. GraphError: unknown op, wrong number of
    inputs, unknown, missing or bad attribute, operand types that do not fit.
    """
    definition = OPS.get(op)
    if definition is None:
        raise GraphError(f"unknown op {op!r}")
    for each in inputs:
        if not isinstance(each, Node):
            raise GraphError(f"{op}: operand {each!r} is not a node")
    _check_arity(definition, inputs)
    canonical = _canonical_attributes(definition, inputs, attributes)
    graphs = tuple(bodies)
    type = definition.infer(inputs, canonical, graphs)
    return intern_node(op, canonical, inputs, graphs, type)


def _check_arity(op: Op, inputs: Inputs) -> None:
    least, most = op.arity
    if len(inputs) < least or (most is not None and len(inputs) > most):
        wanted = str(least) if least == most else f"{least} to {most or 'any number of'}"
        reject(op.name, f"takes {wanted} inputs, got {len(inputs)}", inputs)


def _canonical_attributes(op: Op, inputs: Inputs, given: Attributes) -> Attributes:
    unknown = given.keys() - op.attributes.keys()
    if unknown:
        known = ", ".join(op.attributes) or "none"
        reject(op.name, f"no attribute '{min(unknown)}' (it has: {known})", inputs)
    canonical = {}
    for name, attribute in op.attributes.items():
        value = given.get(name)
        if value is None:
            if attribute.default is REQUIRED:
                reject(op.name, f"attribute '{name}' is missing", inputs)
            value = attribute.default(inputs) if callable(attribute.default) else attribute.default
        canonical[name] = attribute.kind(op.name, name, value, inputs)
    return canonical


def reject(op: str, reason: str, inputs: Iterable[Node] = ()) -> NoReturn:
    """Raises GraphError: the op, its operand types, and why they do not fit."""
    operands = ", ".join(format_type(each.type) for each in inputs)
    raise GraphError(f"{op}({operands}): {reason}")


# ---- attribute kinds ---------------------------------------------------------------------------


def _bad(op: str, name: str, wanted: str, value: Any) -> NoReturn:
    raise GraphError(f"{op}: attribute '{name}' must be {wanted}, not {value!r}")


def integer(op: str, name: str, value: Any, inputs: Inputs) -> int:
    if isinstance(value, (Expression, bool)) or not hasattr(value, "__index__"):
        _bad(op, name, "an integer", value)
    return operator.index(value)


def number(op: str, name: str, value: Any, inputs: Inputs) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        _bad(op, name, "a number", value)
    return float(value)


def flag(op: str, name: str, value: Any, inputs: Inputs) -> bool:
    if not isinstance(value, (bool, np.bool_)) and value not in (0, 1):
        _bad(op, name, "True or False", value)
    return bool(value)


def text(op: str, name: str, value: Any, inputs: Inputs) -> str:
    if not isinstance(value, str):
        _bad(op, name, "a string", value)
    return value


def texts(op: str, name: str, value: Any, inputs: Inputs) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        _bad(op, name, "a tuple of strings", value)
    return tuple(value)


def choice(*allowed: str) -> Kind:
    """An attribute that is one of these words."""
    def kind(op: str, name: str, value: Any, inputs: Inputs) -> str:
        if value not in allowed:
            _bad(op, name, f"one of {', '.join(allowed)}", value)
        return value

    return kind


def data(op: str, name: str, value: Any, inputs: Inputs) -> bytes:
    if not isinstance(value, bytes):
        _bad(op, name, "bytes", value)
    return value


def numbers(op: str, name: str, value: Any, inputs: Inputs) -> tuple[int | float, ...]:
    if isinstance(value, (str, bytes)) or not all(isinstance(v, (int, float)) for v in value):
        _bad(op, name, "a tuple of numbers", value)
    return tuple(value)


def element_type(op: str, name: str, value: Any, inputs: Inputs) -> DType:
    if not isinstance(value, (str, DType)):
        _bad(op, name, "a dtype", value)
    return dtypes.dtype(value)


def tensor_type(op: str, name: str, value: Any, inputs: Inputs) -> TensorType:
    if not isinstance(value, TensorType):
        _bad(op, name, "a tensor type", value)
    return value


def dim(op: str, name: str, value: Any, inputs: Inputs) -> Dim:
    if isinstance(value, Expression):
        return value
    return integer(op, name, value, inputs)


def dims(op: str, name: str, value: Any, inputs: Inputs) -> tuple[Dim, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        _bad(op, name, "a tuple of dims", value)
    return tuple(dim(op, name, each, inputs) for each in value)


def axis(op: str, name: str, value: Any, inputs: Inputs) -> int:
    """An axis of the first input; canonical: 0 <= axis < rank."""
    index = integer(op, name, value, inputs)
    rank = inputs[0].rank
    if not -rank <= index < rank:
        reject(op, f"{name} {index} is not an axis of a tensor of rank {rank}", inputs)
    return index % rank


def axes(op: str, name: str, value: Any, inputs: Inputs) -> tuple[int, ...]:
    """One axis or several of the first input; canonical: sorted, no doubles."""
    several = value if isinstance(value, Iterable) else (value,)
    found = [axis(op, name, each, inputs) for each in several]
    if len(set(found)) != len(found):
        reject(op, f"an axis occurs twice in {name} {tuple(found)}", inputs)
    return tuple(sorted(found))


# ---- helpers for type rules --------------------------------------------------------------------


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dims are equal for all values of the symbols."""
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b) or known_equal(a, b)


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    return len(a) == len(b) and all(map(same_dim, a, b))


def broadcast_shape(op: str, inputs: Inputs, shapes: Iterable[Sequence[Dim]]) -> tuple[Dim, ...]:
    """NumPy's broadcast of the shapes: two dims fit when equal, or when one is the integer 1."""
    result: tuple[Dim, ...] = ()
    for shape in map(tuple, shapes):
        rank = max(len(result), len(shape))
        left = (1,) * (rank - len(result)) + result
        right = (1,) * (rank - len(shape)) + shape
        result = tuple(_broadcast_dim(op, inputs, a, b) for a, b in zip(left, right, strict=True))
    return result


def _broadcast_dim(op: str, inputs: Inputs, a: Dim, b: Dim) -> Dim:
    if isinstance(b, int) and b == 1:
        return a
    if (isinstance(a, int) and a == 1) or same_dim(a, b):
        return b if isinstance(a, int) and a == 1 else a
    reject(op, f"dims {format_dim(a)} and {format_dim(b)} do not broadcast "
               "(equal dims, or 1, do)", inputs)


def require_broadcast(op: str, inputs: Inputs, shape: Sequence[Dim], to: Sequence[Dim]) -> None:
    """GraphError unless `shape` broadcasts to exactly `to`."""
    result = broadcast_shape(op, inputs, (shape, to))
    if not same_shape(result, to):
        wanted = f"[{', '.join(map(format_dim, to))}]"
        reject(op, f"[{', '.join(map(format_dim, shape))}] does not broadcast to {wanted}", inputs)


def require_same_dim(op: str, inputs: Inputs, what: str, a: Dim, b: Dim) -> None:
    if not same_dim(a, b):
        reject(op, f"{what}: {format_dim(a)} and {format_dim(b)} differ", inputs)


def require_same_dtype(op: str, inputs: Inputs) -> DType:
    """The dtype all inputs share; GraphError if they differ (cast is explicit in the IR)."""
    for other in inputs[1:]:
        if other.dtype is not inputs[0].dtype:
            reject(op, f"operands are {inputs[0].dtype} and {other.dtype}; cast one", inputs)
    return inputs[0].dtype


def require_rank(op: str, inputs: Inputs, index: int, rank: int) -> None:
    if inputs[index].rank != rank:
        reject(op, f"input {index} must have rank {rank}, not {inputs[index].rank}", inputs)


def require_float(op: str, inputs: Inputs, *indices: int) -> None:
    for index in indices or range(len(inputs)):
        if not inputs[index].dtype.is_float:
            reject(op, f"input {index} must be of a float type, not {inputs[index].dtype}", inputs)


def require_integer(op: str, inputs: Inputs, *indices: int) -> None:
    """GraphError unless these inputs are of integer types."""
    for index in indices:
        if not inputs[index].dtype.is_integer:
            reject(op, f"input {index} must be of an integer type, not {inputs[index].dtype}",
                   inputs)


def promote(a: DType, b: DType) -> DType:
    """The dtype that holds both: the wider float or integer; f32 for bf16 with f16."""
    if a is b:
        return a
    if a.is_float != b.is_float:
        return a if a.is_float else b
    if a.bits == b.bits:
        return dtypes.f32 if a.is_float else dtypes.i32
    return a if a.bits > b.bits else b


def compute_dtype(dtype: DType) -> DType:
    """The float type an op computes in: f64 for f64, else f32."""
    return dtypes.f64 if dtype is dtypes.f64 else dtypes.f32
