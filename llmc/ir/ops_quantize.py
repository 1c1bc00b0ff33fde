"""`quantize`: a matrix as codes, scales and zeros, chosen so that the error is small.

Of each group of consecutive elements x of a row, codes c, scale s and zero z stand for (c - z) * s.
With d = c - z the best scale of given d is sum(x d) / sum(d d), which leaves the squared error
sum(x x) - sum(x d)^2 / sum(d d). Candidates of d are x rounded in steps of various sizes; the one
with the least error is taken. Signed codes have no zeros: their ranges are -8 .. 7 (with the sign
of the scale chosen so that the largest element is -8 steps) and -127 .. 127.

With the second moments H of what the matrix is multiplied by, the error that counts is that of the
products, e H e'. Columns are then rounded one after the other, and those to come make up for the
error so far (Frantar et al., GPTQ, 2023; scales are chosen per group when the group's turn comes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir import dtypes
from llmc.ir.dims import ceildiv
from llmc.ir.dtypes import DType
from llmc.ir.graph import Node, TensorType, Type
from llmc.ir.ops_core import (
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    element_type,
    integer,
    reject,
    require_float,
    require_rank,
    require_same_dim,
)

SCALES = dtypes.bf16  # f32's range; codes are rounded with the scale as it is stored
ZEROS = dtypes.u8
DAMPING = 0.01  # of H's mean diagonal: keeps its inverse tame where few tokens were seen

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


def _infer_quantize(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """matrix[n, k], moments[k, k]? -> codes[n, k], scales[n, ceil(k / group)] and, of unsigned
    codes, zeros like the scales."""
    require_float("quantize", inputs, 0)
    require_rank("quantize", inputs, 0, 2)
    dtype, group = attributes["dtype"], attributes["group"]
    if not dtype.is_integer or dtype.bits not in FACTORS or group < 1:
        reject("quantize", f"no codes of {dtype} in groups of {group}", inputs)
    n, k = inputs[0].shape
    if len(inputs) == 2:
        require_float("quantize", inputs, 1)
        require_rank("quantize", inputs, 1, 2)
        for size in inputs[1].shape:
            require_same_dim("quantize", inputs, "inner dims", size, k)
    scales = (n, ceildiv(k, group))
    parts = (TensorType(dtype, (n, k)), TensorType(SCALES, scales))
    return (*parts, TensorType(ZEROS, scales)) if CodeRange.of(dtype).zeros else parts


def _quantize(node: Node, arrays: Sequence[Array], context: Context) -> tuple[Array, ...]:
    matrix = np.asarray(arrays[0]).astype(np.float32)
    dtype, group = node["dtype"], node["group"]
    if len(arrays) == 2:
        codes, scales, zeros = quantize_with_moments(
            matrix, feedback(np.asarray(arrays[1])), dtype, group, quantize_groups)
    else:
        codes, scales, zeros = quantize_groups(matrix, dtype, group)
    parts = (codes.astype(dtype.numpy), scales, zeros)
    return parts if CodeRange.of(dtype).zeros else parts[:2]


def quantize_groups(matrix: Array, dtype: DType, group: int) -> tuple[Array, Array, Array]:
    """Codes i8 or u8 [n, k], scales bf16 and zeros u8 [n, ceil(k / group)] of f32 [n, k]."""
    n, k = matrix.shape
    own = CodeRange.of(dtype)
    x = padded(matrix, group).reshape(-1, group)
    inverse, low, high = _ranges(x, own)
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


def _ranges(x: Array, own: CodeRange) -> Ranges:
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


# ---- with second moments -----------------------------------------------------------------------

QuantizeGroups = Callable[[Array, DType, int], tuple[Array, Array, Array]]


def quantize_with_moments(matrix: Array, columns: Array, dtype: DType, group: int,
                          of_groups: QuantizeGroups) -> tuple[Array, Array, Array]:
    """As quantize_groups, least in e H e' (columns: `feedback` of H); of_groups chooses the scales
    of a group of columns."""
    n, k = matrix.shape
    own = CodeRange.of(dtype)
    wanted = matrix.astype(np.float32).T.copy()
    codes = np.empty((k, n), np.uint8 if own.zeros else np.int8)
    errors = np.empty_like(wanted)
    scales, zeros = [], []
    for start in range(0, k, group):
        here = slice(start, min(start + group, k))
        target = wanted[here] + columns[:start, here].T @ errors[:start]
        _, scale, zero = of_groups(np.ascontiguousarray(target.T), dtype, group)
        scales.append(scale[:, 0])
        zeros.append(zero[:, 0])
        rounded = _round_columns(target, codes[here], (scale[:, 0], zero[:, 0]), wanted[here],
                                 columns[here, here], own)
        errors[here] = wanted[here] - rounded
    return codes.T, np.stack(scales, 1), np.stack(zeros, 1)


def _round_columns(target: Array, codes: Array, scale_and_zero: tuple[Array, Array], wanted: Array,
                   columns: Array, own: CodeRange) -> Array:
    """A group's columns (here rows [size, n]) as they are when each in turn is rounded and makes up
    for the errors of those before it; fills codes."""
    scale, shift = (each.astype(np.float32) for each in scale_and_zero)
    inverse = inverse_of(scale)
    low = -shift if own.zeros else np.float32(own.low)
    rounded = np.empty_like(target)
    for j in range(len(target)):
        d = np.clip(np.rint(target[j] * inverse), low, low + own.steps)
        codes[j] = d + shift
        rounded[j] = d * scale
        target[j + 1:] += np.outer(columns[j, j + 1:], wanted[j] - rounded[j])
    return rounded


def feedback(moments: Array) -> Array:
    """f32 [k, k]: column j says what share of each earlier column's error column j makes up for.

    With H = (F + 1) D (F + 1)', F strictly upper triangular and D diagonal, it is F: the error of
    products is then that of independent columns (Chee et al., QuIP, 2023, whose LDLQ gives the
    codes of GPTQ without an inverse).
    """
    wide = moments.astype(np.float64)
    mean = float(np.diag(wide).mean()) if len(wide) else 0.0
    wide = wide + np.eye(len(wide)) * (DAMPING * mean if mean > 0 else 1.0)
    upper = np.linalg.cholesky(wide[::-1, ::-1])[::-1, ::-1]
    return np.triu(upper / np.diag(upper), 1).astype(np.float32)


TABLE = [
    Op("quantize", _infer_quantize, _quantize, arity=(1, 2),
       attributes={"dtype": Attribute(element_type), "group": Attribute(integer)}),
]
