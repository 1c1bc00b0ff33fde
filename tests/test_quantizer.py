"""The compiled quantiser does what the op's reference does, bit by bit."""

import ml_dtypes
import numpy as np
import pytest

from llmc.ir.dtypes import dtype
from llmc.ir.ops_quantize import feedback, quantize_groups, quantize_with_moments
from llmc.quantizer import Quantizer


@pytest.fixture(scope="module")
def quantizer():
    return Quantizer(2)


def matrix(n, k, kind=np.float32):
    values = np.random.default_rng(n * k).standard_normal((n, k)).astype(kind)
    values[n // 2, :32] = 0
    return values


@pytest.mark.parametrize("codes, group", [("i4", 32), ("u4", 32), ("i4", 128), ("i8", 128),
                                          ("u8", 64)])
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_equals_the_reference(quantizer, codes, group, kind):
    for n, k in ((1, 1), (3, 17), (33, 172), (70, 257)):
        weights = matrix(n, k, kind)
        found = quantizer(weights, dtype(codes), group)
        wanted = quantize_groups(weights.astype(np.float32), dtype(codes), group)
        for mine, theirs in zip(found.parts, wanted, strict=False):
            np.testing.assert_array_equal(mine.astype(np.float32), theirs.astype(np.float32))


def test_tells_the_error_of_the_elements(quantizer):
    weights = matrix(40, 100)
    found = quantizer(weights, dtype("i4"), 32)
    scales = found.scales.astype(np.float64)[:, np.arange(100) // 32]
    lost = np.square(weights - found.codes.astype(np.float64) * scales).sum()
    assert found.error == pytest.approx(np.sqrt(lost / np.square(weights).sum()), rel=1e-5)
    assert quantizer(np.zeros((2, 32), np.float32), dtype("i8"), 32).error == 0


def test_moments_equal_the_reference(quantizer):
    weights, x = matrix(20, 70), matrix(90, 70)
    moments = x.T @ x
    found = quantizer(weights, dtype("i4"), 32, moments)
    codes, scales, _ = quantize_with_moments(weights, feedback(moments), dtype("i4"), 32,
                                             quantize_groups)
    np.testing.assert_array_equal(found.codes.astype(int), codes)
    np.testing.assert_array_equal(found.scales, scales)


def test_views_are_read_as_they_are(quantizer):
    weights = matrix(64, 48)
    turned = quantizer(weights.T, dtype("i8"), 32)
    np.testing.assert_array_equal(turned.codes,
                                  quantizer(weights.T.copy(), dtype("i8"), 32).codes)
