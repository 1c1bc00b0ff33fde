"""Compile-time integer arrays whose items are dims: the values of exported shape arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType, bool_, i64

LIMIT = 256  # items; a larger array is a tensor, not a shape


@dataclass(frozen=True, eq=False)
class ShapeArray:
    """`items` is an object array of dims (bools for dtype bool), `dtype` the ONNX tensor's."""

    items: np.ndarray[Any, Any]
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.items.shape

    def flat(self) -> list[Dim]:
        """The items in row-major order."""
        return list(self.items.reshape(-1))

    def known(self) -> np.ndarray[Any, Any] | None:
        """The values as a NumPy array of the dtype, or None where one is not constant."""
        if any(isinstance(item, dims.Expression) for item in self.flat()):
            return None
        return self.items.astype(self.dtype.numpy)


def from_items(items: Iterable[Any], dtype: DType = i64) -> ShapeArray:
    """A one-dimensional ShapeArray."""
    listed = list(items)
    array = np.empty(len(listed), dtype=object)
    array[:] = listed
    return ShapeArray(array, dtype)


def scalar(item: Any, dtype: DType = i64) -> ShapeArray:
    return ShapeArray(object_array(item), dtype)


def from_numpy(array: np.ndarray[Any, Any], dtype: DType) -> ShapeArray:
    """A ShapeArray of known values: Python ints or bools inside."""
    return ShapeArray(object_array(array.tolist(), array.shape), dtype)


def object_array(items: Any, shape: tuple[int, ...] = ()) -> np.ndarray[Any, Any]:
    """An object array of that shape from (nested lists of) items; numpy never looks inside dims."""
    array = np.empty(shape, dtype=object)
    if shape:
        flat: Any = items
        for _ in shape[1:]:
            flat = [each for row in flat for each in row]
        array.reshape(-1)[:] = flat
    else:
        array[()] = items
    return array


def small_extents(shape: Sequence[Dim]) -> tuple[int, ...] | None:
    """The shape if it is constant and has at most LIMIT items, else None."""
    extents = tuple(dim for dim in shape if isinstance(dim, int))
    constant = len(extents) == len(tuple(shape)) and min(extents, default=0) >= 0
    return extents if constant and math.prod(extents) <= LIMIT else None


def fold(
    function: Callable[..., Any], operands: list[ShapeArray], dtype: DType | None = None
) -> ShapeArray | None:
    """`function` on every tuple of broadcast items.

    None where an item cannot be decided at compile time (function returns None) or the result
    would have more than LIMIT items. `dtype` defaults to the first operand's.
    """
    shape = np.broadcast_shapes(*(operand.shape for operand in operands))
    if np.prod(shape, dtype=int) > LIMIT:
        return None
    result = np.empty(shape, dtype=object)
    columns = [np.broadcast_to(operand.items, shape).reshape(-1) for operand in operands]
    for index, items in enumerate(zip(*columns, strict=True)):
        item = function(*items)
        if item is None:
            return None
        result.reshape(-1)[index] = item
    return ShapeArray(result, dtype or operands[0].dtype)


# ---- scalar functions on dims; None: not decidable ----------------------------------------------


def equal(a: Any, b: Any) -> bool | None:
    """Whether two dims are equal."""
    if dims.known_equal(a, b):
        return True
    low, high = dims.bounds(a - b)
    return False if low > 0 or (high is not None and high < 0) else None


def less(a: Any, b: Any) -> bool | None:
    """Whether a < b."""
    if dims.known_at_least(b, a + 1):
        return True
    return False if dims.known_at_least(a, b) else None


def less_equal(a: Any, b: Any) -> bool | None:
    """Whether a <= b."""
    return less(a, b + 1)


def negated(function: Callable[[Any, Any], bool | None]) -> Callable[[Any, Any], bool | None]:
    """not function(a, b), undecidable where function is."""

    def result(a: Any, b: Any) -> bool | None:
        decided = function(a, b)
        return None if decided is None else not decided

    return result


def truncating_divide(a: Any, b: Any) -> Dim | None:
    """a / b rounded towards zero, as ONNX divides integers."""
    if isinstance(a, int) and isinstance(b, int):
        if b == 0:
            return None
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    if dims.known_at_least(a, 0) and dims.known_at_least(b, 1):
        return a // b
    return None


def modulo(a: Any, b: Any) -> Dim | None:
    """a % b with the sign of b."""
    return None if b == 0 else a % b


def power(a: Any, b: Any) -> Dim | None:
    """a ** b for a small constant b."""
    return dims.product([a] * b) if isinstance(b, int) and 0 <= b <= 8 else None


def where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


def is_shape_dtype(dtype: DType) -> bool:
    """Whether constants of this dtype are read at compile time."""
    return dtype.name in ("i64", "i32", bool_.name)
