"""Codes of a matrix that lose least of its products, given what it is multiplied by.

With the second moments H = mean x x' of what comes in, the error that counts is that of products,
the sum over rows e of the matrix's error of e H e'. First columns are rounded one after the other,
and those to come make up for the error so far (Frantar et al., GPTQ, 2023; a group's scales are
chosen when its turn comes). Then, in a sweep or two over the groups, each scale becomes the best
one for its codes, and each code the best one for all others as they are: e H e' only falls.

Rows do not know of each other. Arrays have the columns of the matrix as their rows here, [k, n]:
what is done to a column is done element by element along n. `llmc.quantizer` has the same compiled.

Matrices of more than `WIDEST` columns are taken apart: what columns that far from each other have
in common is left out, which keeps memory, and work that grows with k^3, within bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmc.ir.dtypes import DType
from llmc.ir.rounding import FACTORS, SCALES, Array, CodeRange, inverse_of, ranges

DAMPING = 0.01  # of H's mean diagonal: keeps it well conditioned where few tokens were seen
ALIGNED = 128  # parts of a matrix begin at multiples of it: no group is in two
WIDEST = 2048  # columns that make up for each other, a multiple of ALIGNED
NARROW = 1024  # columns: parts of no more are swept twice, which lowers KL by another 2 %


def parts(k: int) -> tuple[int, int]:
    """In how many parts of how many columns (the last may have fewer) a matrix is taken."""
    count = -(-k // WIDEST)
    return (1, k) if count == 1 else (count, -(-k // (count * ALIGNED)) * ALIGNED)


def sweeps(k: int) -> int:
    """How often the codes of a part of k columns are refined."""
    return 2 if k <= NARROW else 1


def operations(n: int, k: int) -> int:
    """Floating-point operations of products by H for a matrix [n, k]."""
    width = parts(k)[1]
    return n * k * width * (1 + 2 * sweeps(width))


def operations_before(k: int) -> int:
    """The same of `prepare`: a third of a cube a part, counted four times: a thread is alone with
    it."""
    count, width = parts(k)
    return count * 4 * width**3 // 3


@dataclass(frozen=True)
class Prepared:
    """Of a part's second moments: damped, f32 [k, k], and `feedback` of them."""

    moments: Array
    feedback: Array


def prepare(moments: Array, k: int) -> list[Prepared]:
    """Second moments [parts, width, width] as they are used for k columns."""
    return [Prepared(each, feedback(each)) for each in damped(moments, k)]


def damped(moments: Array, k: int) -> list[Array]:
    """Of each part of second moments, what it is of k columns, with more on the diagonal."""
    count, width = parts(k)
    found = []
    for part in range(count):
        size = min(width, k - part * width)
        own = moments[part, :size, :size].astype(np.float32, order="C")
        mean = float(np.diag(own).mean(dtype=np.float64))
        own.flat[::size + 1] += np.float32(DAMPING * mean if mean > 0 else 1.0)
        found.append(own)
    return found


def feedback(moments: Array) -> Array:
    """f32 [k, k]: row j says what share of each earlier column's error column j makes up for.

    With H = (F + 1)' D (F + 1), F strictly lower triangular and D diagonal, it is F: the error of
    products is then that of independent columns (Chee et al., QuIP, 2023, whose LDLQ gives the
    codes of GPTQ without an inverse).
    """
    turned = np.linalg.cholesky(moments[::-1, ::-1].astype(np.float64))
    lower = turned[::-1, ::-1].T
    return np.tril(lower / np.diag(lower)[:, None], -1).astype(np.float32, order="C")


RoundPart = Callable[[Array, Prepared, DType, int], tuple[Array, Array, Array]]


def quantize_with_moments(matrix: Array, prepared: list[Prepared], dtype: DType, group: int,
                          round_part: RoundPart) -> tuple[Array, Array, Array]:
    """As `rounding.quantize_groups`, least in e H e'; prepared: H, by `prepare`; round_part: the
    function of that name, or what does the same."""
    k = matrix.shape[1]
    count, width = parts(k)
    found = [round_part(matrix[:, part * width:min((part + 1) * width, k)], prepared[part], dtype,
                        group) for part in range(count)]
    codes, scales, zeros = (np.concatenate(each, 1) for each in zip(*found, strict=True))
    return codes, scales, zeros


@dataclass(frozen=True)
class Columns:
    """Columns of a matrix, and what was chosen for them: wanted, errors (what codes lack of it)
    f32 [k, n], codes i8 or u8 [k, n], scales bf16 and zeros u8 [groups, n]."""

    wanted: Array
    errors: Array
    codes: Array
    scales: Array
    zeros: Array


def round_part(matrix: Array, prepared: Prepared, dtype: DType, size: int
               ) -> tuple[Array, Array, Array]:
    """Codes [n, k], scales and zeros [n, groups] for all columns [n, k] that H is of; size: of a
    group."""
    n, k = matrix.shape
    own = CodeRange.of(dtype)
    wanted = np.ascontiguousarray(matrix.T, np.float32)
    columns = Columns(wanted, np.zeros_like(wanted),
                      np.zeros((k, n), np.uint8 if own.zeros else np.int8),
                      np.zeros((-(-k // size), n), SCALES.numpy),
                      np.zeros((-(-k // size), n), np.uint8))
    groups = [slice(start, min(start + size, k)) for start in range(0, k, size)]
    for index, here in enumerate(groups):
        round_group(columns, here, index, prepared.feedback, dtype)
    for _ in range(sweeps(k)):
        for index, here in enumerate(groups):
            refine_group(columns, here, index, prepared.moments, own)
    return columns.codes.T, columns.scales.T, columns.zeros.T


def round_group(columns: Columns, here: slice, index: int, feedback: Array, dtype: DType) -> None:
    """Choose a group's scales, and codes for one of its columns after the other."""
    own = CodeRange.of(dtype)
    wanted, errors = columns.wanted[here], columns.errors[here]
    target = wanted + _product(feedback[here, :here.start], columns.errors)
    inverse, low, high = ranges(target.T, own)
    columns.scales[index] = _best_scale(target, inverse, low, high, FACTORS[dtype.bits])
    if own.zeros:
        columns.zeros[index] = -low
    scale, shift = _scale_and_shift(columns, index)
    inverse = inverse_of(scale)
    for j in range(len(target)):
        d = np.clip(np.rint(target[j] * inverse), low, high)
        columns.codes[here.start + j] = d + shift
        errors[j] = wanted[j] - d * scale
        target[j + 1:] += np.outer(feedback[here, here][j + 1:, j], errors[j])


def refine_group(columns: Columns, here: slice, index: int, moments: Array, own: CodeRange
                 ) -> None:
    """A better scale for a group's codes, then better codes for one column after the other."""
    wanted, inner = columns.wanted[here], moments[here, here]
    gradient = _product(moments[here], columns.errors)
    scale, shift = _scale_and_shift(columns, index)
    d = columns.codes[here] - shift
    curved = _product(inner, d)
    scale, step = _better_scale(scale, (gradient * d).sum(0), (curved * d).sum(0))
    gradient -= step * curved
    inverse, low = inverse_of(scale), np.float32(own.low) - shift
    for j in range(len(d)):
        best = d[j] * scale + gradient[j] / inner[j, j]
        new = np.clip(np.rint(best * inverse), low, low + np.float32(own.steps))
        gradient[j + 1:] -= np.outer(inner[j + 1:, j], (new - d[j]) * scale)
        d[j] = new
    columns.scales[index] = scale
    columns.codes[here] = d + shift
    columns.errors[here] = wanted - d * scale


def _product(rows: Array, columns: Array) -> Array:
    """rows [m, k] times the first k of columns, from the first to the last."""
    total = np.zeros((len(rows), columns.shape[1]), np.float32)
    for row, column in zip(rows.T, columns, strict=False):
        total += np.outer(row, column)
    return total


def _scale_and_shift(columns: Columns, index: int) -> tuple[Array, Array]:
    return columns.scales[index].astype(np.float32), columns.zeros[index].astype(np.float32)


def _best_scale(x: Array, inverse: Array, low: Array, high: Array, factors: Array) -> Array:
    """Of columns x [size, n]: the search of `rounding.quantize_groups`."""
    best, scale = np.full(x.shape[1], -1, np.float32), np.zeros(x.shape[1], np.float32)
    for factor in factors:
        d = np.clip(np.rint(x * (inverse * factor)), low, high)
        products, squares = (x * d).sum(0), (d * d).sum(0)
        fitted = products / np.where(squares == 0, 1, squares)
        better = products * fitted > best
        best, scale = np.where(better, products * fitted, best), np.where(better, fitted, scale)
    return scale.astype(SCALES.numpy)


def _better_scale(scale: Array, products: Array, squares: Array) -> tuple[Array, Array]:
    """The best scale, as it is stored, where it lowers the error, and its difference from `scale`.

    products: d H e, squares: d H d. With another scale s + t the error changes by t (t d H d -
    2 d H e)."""
    fitted = scale + products / np.where(squares > 0, squares, 1)
    step = fitted.astype(SCALES.numpy).astype(np.float32) - scale
    better = step * (step * squares - 2 * products) < 0
    step = np.where(better, step, np.float32(0))
    return scale + step, step
