"""`Tensor`: what a traced function computes with. The op functions are in `trace`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import EllipsisType, FrameType
from typing import Any, NoReturn, Union

import numpy as np

from llmc.errors import GraphError, TraceError
from llmc.ir import dtypes, ops
from llmc.ir.dims import Dim, Expression, ceildiv, floordiv, minimum, product
from llmc.ir.dtypes import DType
from llmc.ir.graph import Node, Origin, origin_of, set_origin

Scalar = int | float | bool | Expression | np.ndarray
Operand = Union["Tensor", Scalar]
Shape = Sequence[Dim]
Key = Union[int, slice, None, EllipsisType, Expression, "Tensor"]

_FRONTEND = os.path.dirname(os.path.abspath(__file__))
_INTERNAL = (
    os.path.join(_FRONTEND, "tensor.py"),
    os.path.join(_FRONTEND, "trace.py"),
    os.path.join(os.path.dirname(_FRONTEND), "ir", ""),
)

# ---- making nodes ------------------------------------------------------------------------------

_module: ContextVar[str | None] = ContextVar("module path", default=None)


@contextmanager
def scope(module: str) -> Iterator[None]:
    """Ops inside are marked as made by this module (`model.layers.0`). Scopes nest: the path is
    relative to the outer scope's, unless it begins with that (`model.layers.0.mlp`)."""
    outer = _module.get()
    relative = outer is not None and not f"{module}.".startswith(f"{outer}.")
    token = _module.set(f"{outer}.{module}" if relative else module)
    try:
        yield
    finally:
        _module.reset(token)


def user_line() -> str:
    """`file:line` of the innermost frame outside the tracer and the IR."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = os.path.abspath(frame.f_code.co_filename)
        if not file.startswith(_INTERNAL):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"


def fail(reason: str) -> NoReturn:
    raise TraceError(f"{user_line()}: {reason}")


def make_node(op: str, *inputs: Node, **attributes: Any) -> Node:
    """A node that knows the user's line and module; TraceError names the line."""
    try:
        node = ops.make(op, *inputs, **attributes)
    except GraphError as error:
        raise TraceError(f"{user_line()}: {error}") from None
    if origin_of(node) is None:
        set_origin(node, Origin(module=_module.get(), line=user_line()))
    return node


def apply(op: str, *operands: Operand, **attributes: Any) -> Tensor:
    """The op over operands of which at least one is a Tensor that gives scalars their dtype."""
    like = next((each for each in operands if isinstance(each, Tensor)), None)
    if like is None:
        fail(f"{op} needs a Tensor")
    return Tensor(make_node(op, *(node_of(each, like.dtype) for each in operands), **attributes))


def node_of(value: Operand, dtype: DType) -> Node:
    """The node of an operand; numbers and dims become constants of this dtype."""
    if isinstance(value, Tensor):
        return value.node
    if isinstance(value, Expression):
        return make_node("dim", value=value, dtype=dtype)
    if isinstance(value, np.ndarray):
        return _constant(value)
    if isinstance(value, (bool, int, float, np.number, np.bool_)):
        if not dtype.is_float and isinstance(value, (float, np.floating)):
            fail(f"the float {value} meets a tensor of {dtype}; cast the tensor")
        return _constant(value, dtype)
    fail(f"{type(value).__name__} {value!r} cannot become a tensor")


def _constant(value: Any, dtype: DType | None = None) -> Node:
    try:
        return ops.constant(value, dtype)
    except (GraphError, ValueError, OverflowError) as error:
        fail(str(error))


# ---- the tensor --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value of the graph being traced: a node with Python's operators."""

    node: Node
    __array_ufunc__ = None  # NumPy leaves `array + tensor` to Tensor

    @property
    def dtype(self) -> DType:
        return self.node.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.node.shape

    @property
    def rank(self) -> int:
        return self.node.rank

    def __repr__(self) -> str:
        return f"Tensor({self.node.op} : {self.node.type})"

    def reshape(self, *shape: Any) -> Tensor:
        """The elements in another shape; one size may be -1."""
        return reshaped(self, _flat(shape))

    def transpose(self, *permutation: Any) -> Tensor:
        """Axes in another order; reversed if none is given."""
        order = _flat(permutation) or tuple(reversed(range(self.rank)))
        return apply("transpose", self, permutation=order)

    def cast(self, dtype: DType | str) -> Tensor:
        """The values in another dtype; the tensor itself if it has it."""
        wanted = dtypes.dtype(dtype)
        return self if self.dtype is wanted else apply("cast", self, dtype=wanted)

    def broadcast(self, *shape: Any) -> Tensor:
        """Repeated along axes of size 1, and new leading ones, to this shape."""
        return apply("broadcast", self, shape=_flat(shape))

    def __add__(self, other: Operand) -> Tensor:
        return apply("add", self, other)

    def __radd__(self, other: Scalar) -> Tensor:  # type: ignore[misc]
        return apply("add", other, self)

    def __sub__(self, other: Operand) -> Tensor:
        return apply("sub", self, other)

    def __rsub__(self, other: Scalar) -> Tensor:  # type: ignore[misc]
        return apply("sub", other, self)

    def __mul__(self, other: Operand) -> Tensor:
        return apply("mul", self, other)

    def __rmul__(self, other: Scalar) -> Tensor:  # type: ignore[misc]
        return apply("mul", other, self)

    def __truediv__(self, other: Operand) -> Tensor:
        return _true_divide(self, other)

    def __rtruediv__(self, other: Scalar) -> Tensor:
        return _true_divide(other, self)

    def __floordiv__(self, other: Operand) -> Tensor:
        return apply("floor_div", self, other)

    def __rfloordiv__(self, other: Scalar) -> Tensor:  # type: ignore[misc]
        return apply("floor_div", other, self)

    def __mod__(self, other: Operand) -> Tensor:
        return apply("mod", self, other)

    def __rmod__(self, other: Scalar) -> Tensor:  # type: ignore[misc]
        return apply("mod", other, self)

    def __pow__(self, other: Operand) -> Tensor:
        return apply("pow", self, other)

    def __rpow__(self, other: Scalar) -> Tensor:
        return apply("pow", other, self)

    def __matmul__(self, other: Operand) -> Tensor:
        return apply("matmul", self, other)

    def __rmatmul__(self, other: Scalar) -> Tensor:
        return apply("matmul", other, self)

    def __neg__(self) -> Tensor:
        return apply("neg", self)

    def __abs__(self) -> Tensor:
        return apply("abs", self)

    def __invert__(self) -> Tensor:
        return apply("not", self)

    def __and__(self, other: Operand) -> Tensor:
        return apply("and", self, other)

    def __rand__(self, other: Scalar) -> Tensor:
        return apply("and", other, self)

    def __or__(self, other: Operand) -> Tensor:
        return apply("or", self, other)

    def __ror__(self, other: Scalar) -> Tensor:
        return apply("or", other, self)

    def __xor__(self, other: Operand) -> Tensor:
        return apply("xor", self, other)

    def __eq__(self, other: Operand) -> Tensor:  # type: ignore[override]
        return apply("equal", self, other)

    def __ne__(self, other: Operand) -> Tensor:  # type: ignore[override]
        return apply("not_equal", self, other)

    __hash__ = object.__hash__

    def __lt__(self, other: Operand) -> Tensor:  # type: ignore[misc]
        return apply("less", self, other)

    def __le__(self, other: Operand) -> Tensor:  # type: ignore[misc]
        return apply("less_equal", self, other)

    def __gt__(self, other: Operand) -> Tensor:  # type: ignore[misc]
        return apply("greater", self, other)

    def __ge__(self, other: Operand) -> Tensor:  # type: ignore[misc]
        return apply("greater_equal", self, other)

    def __getitem__(self, key: Key | tuple[Key, ...]) -> Tensor:
        return _index(self, key if isinstance(key, tuple) else (key,))

    def __bool__(self) -> NoReturn:
        fail("a tensor's value is not known while tracing, so `if`, `while`, `and`, `or` and "
              "`not` cannot ask for it; use trace.where")

    def __int__(self) -> NoReturn:
        fail("a tensor's value is not known while tracing; it cannot become a Python number")

    __float__ = __index__ = __int__

    def __iter__(self) -> NoReturn:
        fail("a tensor cannot be iterated over while tracing; index it")

    def __len__(self) -> NoReturn:
        fail("len() of a tensor may be symbolic; use tensor.shape[0]")

    def __contains__(self, value: object) -> NoReturn:
        fail("`in` asks for a tensor's values, which are not known while tracing")

    def __array__(self, *_: object, **__: object) -> NoReturn:
        fail("a tensor's values are not known while tracing; NumPy cannot read them")


def _flat(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], (tuple, list)) else values


def _true_divide(a: Operand, b: Operand) -> Tensor:
    tensor = a if isinstance(a, Tensor) else b
    if isinstance(tensor, Tensor) and not tensor.dtype.is_float:
        fail(f"`/` of tensors of {tensor.dtype}; use `//` or cast them")
    return apply("div", a, b)


def reshaped(x: Tensor, shape: Shape) -> Tensor:
    """`reshape`, a size of -1 worked out."""
    sizes = tuple(shape)
    if any(isinstance(each, int) and each == -1 for each in sizes):
        known = [each for each in sizes if not (isinstance(each, int) and each == -1)]
        rest = floordiv(product(x.shape), product(known))
        sizes = tuple(rest if isinstance(d, int) and d == -1 else d for d in sizes)
    return apply("reshape", x, shape=sizes)


def _index(x: Tensor, keys: tuple[Key, ...]) -> Tensor:
    """Ints drop an axis, slices keep it, None adds one, one Tensor key gathers along its axis."""
    keys = _without_ellipsis(x, keys)
    starts: list[Dim] = []
    stops: list[Dim] = []
    steps: list[int] = []
    shape: list[Dim] = []
    gathers: list[tuple[int, Tensor]] = []
    for key in keys:
        if key is None:
            shape.append(1)
            continue
        if isinstance(key, Tensor):
            gathers.append((len(shape), key))
            key = slice(None)
        start, stop, step = _interval(key, x.shape[len(starts)])
        starts.append(start)
        stops.append(stop)
        steps.append(step)
        if isinstance(key, slice):
            shape.append(ceildiv(stop - start, abs(step)))
    if len(gathers) > 1:
        fail("only one index may be a tensor; use trace.gather_nd")
    result = x
    if tuple(stops) != x.shape or any(starts) or any(step != 1 for step in steps):
        result = apply("slice", x, starts=starts, stops=stops, steps=steps)
    result = reshaped(result, shape) if tuple(shape) != result.shape else result
    return apply("gather", result, gathers[0][1], axis=gathers[0][0]) if gathers else result


def _without_ellipsis(x: Tensor, keys: tuple[Key, ...]) -> tuple[Key, ...]:
    used = sum(key is not None and key is not Ellipsis for key in keys)
    if used > x.rank:
        fail(f"{used} indices for {x.rank} axes")
    rest = (slice(None),) * (x.rank - used)
    places = [place for place, key in enumerate(keys) if key is Ellipsis]
    if len(places) > 1:
        fail("an index can only have one `...`")
    if not places:
        return (*keys, *rest)
    return (*keys[: places[0]], *rest, *keys[places[0] + 1 :])


def _interval(key: Key, size: Dim) -> tuple[Dim, Dim, int]:
    """(start, stop, step) of an index into an axis; negative integers count from the end."""
    if isinstance(key, slice):
        step = 1 if key.step is None else key.step
        if step == -1 and key.start is None and key.stop is None:
            return 0, size, -1
        if not isinstance(step, int) or step < 1:
            fail(f"step {step!r}: only positive steps, and [::-1], can be traced")
        start = 0 if key.start is None else _position(key.start, size)
        stop = size if key.stop is None else _position(key.stop, size)
        return start, start if _runs_backwards(key.start, key.stop, start, stop) else stop, step
    if isinstance(key, bool) or not (isinstance(key, Expression) or hasattr(key, "__index__")):
        fail(f"{key!r} is no index")
    place: Dim = key if isinstance(key, Expression) else int(key)  # type: ignore[arg-type]
    if isinstance(place, int) and place < 0:
        place = size + place
    if isinstance(place, int) and (place < 0 or (isinstance(size, int) and place >= size)):
        fail(f"index {key} is outside an axis of size {size}")
    return place, place + 1, 1


def _runs_backwards(given_start: Any, given_stop: Any, start: Dim, stop: Dim) -> bool:
    """Whether a slice is empty because its stop lies before its start, as far as ints tell."""
    if isinstance(start, int) and isinstance(stop, int):
        return stop < start
    both = isinstance(given_start, int) and isinstance(given_stop, int)
    return both and (given_start < 0) == (given_stop < 0) and given_stop < given_start


def _position(bound: Any, size: Dim) -> Dim:
    """A slice bound, clipped to the axis as Python does; symbolic bounds must lie in it."""
    if isinstance(bound, Expression):
        return bound
    if isinstance(bound, bool) or not hasattr(bound, "__index__") or isinstance(bound, Tensor):
        fail(f"slice bound {bound!r} is neither an integer nor a dim")
    bound = int(bound)
    if bound >= 0:
        return minimum(bound, size)
    return size + bound if not isinstance(size, int) else max(size + bound, 0)
