"""The op `quantize`: what it returns is what dequantize takes, and its error is small."""

import numpy as np
import pytest

from llmc.errors import GraphError
from llmc.ir.dtypes import bf16, dtype
from llmc.ir.graph import Graph, TensorType
from llmc.ir.interpret import interpret
from llmc.ir.ops import make
from llmc.ir.product_rounding import feedback, prepare
from llmc.ir.rounding import CodeRange, quantize_groups

CODES = ("i4", "u4", "i8", "u8")


def matrix(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def leaf(name, array):
    return make("parameter", name=name, type=TensorType(dtype("f32"), array.shape))


def dequantized(weights, codes, group, moments=None):
    """The matrix after a round trip through both ops."""
    operands = [leaf("w", weights)] + ([leaf("m", moments)] if moments is not None else [])
    whole = make("quantize", *operands, dtype=codes, group=group)
    parts = [make("get", whole, index=index) for index in range(len(whole.type))]
    back = make("dequantize", *parts, group=group, dtype="f32")
    values = {"w": weights} | ({"m": moments} if moments is not None else {})
    return interpret(Graph("g", (), (("y", back),)), {}, values)["y"]


def error(weights, found):
    return np.sqrt(np.square(weights - found).sum() / np.square(weights).sum())


def round_to_nearest(weights, bits, group):
    """The plain way: the largest element of a group is the largest code."""
    n, k = weights.shape
    x = np.pad(weights, ((0, 0), (0, -k % group))).reshape(n, -1, group)
    scale = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return (np.rint(x / np.where(scale == 0, 1, scale)) * scale).reshape(n, -1)[:, :k]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("n, k, group", [(1, 1, 32), (3, 32, 32), (17, 33, 32), (5, 172, 64),
                                         (2, 257, 128)])
def test_round_trip(codes, n, k, group):
    weights = matrix(n, k)
    found = dequantized(weights, codes, group)
    assert found.shape == weights.shape
    bits = dtype(codes).bits
    plain = error(weights, round_to_nearest(weights, bits, group))
    assert error(weights, found) <= (0.87 * plain if bits == 4 and k > 1 else plain + 0.004)


@pytest.mark.parametrize("codes", CODES)
def test_ranges(codes):
    """Signed codes of 8 bits never reach -128: kernels negate them."""
    found, _, zeros = quantize_groups(matrix(8, 256) * 7, dtype(codes), 32)
    own = CodeRange.of(dtype(codes))
    assert found.min() >= own.low and found.max() <= own.low + own.steps
    assert found.min() == own.low
    assert own.zeros or not zeros.any()


@pytest.mark.parametrize("codes", CODES)
def test_constant_zero_and_tiny_groups(codes):
    weights = np.zeros((4, 64), np.float32)
    weights[1] = 0.3
    weights[2] = -0.3
    weights[3] = 1e-38
    found = dequantized(weights, codes, 32)
    assert (found[0] == 0).all() and np.isfinite(found).all()
    np.testing.assert_allclose(found[1:3], weights[1:3], rtol=2**-8)


def test_shifted_groups_want_zeros():
    weights = matrix(16, 64) + np.float32(3)
    assert error(weights, dequantized(weights, "u4", 32)) < 0.6 * error(
        weights, dequantized(weights, "i4", 32))


@pytest.mark.parametrize("codes", ["i4", "u4"])
@pytest.mark.parametrize("k", [64, 75])
def test_moments_lower_the_error_of_products(codes, k):
    rng = np.random.default_rng(1)
    weights = matrix(48, k)
    x = rng.standard_normal((400, 24)) @ rng.standard_normal((24, k))
    x = (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    wanted = x @ weights.T

    def of_products(moments):
        return error(wanted, x @ dequantized(weights, codes, 32, moments).T)

    assert of_products((x.T @ x / len(x))[None]) < 0.5 * of_products(None)


def test_moments_of_inputs_that_never_come():
    """Channels that are always zero, and no tokens at all, are no error."""
    weights, moments = matrix(4, 40), np.zeros((1, 40, 40), np.float32)
    np.testing.assert_allclose(dequantized(weights, "i4", 32, moments), weights, atol=0.4)
    (prepared,) = prepare(moments, 40)
    assert not feedback(prepared.moments).any()


def test_scales_are_bf16_and_refused_types_are_named():
    whole = make("quantize", leaf("w", matrix(3, 40)), dtype="u4", group=32)
    assert [str(part) for part in whole.type] == ["u4[3, 40]", "bf16[3, 2]", "u8[3, 2]"]
    assert whole.type[1].dtype is bf16
    with pytest.raises(GraphError, match="no codes of i16"):
        make("quantize", leaf("w", matrix(3, 40)), dtype="i16", group=32)
    with pytest.raises(GraphError, match="moments"):
        make("quantize", leaf("w", matrix(3, 40)), leaf("m", matrix(3, 3)[None]), dtype="i4",
             group=32)
