"""Quantises matrices on this machine, whatever the target: by compiled code, in several threads."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from llmc.codegen.host.quantizer import EXPORT, generate_quantizer
from llmc.codegen.target import Target
from llmc.ir import dtypes
from llmc.ir.dtypes import DType, from_numpy
from llmc.ir.ops_quantize import (
    FACTORS,
    SCALES,
    CodeRange,
    feedback,
    padded,
    quantize_with_moments,
)

NATIVE = (dtypes.f32, dtypes.bf16)  # others are widened first
SHARES = 4  # of a matrix for each thread, so that threads finish together


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
        self._feedback: tuple[np.ndarray | None, np.ndarray] = None, np.empty(0)
        self._functions: dict[tuple[DType, DType, int], Callable[..., None]] = {}

    def prepare(self, source: DType, dtype: DType, group: int) -> None:
        """Compile what matrices of `source` need."""
        self._function(source if source in NATIVE else dtypes.f32, dtype, group)

    def __call__(self, matrix: np.ndarray, dtype: DType, group: int,
                 moments: np.ndarray | None = None) -> QuantizedMatrix:
        """Codes of `dtype` for a float matrix [n, k]; moments: see `ir.ops_quantize`."""
        if moments is not None:
            return self._with_moments(matrix, moments, dtype, group)
        codes, scales, zeros, sums = self._groups(matrix, dtype, group)
        error = math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0
        own = zeros if CodeRange.of(dtype).zeros else None
        return QuantizedMatrix(codes.view(dtype.numpy), scales, own, error)

    def _with_moments(self, matrix: np.ndarray, moments: np.ndarray, dtype: DType,
                      group: int) -> QuantizedMatrix:
        wide = matrix.astype(np.float32)
        if self._feedback[0] is not moments:  # several matrices are multiplied by the same
            self._feedback = moments, feedback(moments)
        codes, scales, zeros = quantize_with_moments(
            wide, self._feedback[1], dtype, group, lambda *block: self._groups(*block)[:3])
        column = np.arange(wide.shape[1]) // group
        d = codes.astype(np.float32) - zeros.astype(np.float32)[:, column]
        lost = wide - d * scales.astype(np.float32)[:, column]
        size = float(np.square(wide).sum())
        error = math.sqrt(float(np.square(lost).sum()) / size) if size else 0.0
        own = zeros if CodeRange.of(dtype).zeros else None
        return QuantizedMatrix(codes.view(dtype.numpy), scales, own, error)

    def _groups(self, matrix: np.ndarray, dtype: DType, group: int
                ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`ir.ops_quantize.quantize_groups`, and the sums of squares of errors and of elements."""
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
        shares = max(1, min(self._threads * SHARES, count // 64))
        sums = np.zeros((shares, 2))
        addresses = [each.ctypes.data for each in arrays]

        def work(share: int) -> None:
            function(*addresses, sums[share].ctypes.data, factors.ctypes.data, len(factors),
                     share * count // shares, (share + 1) * count // shares)

        if shares == 1:
            work(0)
        else:
            list(self._pool.map(work, range(shares)))
        return sums.sum(axis=0)

    def _function(self, source: DType, dtype: DType, group: int) -> Callable[..., None]:
        key = source, dtype, group
        if key not in self._functions:
            from llmc.runtime.host_device import load_object

            code = generate_quantizer(Target.host(), source, dtype, group)
            self._functions[key] = load_object(code, (EXPORT,)).function(
                EXPORT, None, *[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 3)
        return self._functions[key]
