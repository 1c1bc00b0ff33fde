"""Values of the symbols, from the shapes of the arrays that arrive; everything else is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmc.errors import ShapeError
from llmc.ir.dims import Dim, Symbol, affine, evaluate, parse_dim, symbol
from llmc.ir.dtypes import dtype
from llmc.runtime.artifact import SymbolInfo, TensorInfo


class Tensor:
    """An input or output as the runtime needs it: NumPy dtype and dims."""

    def __init__(self, info: TensorInfo, symbols: Mapping[str, Symbol]):
        self.name = info.name
        self.count = info.count
        self.limit = info.limit
        self.dtype = dtype(info.dtype)
        self.numpy = self.dtype.numpy
        self.shape: tuple[Dim, ...] = tuple(parse_dim(text, symbols) for text in info.shape)
        self.ranges = [[parse_dim(text, symbols) for text in use] for use in info.ranges]

    def concrete_shape(self, values: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(evaluate(dim, values) for dim in self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"


def make_symbols(infos: Sequence[SymbolInfo]) -> dict[str, Symbol]:
    return {info.name: symbol(info.name, info.low, info.high, info.multiple) for info in infos}


def check_inputs(tensors: Sequence[Tensor], arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The arrays in the order of the tensors, contiguous and of the right dtype and rank."""
    expected = {tensor.name for tensor in tensors}
    if missing := expected - set(arrays):
        raise ShapeError(f"missing input {', '.join(sorted(missing))}; the model takes "
                         f"{'; '.join(map(str, tensors))}")
    if unknown := set(arrays) - expected:
        raise ShapeError(f"unknown input {', '.join(sorted(unknown))}; the model takes "
                         f"{'; '.join(map(str, tensors))}")
    return [_check(tensor, np.asarray(arrays[tensor.name])) for tensor in tensors]


def _check(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    if array.ndim != len(tensor.shape):
        raise ShapeError(f"input {tensor} has {len(tensor.shape)} axes, got shape {array.shape}")
    if array.dtype != tensor.numpy:
        if not np.can_cast(array.dtype, tensor.numpy, "same_kind"):
            raise ShapeError(f"input {tensor} cannot take values of type {array.dtype}")
        if tensor.dtype.is_integer and array.size and _overflows(array, tensor.numpy):
            raise ShapeError(f"input {tensor} has values that do not fit {tensor.dtype}")
        array = array.astype(tensor.numpy)
    if tensor.limit and array.size and (array.min() < 0 or array.max() >= tensor.limit):
        wrong = array[(array < 0) | (array >= tensor.limit)].flat[0]
        raise ShapeError(f"input {tensor}: {wrong} is outside 0..{tensor.limit - 1}")
    return np.asarray(array, order="C")  # ascontiguousarray would give scalars an axis


def check_indexes(tensors: Sequence[Tensor], arrays: Sequence[np.ndarray],
                  values: Mapping[str, int]) -> None:
    """ShapeError where an input has indexes that lie outside the axes that they pick from."""
    for tensor, array in zip(tensors, arrays, strict=True):
        if not array.size:
            continue
        for use in tensor.ranges:
            items = array.reshape(-1, len(use))
            for extent, low, high in zip(use, items.min(0), items.max(0), strict=True):
                size = evaluate(extent, values)
                if not -size <= low <= high < size:
                    raise ShapeError(f"input {tensor}: index {low if low < -size else high} is "
                                     f"outside an axis of {size}")


def _overflows(array: np.ndarray, target: np.dtype) -> bool:
    limits = np.iinfo(target)
    return bool(array.min() < limits.min or array.max() > limits.max)


def bind(tensors: Sequence[Tensor], arrays: Sequence[np.ndarray],
         known: Mapping[str, int]) -> dict[str, int]:
    """Values of all symbols; ShapeError names the input and axis that does not fit."""
    values = dict(known)
    for tensor, array in zip(tensors, arrays, strict=True):
        for axis, (dim, size) in enumerate(zip(tensor.shape, array.shape, strict=True)):
            _solve(tensor, axis, dim, size, values)
    for tensor, array in zip(tensors, arrays, strict=True):
        for axis, (dim, size) in enumerate(zip(tensor.shape, array.shape, strict=True)):
            wanted = evaluate(dim, values)
            if wanted != size:
                given = ", ".join(f"{s} = {values[s]}" for s in sorted(values) if s in str(dim))
                why = "" if isinstance(dim, int) else f", which is {dim} with {given}"
                raise ShapeError(f"input {tensor}: axis {axis} has {size}, expected {wanted}{why}")
    return values


def _solve(tensor: Tensor, axis: int, dim: Dim, size: int, values: dict[str, int]) -> None:
    """Bind the symbol of a dim `scale * symbol + constant` that is not bound yet."""
    form = None if isinstance(dim, int) else affine(dim)
    if form is None or len(form[1]) != 1:
        return
    constant, ((unknown, scale),) = form[0], form[1].items()
    if unknown.name in values:
        return
    value, rest = divmod(size - constant, scale)
    high = unknown.high
    if rest or value < unknown.low or (high is not None and value > high):
        raise ShapeError(f"input {tensor}: axis {axis} has {size}, but {unknown.name} must be in "
                         f"{unknown.low}..{high}")
    if value % unknown.multiple:
        raise ShapeError(f"input {tensor}: axis {axis} has {size}, but {unknown.name} must be a "
                         f"multiple of {unknown.multiple}")
    values[unknown.name] = value
