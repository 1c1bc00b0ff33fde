"""Makes graph nodes for converters: broadcasts checked, no-ops skipped, dims unified."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llmc.errors import ModelError
from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.frontend.onnx.symbols import SymbolTable
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType, bool_, from_numpy, i64
from llmc.ir.graph import Node, Origin, origin_of, set_origin
from llmc.ir.ops import make

Shape = Sequence[Dim]


class Builder:
    """Node makers over one symbol table.

    `location` names the ONNX node in errors, `origin` in the nodes that are made.
    """

    def __init__(self, symbols: SymbolTable, location: str, origin: Origin | None = None) -> None:
        self.symbols = symbols
        self.location = location
        self.origin = origin

    def make(self, op: str, *inputs: Node, **attributes: Any) -> Node:
        """A node that remembers which ONNX node it came from (the first, if it is shared)."""
        node = make(op, *inputs, **attributes)
        if self.origin is not None and origin_of(node) is None:
            set_origin(node, self.origin)
        return node

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.location}: {message}")

    def require_equal(self, a: Dim, b: Dim, what: str) -> None:
        """Unifies two dims; ModelError when they cannot be proved equal."""
        if not self.symbols.require_equal(a, b):
            raise self.error(f"{what}: {dims.format_dim(a)} is not {dims.format_dim(b)}")

    # ---- constants ------------------------------------------------------------------------

    def constant(self, array: np.ndarray[Any, Any], dtype: DType | None = None) -> Node:
        """A `constant` node of a NumPy array."""
        dtype = dtype or from_numpy(array.dtype)
        data = np.ascontiguousarray(array, dtype=dtype.numpy).tobytes()
        return self.make("constant", dtype=dtype, shape=tuple(array.shape), data=data)

    def scalar(self, value: float, dtype: DType) -> Node:
        """A rank-0 constant."""
        return self.constant(np.asarray(value).astype(dtype.numpy), dtype)

    def dim(self, value: Dim, dtype: DType = i64) -> Node:
        """A rank-0 tensor holding a dim."""
        if isinstance(value, int):
            return self.scalar(value, dtype)
        return self.make("dim", value=value, dtype=dtype)

    def iota(self, length: Dim, dtype: DType = i64) -> Node:
        """0, 1, 2 ... of that length."""
        return self.make("iota", dtype=dtype, shape=(length,), axis=0)

    def full(self, value: float, shape: Shape, dtype: DType) -> Node:
        return self.broadcast(self.scalar(value, dtype), shape)

    def tensor(self, value: Node | ShapeArray) -> Node:
        """The value as a graph node; shape arithmetic becomes constants, iotas and dims."""
        if isinstance(value, Node):
            return value
        if not isinstance(value, ShapeArray):
            raise self.error("a sequence or an empty optional where a tensor is needed")
        known = value.known()
        if known is None and value.items.size == 1:
            return self.reshape(self.dim(value.flat()[0], value.dtype), value.shape)
        if known is None:
            scalars = [self.reshape(self.dim(item, value.dtype), (1,)) for item in value.flat()]
            return self.reshape(self.concat(scalars, 0), value.shape)
        step = _progression(known)
        if step is None:
            return self.constant(known, value.dtype)
        ramp = self.iota(known.size, value.dtype)
        ramp = self.binary("mul", ramp, self.scalar(step, value.dtype)) if step != 1 else ramp
        start = int(known.reshape(-1)[0])
        ramp = self.binary("add", ramp, self.scalar(start, value.dtype)) if start else ramp
        return self.reshape(ramp, value.shape)

    # ---- elementwise ----------------------------------------------------------------------

    def unary(self, op: str, x: Node, **attributes: Any) -> Node:
        return self.make(op, x, **attributes)

    def binary(self, op: str, a: Node, b: Node) -> Node:
        """An elementwise op of two tensors of one dtype; broadcasts, unifying symbols."""
        if a.dtype is not b.dtype:
            raise self.error(f"operands are {a.dtype} and {b.dtype}")
        self.broadcast_shapes(a.shape, b.shape)
        return self.make(op, a, b)

    def where(self, condition: Node, a: Node, b: Node) -> Node:
        self.broadcast_shapes(condition.shape, a.shape, b.shape)
        return self.make("where", condition, a, b)

    def clamp(self, x: Node, low: Node, high: Node) -> Node:
        return self.make("clamp", x, low, high)

    def cast(self, x: Node, dtype: DType) -> Node:
        return x if x.dtype is dtype else self.make("cast", x, dtype=dtype)

    def scaled(self, x: Node, factor: float) -> Node:
        """x * factor, factor rounded to x's dtype."""
        return self.binary("mul", x, self.scalar(factor, x.dtype))

    def shifted(self, x: Node, offset: float) -> Node:
        """x + offset, offset rounded to x's dtype."""
        return self.binary("add", x, self.scalar(offset, x.dtype))

    def broadcast_shapes(self, *shapes: Shape) -> tuple[Dim, ...]:
        """The shape that all broadcast to; unifies symbols, ModelError where it cannot."""
        rank = max(len(shape) for shape in shapes)
        result: list[Dim] = []
        for axis in range(-rank, 0):
            wanted: Dim = 1
            for shape in shapes:
                dim = shape[axis] if -axis <= len(shape) else 1
                if wanted == 1:
                    wanted = dim
                elif dim != 1:
                    self.require_equal(wanted, dim, f"broadcast of {_shapes(shapes)}")
            result.append(wanted)
        return tuple(result)

    # ---- movement -------------------------------------------------------------------------

    def broadcast(self, x: Node, shape: Shape) -> Node:
        return (
            x if tuple(x.shape) == tuple(shape) else self.make("broadcast", x, shape=tuple(shape))
        )

    def reshape(self, x: Node, shape: Shape) -> Node:
        return x if tuple(x.shape) == tuple(shape) else self.make("reshape", x, shape=tuple(shape))

    def transpose(self, x: Node, permutation: Sequence[int]) -> Node:
        if list(permutation) == list(range(x.rank)):
            return x
        return self.make("transpose", x, permutation=tuple(permutation))

    def swap_last(self, x: Node) -> Node:
        """x with its last two axes exchanged."""
        return self.transpose(x, [*range(x.rank - 2), x.rank - 1, x.rank - 2])

    def unsqueeze(self, x: Node, axes: Iterable[int]) -> Node:
        """x with axes of size 1 at these places of the result."""
        places = sorted(axes)
        shape = list(x.shape)
        for place in places:
            shape.insert(place, 1)
        return self.reshape(x, shape)

    def slice_axis(self, x: Node, axis: int, start: Dim, stop: Dim, step: int = 1) -> Node:
        """x[..., start:stop:step, ...]; the bounds are already inside the axis."""
        return self.slice_axes(x, {axis: (start, stop, step)})

    def slice_axes(self, x: Node, ranges: dict[int, tuple[Dim, Dim, int]]) -> Node:
        """Slices several axes: {axis: (start, stop, step)}."""
        starts: list[Dim] = [0] * x.rank
        stops, steps = list(x.shape), [1] * x.rank
        for axis, (start, stop, step) in ranges.items():
            starts[axis], stops[axis], steps[axis] = start, stop, step
            for room in (start, stop - start, x.shape[axis] - stop):
                self.symbols.require_at_least(room, 0)
        if not any(starts) and tuple(stops) == tuple(x.shape) and set(steps) <= {1}:
            return x
        attributes = {"starts": tuple(starts), "stops": tuple(stops), "steps": tuple(steps)}
        return self.make("slice", x, **attributes)

    def concat(self, parts: Sequence[Node], axis: int) -> Node:
        for part in parts[1:]:
            if part.rank != parts[0].rank:
                raise self.error("concatenates tensors of different ranks")
            for place, (dim, first) in enumerate(zip(part.shape, parts[0].shape, strict=True)):
                if place != axis:
                    self.require_equal(first, dim, f"concat, axis {place}")
        return parts[0] if len(parts) == 1 else self.make("concat", *parts, axis=axis)

    def take(self, x: Node, index: Node, axis: int = 0) -> Node:
        """numpy.take along an axis; ids that a caller gives to look up weights count from 0."""
        lookup = x.op == "parameter" and index.op == "input"
        index = index if lookup else self.from_front(index, x.shape[axis])
        return self.make("gather", x, index, axis=axis)

    def from_front(self, index: Node, extent: Dim) -> Node:
        """The index with negative values, which ONNX counts from the end, made positive."""
        if is_nonnegative(index):
            return index
        negative = self.binary("less", index, self.scalar(0, index.dtype))
        wrapped = self.binary("add", index, self.dim(extent, index.dtype))
        return self.where(negative, wrapped, index)

    def split(self, x: Node, axis: int, sizes: Sequence[Dim]) -> list[Node]:
        """Consecutive parts of an axis; the sizes add up to it."""
        parts: list[Node] = []
        start: Dim = 0
        for size in sizes:
            parts.append(self.slice_axis(x, axis, start, start + size))
            start = start + size
        return parts

    # ---- reductions, matmul ---------------------------------------------------------------

    def reduce(self, op: str, x: Node, axes: Iterable[int], keep: bool = True) -> Node:
        """A reduce_* op over sorted, non-negative axes; x itself for no axes."""
        ordered = tuple(sorted(axes))
        return self.make(op, x, axes=ordered, keep=keep) if ordered else x

    def matmul(self, a: Node, b: Node, dtype: DType | None = None) -> Node:
        """numpy.matmul; unifies the contracted and the batch dims."""
        if a.rank < 1 or b.rank < 1:
            raise self.error("matmul of a scalar")
        inner = b.shape[-2] if b.rank > 1 else b.shape[-1]
        self.require_equal(a.shape[-1], inner, "contracted axes of matmul")
        self.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return self.make("matmul", a, b, dtype=dtype or a.dtype)

    def split_heads(self, x: Node, heads: int) -> Node:
        """[b, s, heads * size] -> [b, heads, s, size]."""
        batch, length, width = x.shape
        shape = (batch, length, heads, self.divide(width, heads))
        return self.transpose(self.reshape(x, shape), (0, 2, 1, 3))

    def merge_heads(self, x: Node) -> Node:
        """[b, heads, s, size] -> [b, s, heads * size]."""
        batch, heads, length, size = x.shape
        return self.reshape(self.transpose(x, (0, 2, 1, 3)), (batch, length, heads * size))

    def divide(self, width: Dim, parts: int) -> Dim:
        """width / parts, which must be exact."""
        if parts < 1 or not dims.known_multiple(width, parts):
            raise self.error(f"{dims.format_dim(width)} is no multiple of {parts}")
        return dims.floordiv(width, parts)

    def axis(self, value: int, rank: int) -> int:
        """An axis counted from either end, as a non-negative one; ModelError outside the rank."""
        if not -rank <= value < rank:
            raise self.error(f"axis {value} of a tensor of rank {rank}")
        return value % rank if rank else 0


SIGN_PRESERVING = frozenset(
    [
        *("add", "mul", "min", "max", "floor_div", "cumsum", "cast", "broadcast", "reshape"),
        *("transpose", "slice", "concat", "gather", "gather_elements", "gather_nd"),
    ]
)


def is_nonnegative(node: Node, depth: int = 12) -> bool:
    """Whether an integer tensor is provably free of negative values."""
    if node.dtype.kind in ("uint", "bool") or node.op in ("iota", "argmax", "argmin"):
        return True
    if node.op == "dim":
        return dims.bounds(node["value"])[0] >= 0
    if node.op == "constant":
        return not (np.frombuffer(node["data"], node.dtype.numpy) < 0).any()
    if node.op not in SIGN_PRESERVING or depth == 0:
        return False
    operands = node.inputs[:1] if node.op.startswith("gather") else node.inputs
    enough = any if node.op == "max" else all
    return enough(is_nonnegative(operand, depth - 1) for operand in operands)


def _shapes(shapes: Iterable[Shape]) -> str:
    return " with ".join(f"[{', '.join(map(dims.format_dim, shape))}]" for shape in shapes)


def _progression(values: np.ndarray[Any, Any]) -> int | None:
    """The step of an arithmetic progression of at least 4 integers along one axis, else None.

    Masks are proved from iotas: positions that were exported as numbers become one again.
    """
    if values.dtype == bool_.numpy or values.size < 4 or max(values.shape) != values.size:
        return None
    steps = np.diff(values.reshape(-1))
    step = int(steps[0])
    return step if step and bool(np.all(steps == step)) else None
