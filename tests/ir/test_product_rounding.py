"""Codes that lose least of products: what the kernels promise, and what it is made of."""

import numpy as np
import pytest

from llmc.ir.dtypes import dtype
from llmc.ir.product_rounding import (
    DAMPING,
    WIDEST,
    Columns,
    feedback,
    parts,
    prepare,
    quantize_with_moments,
    refine_group,
    round_group,
    round_part,
    sweeps,
)
from llmc.ir.rounding import CodeRange, quantize_groups


def case(n, k):
    """A matrix [n, k], and second moments of inputs of which some go together."""
    rng = np.random.default_rng(n * k)
    x = rng.standard_normal((3 * k, k)) @ (np.eye(k) + 0.3 * rng.standard_normal((k, k)))
    return (rng.standard_normal((n, k)).astype(np.float32),
            (x.T @ x / len(x)).astype(np.float32))


def dequantized(codes, scales, zeros, group):
    column = np.arange(codes.shape[1]) // group
    d = codes.astype(np.float64) - zeros.astype(np.float64)[:, column]
    return d * scales.astype(np.float64)[:, column]


def lost(weights, found, moments, group):
    """The sum of e H e'."""
    e = weights - dequantized(*found, group)
    return float(((e @ moments.astype(np.float64)) * e).sum())


@pytest.mark.parametrize("k", [1, 31, 1024, 1025, WIDEST, WIDEST + 1, 8192, 11008, 38913])
def test_parts_cover_the_columns(k):
    count, width = parts(k)
    assert width <= WIDEST and (count - 1) * width < k <= count * width
    assert count == 1 or width % 128 == 0
    assert sweeps(width) in (1, 2)


def test_feedback_is_the_factor_of_the_moments():
    _, moments = case(1, 33)
    factor = feedback(moments).astype(np.float64) + np.eye(33)
    assert not np.triu(factor, 1).any()
    inverse = np.linalg.inv(factor)
    diagonal = inverse.T @ moments @ inverse
    np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-4 * moments.max())


def test_moments_are_damped():
    moments = np.diag(np.arange(4, dtype=np.float32))[None]
    (prepared,) = prepare(moments, 4)
    np.testing.assert_allclose(np.diag(prepared.moments), np.arange(4) + DAMPING * 1.5, rtol=1e-6)


@pytest.mark.parametrize("codes", ["i4", "u4"])
@pytest.mark.parametrize("n, k, group", [(3, 33, 32), (17, 172, 32), (5, 300, 128)])
def test_sweeps_only_lower_the_error(codes, n, k, group, monkeypatch):
    weights, moments = case(n, k)
    prepared = prepare(moments[None], k)
    errors = []
    for count in range(4):
        monkeypatch.setattr("llmc.ir.product_rounding.sweeps", lambda _, count=count: count)
        found = quantize_with_moments(weights, prepared, dtype(codes), group, round_part)
        own = CodeRange.of(dtype(codes))
        assert found[0].min() >= own.low and found[0].max() <= own.low + own.steps
        errors.append(lost(weights, found, prepared[0].moments, group))
    plain = lost(weights, quantize_groups(weights, dtype(codes), group), moments, group)
    assert errors[0] < plain and errors[1] < 0.99 * errors[0]
    assert errors[2] <= errors[1] and errors[3] <= errors[2]


def test_a_code_that_refining_leaves_is_best():
    """No single code of any row can be changed for the better when nothing moves any more."""
    weights, moments = case(3, 40)
    prepared = prepare(moments[None], 40)[0]
    wanted = np.ascontiguousarray(weights.T)
    found = Columns(wanted, np.zeros_like(wanted), np.zeros(wanted.shape, np.int8),
                    np.zeros((2, 3), dtype("bf16").numpy), np.zeros((2, 3), np.uint8))
    groups = (slice(0, 32), slice(32, 40))
    for index, here in enumerate(groups):
        round_group(found, here, index, prepared.feedback, dtype("i4"))
    for _ in range(50):
        before = found.codes.copy(), found.scales.copy()
        for index, here in enumerate(groups):
            refine_group(found, here, index, prepared.moments, CodeRange.of(dtype("i4")))
        if (before[0] == found.codes).all() and (before[1] == found.scales).all():
            break
    else:
        raise AssertionError("refining does not end")
    scale = found.scales.astype(np.float64)[np.arange(40) // 32]
    np.testing.assert_allclose(found.errors, wanted - found.codes * scale, atol=1e-5)
    h = prepared.moments.astype(np.float64)
    for row in range(3):
        e = wanted[:, row] - found.codes[:, row] * scale[:, row]
        best = e @ h @ e
        for j in range(40):
            for code in {-8, found.codes[j, row] - 1, found.codes[j, row] + 1, 7}:
                if -8 <= code <= 7:
                    other = e.copy()
                    other[j] = wanted[j, row] - code * scale[j, row]
                    assert other @ h @ other >= best * (1 - 1e-5)
