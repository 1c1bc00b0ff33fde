"""A matrix in groups of codes: what codes can say, and the scales that lose least.

Of each group of consecutive elements x of a row, codes c, scale s and zero z stand for (c - z) * s.
With d = c - z the best scale of given d is sum(x d) / sum(d d), which leaves the squared error
sum(x x) - sum(x d)^2 / sum(d d). Candidates of d are x rounded in steps of various sizes; the one
with the least error is taken. Signed codes have no zeros: their ranges are -8 .. 7 (with the sign
of the scale chosen so that the largest element is -8 steps) and -127 .. 127.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.ir import dtypes
from llmc.ir.dtypes import DType

Array = np.ndarray

SCALES = dtypes.bf16  # f32's range; codes are rounded with the scale as it is stored
ZEROS = dtypes.u8

# Steps per unit that are tried, relative to what makes the whole range fit. Of normal and Student's
# t (4) elements, four times as many over twice the range lower the error by less than 0.3 %.
FACTORS = {4: np.linspace(0.84, 1.16, 9, dtype=np.float32), 8: np.ones(1, np.float32)}


@dataclass(frozen=True)
class CodeRange:
    """What codes of a dtype can say: `zeros` whether they have zero points, `steps` from the lowest
    code to the highest, `low` the lowest without zeros."""

    zeros: bool
    steps: int
    low: int

    @classmethod
    def of(cls, dtype: DType) -> CodeRange:
        """The range of i4, i8 (symmetric), u4 or u8."""
        if dtype.kind != "int":
            return cls(True, (1 << dtype.bits) - 1, 0)
        if dtype.bits == 8:
            return cls(False, 254, -127)
        return cls(False, (1 << dtype.bits) - 1, -1 << (dtype.bits - 1))


Ranges = tuple[Array, Array, Array]  # of each group: steps per unit, lowest and highest c - z


def quantize_groups(matrix: Array, dtype: DType, group: int) -> tuple[Array, Array, Array]:
    """Codes i8 or u8 [n, k], scales bf16 and zeros u8 [n, ceil(k / group)] of f32 [n, k]."""
    n, k = matrix.shape
    own = CodeRange.of(dtype)
    x = padded(matrix, group).reshape(-1, group)
    inverse, low, high = ranges(x, own)
    best = np.full(len(x), -1, np.float32)
    scale = np.zeros(len(x), np.float32)
    for factor in FACTORS[dtype.bits]:
        d = _rounded(x, inverse * factor, low, high)
        products, squares = (x * d).sum(1), (d * d).sum(1)
        fitted = products / np.where(squares == 0, 1, squares)
        better = products * fitted > best
        best[better], scale[better] = (products * fitted)[better], fitted[better]
    stored = scale.astype(SCALES.numpy)
    d = _rounded(x, inverse_of(stored.astype(np.float32)), low, high)
    zeros = -low if own.zeros else np.zeros_like(low)
    codes = (d + zeros[:, None]).astype(np.uint8 if own.zeros else np.int8)
    groups = -(-k // group)
    return (codes.reshape(n, groups * group)[:, :k], stored.reshape(n, groups),
            zeros.astype(np.uint8).reshape(n, groups))


def ranges(x: Array, own: CodeRange) -> Ranges:
    """Of groups x [count, group]: steps per unit that make the whole range fit, and the ends."""
    low, high = x.min(1), x.max(1)
    if own.zeros:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        inverse = inverse_of((high - low) / np.float32(own.steps))
        zero = np.rint(-low * inverse)
        return inverse, -zero, own.steps - zero
    largest = np.where(-low > high, low, high)
    inverse = inverse_of(largest / np.float32(own.low))
    ends = np.full(len(x), own.low, np.float32)
    return inverse, ends, ends + own.steps


def inverse_of(values: Array) -> Array:
    """1 / values in f32; 0 for 0 and for what has no finite inverse."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.float32(1) / values
    return np.where(np.isfinite(inverse), inverse, np.float32(0)).astype(np.float32)


def _rounded(x: Array, inverse: Array, low: Array, high: Array) -> Array:
    return np.clip(np.rint(x * inverse[:, None]), low[:, None], high[:, None])


def padded(matrix: Array, group: int) -> Array:
    """The matrix with zeros behind each row up to a whole number of groups."""
    rest = -matrix.shape[1] % group
    return np.pad(matrix, ((0, 0), (0, rest))) if rest else matrix
