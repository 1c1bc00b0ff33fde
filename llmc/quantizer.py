"""Quantises matrices on this machine, whatever the target: by compiled code, in several threads."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from llmc.codegen.host.column_quantizer import PANELS, ROUND, generate_column_quantizer
from llmc.codegen.host.quantizer import EXPORT, generate_quantizer
from llmc.codegen.host.second_moments import FACTOR, LANES, SQUARES, generate_second_moments
from llmc.codegen.target import Target
from llmc.ir import dtypes
from llmc.ir.dtypes import DType, from_numpy
from llmc.ir.product_rounding import (
    DAMPING,
    Prepared,
    damped,
    quantize_with_moments,
    sweeps,
)
from llmc.ir.rounding import FACTORS, SCALES, CodeRange, padded

NATIVE = (dtypes.f32, dtypes.bf16)  # others are widened first
SHARES = 4  # of a matrix for each thread, so that threads finish together
TOKENS = 1024  # whose second moments are taken at once

Result = TypeVar("Result")


@dataclass(frozen=True)
class QuantizedMatrix:
    """codes [n, k], scales [n, groups] and zeros (None of signed codes) of a matrix; error: the
    root of the mean squared error, over the root mean square of the matrix."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    error: float

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The results of the op `quantize`."""
        return tuple(each for each in (self.codes, self.scales, self.zeros) if each is not None)


class Quantizer:
    """The op `quantize` by compiled code; what it is compiled for is made when first asked for."""

    def __init__(self, threads: int):
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._parts = _CompiledParts(self._pool, threads)
        self._moments: SecondMoments | None = None
        self._prepared: tuple[np.ndarray | None, list[Prepared]] = None, []
        self._functions: dict[tuple[DType, DType, int], Callable[..., None]] = {}

    def prepare(self, source: DType | None, dtype: DType, group: int) -> None:
        """Compile what matrices of `source` need; None: matrices with moments."""
        if source is None:
            self._parts.function(dtype)
            self._moments = self._moments or SecondMoments(self._threads)
        else:
            self._function(source if source in NATIVE else dtypes.f32, dtype, group)

    def __call__(self, matrix: np.ndarray, dtype: DType, group: int,
                 moments: np.ndarray | None = None) -> QuantizedMatrix:
        """Codes of `dtype` for a float matrix [n, k]; moments: see `ir.product_rounding`."""
        if moments is not None:
            return self._with_moments(matrix, moments, dtype, group)
        codes, scales, zeros, sums = self._groups(matrix, dtype, group)
        error = math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0
        own = zeros if CodeRange.of(dtype).zeros else None
        return QuantizedMatrix(codes.view(dtype.numpy), scales, own, error)

    def _with_moments(self, matrix: np.ndarray, moments: np.ndarray, dtype: DType,
                      group: int) -> QuantizedMatrix:
        wide = matrix.astype(np.float32)
        k = wide.shape[1]
        if self._prepared[0] is not moments:  # several matrices are multiplied by the same
            self._moments = self._moments or SecondMoments(self._threads)
            self._prepared = moments, self._moments.prepare(moments, k)
        codes, scales, zeros = quantize_with_moments(wide, self._prepared[1], dtype, group,
                                                     self._parts)
        column = np.arange(k) // group
        d = codes.astype(np.float32) - zeros.astype(np.float32)[:, column]
        lost = wide - d * scales.astype(np.float32)[:, column]
        size = float(np.square(wide).sum())
        error = math.sqrt(float(np.square(lost).sum()) / size) if size else 0.0
        own = zeros if CodeRange.of(dtype).zeros else None
        return QuantizedMatrix(codes.view(dtype.numpy), scales, own, error)

    def _groups(self, matrix: np.ndarray, dtype: DType, group: int
                ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`ir.rounding.quantize_groups`, and the sums of squares of errors and of elements."""
        source = from_numpy(matrix.dtype)
        if source not in NATIVE:
            matrix, source = matrix.astype(np.float32), dtypes.f32
        n, k = matrix.shape
        rows = np.ascontiguousarray(padded(matrix, group))
        groups = rows.shape[1] // group
        codes = np.empty((n, groups * group),
                         np.uint8 if CodeRange.of(dtype).zeros else np.int8)
        scales = np.zeros((n, groups), SCALES.numpy)
        zeros = np.zeros((n, groups), np.uint8)
        sums = self._run(self._function(source, dtype, group), n * groups, (
            rows, codes, scales, zeros), FACTORS[dtype.bits])
        return codes[:, :k], scales, zeros, sums

    def _run(self, function: Callable[..., None], count: int, arrays: tuple[np.ndarray, ...],
             factors: np.ndarray) -> np.ndarray:
        """Call the function on shares of `count` groups; the sums."""
        addresses = [each.ctypes.data for each in arrays]

        def work(begin: int, end: int) -> np.ndarray:
            sums = np.zeros(2)
            function(*addresses, sums.ctypes.data, factors.ctypes.data, len(factors), begin, end)
            return sums

        return np.sum(_in_shares(self._pool, self._threads, count, 64, work), axis=0)

    def _function(self, source: DType, dtype: DType, group: int) -> Callable[..., None]:
        key = source, dtype, group
        if key not in self._functions:
            from llmc.runtime.host_device import load_object

            code = generate_quantizer(Target.host(), source, dtype, group)
            self._functions[key] = load_object(code, (EXPORT,)).function(
                EXPORT, None, *[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 3)
        return self._functions[key]


class _CompiledParts:
    """`ir.product_rounding.round_part` by compiled code: each thread does rows of its own."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int):
        self._pool = pool
        self._threads = threads
        self._compiled: dict[DType, Callable[..., None]] = {}

    def __call__(self, matrix: np.ndarray, prepared: Prepared, dtype: DType, size: int
                 ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `round_part`."""
        n, k = matrix.shape
        panels, groups = -(-n // LANES), -(-k // size)
        wanted = np.zeros((panels * LANES, k), np.float32)
        wanted[:n] = matrix
        wanted = np.ascontiguousarray(wanted.reshape(panels, LANES, k).transpose(0, 2, 1))
        codes = np.zeros(wanted.shape, np.uint8 if CodeRange.of(dtype).zeros else np.int8)
        scales = np.zeros((panels, groups, LANES), SCALES.numpy)
        zeros = np.zeros(scales.shape, np.uint8)
        factors = FACTORS[dtype.bits]
        arrays = (wanted, np.zeros_like(wanted), codes, scales, zeros, prepared.feedback,
                  prepared.moments, factors)
        addresses = [each.ctypes.data for each in arrays]
        function = self.function(dtype)
        _in_shares(self._pool, self._threads, panels, PANELS, lambda begin, end: function(
            *addresses, len(factors), k, size, sweeps(k), begin, end))

        def rows(each: np.ndarray) -> np.ndarray:
            return each.transpose(0, 2, 1).reshape(panels * LANES, -1)[:n]

        return rows(codes), rows(scales), rows(zeros)

    def function(self, dtype: DType) -> Callable[..., None]:
        """The code for a dtype of codes."""
        if dtype not in self._compiled:
            from llmc.runtime.host_device import load_object

            library = load_object(generate_column_quantizer(Target.host(), dtype), (ROUND,))
            self._compiled[dtype] = library.function(
                ROUND, None, *[ctypes.c_void_p] * 8, *[ctypes.c_int64] * 6)
        return self._compiled[dtype]


class SecondMoments:
    """Second moments and their factors by compiled code, each thread for itself. NumPy's products
    and factors have threads that wait for each other: on a machine with other work, a factor took
    fifteen times as long with four of them as with one."""

    def __init__(self, threads: int):
        from llmc.runtime.host_device import load_object

        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)  # ends with the object
        library = load_object(generate_second_moments(Target.host()), (SQUARES, FACTOR))
        self._factor = library.function(FACTOR, None, *[ctypes.c_void_p] * 3, ctypes.c_float,
                                        ctypes.c_int64)
        self._add = library.function(SQUARES, None, *[ctypes.c_void_p] * 3,
                                     *[ctypes.c_int64] * 4)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """f32 [k, k] of floats [tokens, k]."""
        tokens, k = x.shape
        panels = -(-k // LANES)
        squares = np.zeros((panels, k, LANES), np.float32)
        for first in range(0, tokens, TOKENS):
            self._add_block(x[first:first + TOKENS], squares)
        upper = squares.transpose(1, 0, 2).reshape(k, -1)[:, :k]
        upper = np.triu(upper) / np.float32(tokens)
        return upper + np.triu(upper, 1).T

    def prepare(self, moments: np.ndarray, k: int) -> list[Prepared]:
        """`ir.product_rounding.prepare`, with factors in f32."""
        return list(self._pool.map(
            lambda each: Prepared(each, self._feedback(each)), damped(moments, k)))

    def _feedback(self, moments: np.ndarray) -> np.ndarray:
        """`ir.product_rounding.feedback` of damped moments."""
        k = len(moments)
        size = -(-k // LANES) * LANES
        turned = np.eye(size, dtype=np.float32)
        turned[:k, :k] = moments[::-1, ::-1]
        diagonal, scaled = np.empty(size, np.float32), np.empty((size, LANES), np.float32)
        lowest = float(np.diag(moments).mean()) * DAMPING / 2  # none is, without rounding
        self._factor(turned.ctypes.data, diagonal.ctypes.data, scaled.ctypes.data, lowest, size)
        return np.ascontiguousarray(np.tril(turned[:k, :k][::-1, ::-1].T, -1))

    def _add_block(self, x: np.ndarray, squares: np.ndarray) -> None:
        tokens, k = x.shape
        whole = np.zeros((tokens, len(squares) * LANES), np.float32)
        whole[:, :k] = x
        panels = np.ascontiguousarray(whole.reshape(tokens, -1, LANES).transpose(1, 0, 2))
        columns = np.ascontiguousarray(whole[:, :k].T)
        addresses = [each.ctypes.data for each in (columns, panels, squares)]
        _in_shares(self._pool, self._threads, len(squares), 1, lambda begin, end: self._add(
            *addresses, tokens, k, begin, end))


def _in_shares(pool: ThreadPoolExecutor, threads: int, count: int, least: int,
               work: Callable[[int, int], Result]) -> list[Result]:
    """work(begin, end) for shares of `count`, of `least` each at least; what it gives."""
    shares = max(1, min(threads * SHARES, count // least))
    if shares == 1:
        return [work(0, count)]
    return list(pool.map(
        lambda share: work(share * count // shares, (share + 1) * count // shares), range(shares)))
