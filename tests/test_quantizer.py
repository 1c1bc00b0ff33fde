"""The compiled quantiser does what the op's reference does, bit by bit."""

import ml_dtypes
import numpy as np
import pytest

from llmc.ir import product_rounding
from llmc.ir.dtypes import dtype
from llmc.ir.product_rounding import feedback, quantize_with_moments, round_part
from llmc.ir.rounding import quantize_groups
from llmc.quantizer import Quantizer, SecondMoments


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


@pytest.mark.parametrize("codes, group", [("i4", 32), ("u4", 32), ("i4", 128)])
@pytest.mark.parametrize("n, k", [(1, 1), (3, 17), (33, 75), (70, 300)])
def test_moments_equal_the_reference(quantizer, codes, group, n, k):
    """Fused multiply-adds round differently, so that a code in a thousand may fall to the other
    side, and those behind it in its row make up for it."""
    weights, x = matrix(n, k), matrix(3 * k, k)
    moments = (x.T @ x / len(x))[None]
    found = quantizer(weights, dtype(codes), group, moments)
    prepared = SecondMoments(2).prepare(moments, k)
    wanted = quantize_with_moments(weights, prepared, dtype(codes), group, round_part)
    same = np.mean([(mine.astype(np.float32) == theirs).mean()
                    for mine, theirs in zip(found.parts, wanted, strict=False)])
    assert same == 1 if k < 100 else same > 0.99
    lost = [of_products(weights, *each, moments[0], group)
            for each in ((found.codes, found.scales, found.zeros), wanted)]
    assert lost[0] == pytest.approx(lost[1], rel=1e-3)


def of_products(weights, codes, scales, zeros, moments, group):
    """The sum of e H e'."""
    column = np.arange(weights.shape[1]) // group
    d = codes.astype(np.float64) - (0 if zeros is None else zeros.astype(np.float64)[:, column])
    e = weights - d * scales.astype(np.float64)[:, column]
    return float(((e @ moments) * e).sum())


def test_wide_matrices_with_moments_are_taken_apart(quantizer, monkeypatch):
    """Each part has the codes that it has alone; the last is narrower."""
    monkeypatch.setattr(product_rounding, "WIDEST", 256)
    weights, x = matrix(17, 600), matrix(90, 600)
    count, width = product_rounding.parts(600)
    assert (count, width) == (3, 256)
    moments = np.zeros((count, width, width), np.float32)
    alone = []
    for part in range(count):
        here = slice(part * width, min((part + 1) * width, 600))
        own = x[:, here].T @ x[:, here] / 90
        moments[part, :len(own), :len(own)] = own
        alone.append(quantizer(weights[:, here], dtype("i4"), 32, own[None]).codes)
    found = quantizer(weights, dtype("i4"), 32, moments)
    np.testing.assert_array_equal(found.codes, np.concatenate(alone, 1))


def test_views_are_read_as_they_are(quantizer):
    weights = matrix(64, 48)
    turned = quantizer(weights.T, dtype("i8"), 32)
    np.testing.assert_array_equal(turned.codes,
                                  quantizer(weights.T.copy(), dtype("i8"), 32).codes)


@pytest.mark.parametrize("tokens, k", [(1, 1), (17, 3), (33, 33), (1500, 70)])
def test_second_moments(tokens, k):
    x = matrix(tokens, k, ml_dtypes.bfloat16)
    wide = x.astype(np.float64)
    found = SecondMoments(2)(x)
    assert found.dtype == np.float32 and (found == found.T).all()
    np.testing.assert_allclose(found, wide.T @ wide / tokens, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 16, 33, 130])
def test_factors_of_second_moments(k):
    x = matrix(2 * k, k) @ (np.eye(k) + 0.2 * matrix(k, k)).astype(np.float32)
    (found,) = SecondMoments(2).prepare((x.T @ x / len(x))[None], k)
    wanted = feedback(found.moments)
    assert found.feedback.flags.c_contiguous
    np.testing.assert_allclose(found.feedback, wanted, atol=1e-4 * np.abs(wanted).max())


def test_factors_where_few_tokens_were_seen():
    """Of a matrix of rank 3, damping is all that keeps its factors finite."""
    x = matrix(3, 200)
    (found,) = SecondMoments(1).prepare((x.T @ x / 3)[None], 200)
    wanted = feedback(found.moments)
    np.testing.assert_allclose(found.feedback, wanted, atol=2e-3 * np.abs(wanted).max())
