"""Host attention against f64, at odd sizes, with poisoned scratch and unused cache slots."""

import numpy as np
import pytest
from attention_harness import Harness, leaf, node, oracle, paged_case, random, tensor

from llmc.errors import CompileError

MIX = [(1, 0), (7, 30), (33, 0), (1, 200), (1, 31), (129, 5), (2, 64)]
TOLERANCE = 3e-6  # of the largest value, f32 arithmetic throughout


def error(got, want):
    got = got.astype(np.float64)
    assert np.isfinite(got).all()
    return np.abs(got - want).max() / np.abs(want).max()


def run_paged(sequences, heads, kv_heads, size, dtype_name="f32", **attributes):
    inputs, result, layouts, arrays, dense = paged_case(
        sequences, heads, kv_heads, size, dtype_name, **attributes)
    output = node("reshape", tensor(dtype_name, result.shape[0], heads * size), result)
    output = node("cast", tensor("f32", *output.shape), output)
    got = Harness(inputs, output, layouts=layouts)(**arrays)
    starts = arrays["offsets"]
    want = np.concatenate([
        oracle(arrays["q"][starts[i]:starts[i + 1]], k, v, size**-0.5, **attributes)
        for i, (k, v) in enumerate(dense)])
    return error(got, want.reshape(got.shape))


@pytest.mark.parametrize("heads, kv_heads, size", [
    (1, 1, 8), (4, 4, 24), (8, 4, 64), (6, 2, 80), (8, 2, 128), (8, 1, 16), (32, 1, 8),
    (5, 1, 7), (14, 2, 1), (2, 2, 256)])
def test_paged_shapes(heads, kv_heads, size):
    assert run_paged(MIX, heads, kv_heads, size) < TOLERANCE


@pytest.mark.parametrize("dtype_name", ["bf16", "f16"])
@pytest.mark.parametrize("size", [64, 20])
def test_paged_half_precision(dtype_name, size):
    assert run_paged(MIX, 8, 2, size, dtype_name) < TOLERANCE


@pytest.mark.parametrize("attributes", [{"window": 1}, {"window": 33}, {"window": 1000},
                                        {"softcap": 5.0}, {"window": 40, "softcap": 50.0}])
def test_paged_window_and_softcap(attributes):
    assert run_paged(MIX, 8, 2, 32, **attributes) < TOLERANCE
