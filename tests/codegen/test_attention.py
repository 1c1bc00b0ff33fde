"""Host attention against f64, at odd sizes, with poisoned scratch and unused cache slots."""

import platform
import re

import numpy as np
import pytest
from attention_harness import Harness, evaluate_exactly, leaf, oracle, paged_case, random

from llmc.errors import CompileError
from llmc.ir.dims import symbol
from llmc.ir.dtypes import dtype
from llmc.ir.ops import make
from llmc.ir.views import View

MIX = [(1, 0), (7, 30), (33, 0), (1, 200), (1, 31), (129, 5), (2, 64)]
TOLERANCE = 3e-6  # of the largest value: f32 arithmetic throughout


def error(got, want):
    got = got.astype(np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    return np.abs(got - want).max() / np.abs(want).max()


def to_f32(node):
    return make("cast", node, dtype=dtype("f32"))


# ---- paged -------------------------------------------------------------------------------------


def run_paged(sequences, heads, kv_heads, size, dtype_name="f32", **attributes):
    inputs, result, layouts, arrays, dense = paged_case(
        sequences, heads, kv_heads, size, dtype_name, **attributes)
    output = to_f32(make("reshape", result, shape=(result.shape[0], heads * size)))
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


@pytest.mark.parametrize("lanes", [4, 16])
def test_other_vector_lengths(lanes):
    """As NEON and AVX-512 would compute it; LLVM makes do with this machine's vectors."""
    inputs, result, layouts, arrays, dense = paged_case([(40, 70), (1, 99)], 8, 2, 36)
    got = Harness(inputs, result, layouts=layouts, lanes=lanes)(**arrays)
    want = np.concatenate([oracle(arrays["q"][:40], *dense[0], 1 / 6),
                           oracle(arrays["q"][40:], *dense[1], 1 / 6)])
    assert error(got, want) < TOLERANCE


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
@pytest.mark.parametrize("size", [64, 128])
def test_inner_loops_do_not_spill(size):
    inputs, result, layouts, _, _ = paged_case([(64, 0)], 32, 8, size)
    assembly = Harness(inputs, result, layouts=layouts).assembly
    blocks = [block for block in re.split(r"^\.?\w+:", assembly, flags=re.MULTILINE)
              if block.count("vfmadd231ps") >= 24]
    assert blocks
    for block in blocks:
        loop = block[:block.rindex("vfmadd231ps")]
        assert not re.search(r"vmov\w+\s+%ymm\d+, -?\d*\(%rsp\)", loop), loop


def test_repeats_bit_for_bit():
    inputs, result, layouts, arrays, _ = paged_case(MIX, 8, 2, 32)
    harness = Harness(inputs, result, layouts=layouts)
    first = harness(**arrays)
    assert all(np.array_equal(first, harness(**arrays)) for _ in range(20))


def test_a_sequence_gives_the_same_alone_and_in_a_batch():
    """A query's result depends on its own block only when blocks start at the same token."""
    inputs, result, layouts, arrays, _ = paged_case([(1, 100), (1, 37)], 4, 2, 16)
    both = Harness(inputs, result, layouts=layouts)(**arrays)
    second = {"q": arrays["q"][1:], "positions": arrays["positions"][1:],
              "sequence": np.zeros(1, np.int32), "offsets": np.array([0, 1], np.int32),
              "page_table": np.ascontiguousarray(arrays["page_table"][1:])}
    q, k, v, *_ = inputs
    alone = [leaf("q", "f32", *q.shape[:0], 1, *q.shape[1:]), k, v,
             leaf("page_table", "i32", 1, second["page_table"].shape[1]),
             leaf("sequence", "i32", 1), leaf("positions", "i32", 1), leaf("offsets", "i32", 2)]
    got = Harness(alone, make("paged_attention", *alone), layouts=layouts)(
        **{**arrays, **second})
    np.testing.assert_array_equal(got[0], both[1])


# ---- packed ------------------------------------------------------------------------------------


def packed_body(tokens, sequences, heads, kv_heads, size, dtype_name, **attributes):
    """q, k, v are slices of one matmul's result, as an encoder has them."""
    width = (heads + 2 * kv_heads) * size
    qkv = leaf("qkv", dtype_name, tokens, width)
    offsets = leaf("offsets", "i32", sequences + 1)
    parts, start = [], 0
    for count in (heads, kv_heads, kv_heads):
        stop = start + count * size
        part = make("slice", qkv, starts=(0, start), stops=(tokens, stop), steps=(1, 1))
        parts.append(make("reshape", part, shape=(tokens, count, size)))
        start = stop
    result = make("packed_attention", *parts, offsets, **attributes)
    return [qkv, offsets], to_f32(make("reshape", result, shape=(tokens, heads * size)))


@pytest.mark.parametrize("heads, kv_heads, size", [(1, 1, 8), (4, 4, 32), (6, 2, 64), (8, 1, 20),
                                                   (3, 3, 5)])
@pytest.mark.parametrize("attributes", [{}, {"causal": True, "window": 9},
                                        {"window": 20, "softcap": 4.0}])
def test_packed(heads, kv_heads, size, attributes):
    lengths = [1, 33, 0, 7, 129, 32]
    tokens, sequences = symbol("tokens"), symbol("sequences")
    inputs, output = packed_body(tokens, sequences, heads, kv_heads, size, "f32", **attributes)
    dims = {"tokens": sum(lengths), "sequences": len(lengths)}
    arrays = {"qkv": random((dims["tokens"], (heads + 2 * kv_heads) * size), "f32", 1),
              "offsets": np.cumsum([0, *lengths]).astype(np.int32)}
    got = Harness(inputs, output, dims)(**arrays)
    assert error(got, evaluate_exactly(output, arrays, dims)) < TOLERANCE


def test_packed_bf16():
    inputs, output = packed_body(100, 2, 12, 12, 64, "bf16")
    arrays = {"qkv": random((100, 36 * 64), "bf16", 1), "offsets": np.array([0, 61, 100], "i4")}
    got = Harness(inputs, output)(**arrays)
    assert error(got, evaluate_exactly(output, arrays, {})) < TOLERANCE


# ---- dense -------------------------------------------------------------------------------------

BATCH, QUERIES, KEYS = 2, 37, 75
MASKS = {
    "none": None,
    "padding": ("bool", (BATCH, 1, 1, KEYS)),
    "bool": ("bool", (BATCH, 1, QUERIES, KEYS)),
    "additive": ("f32", (BATCH, 4, QUERIES, KEYS)),
    "shared": ("f32", (1, 1, QUERIES, KEYS)),
    "low rank": ("f32", (QUERIES, 1)),
}


def dense_arrays(heads, kv_heads, size, mask):
    arrays = {"q": random((BATCH, QUERIES, heads * size), "f32", 1),
              "k": random((BATCH, KEYS, kv_heads, size), "f32", 2),
              "v": random((BATCH, kv_heads, KEYS, size), "f32", 3)}
    if mask is not None:
        dtype_name, shape = mask
        arrays["mask"] = random(shape, "f32", 4) > -0.5
        if dtype_name != "bool":
            low = np.float32(np.finfo(np.float32).min)
            arrays["mask"] = np.where(arrays["mask"], np.float32(0), low)
    return arrays


def dense_body(heads, kv_heads, size, mask, **attributes):
    """Operands as exporters leave them: reshaped and transposed; heads side by side at the end."""
    q = leaf("q", "f32", BATCH, QUERIES, heads * size)
    k = leaf("k", "f32", BATCH, KEYS, kv_heads, size)
    v = leaf("v", "f32", BATCH, kv_heads, KEYS, size)
    inputs = [q, k, v] + ([leaf("mask", *mask[:1], *mask[1])] if mask else [])
    split = make("reshape", q, shape=(BATCH, QUERIES, heads, size))
    operands = [make("transpose", split, permutation=(0, 2, 1, 3)),
                make("transpose", k, permutation=(0, 2, 1, 3)), *inputs[2:]]
    result = make("attention", *operands, **attributes)
    moved = make("transpose", result, permutation=(0, 2, 1, 3))
    return inputs, make("reshape", moved, shape=(BATCH, QUERIES, heads * size))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("attributes", [{}, {"causal": True}, {"causal": True, "window": 20},
                                        {"window": 6, "softcap": 3.0}])
def test_dense(mask, attributes):
    arrays = dense_arrays(4, 2, 16, mask)
    inputs, output = dense_body(4, 2, 16, mask, **attributes)
    got = Harness(inputs, output)(**arrays)
    assert error(got, evaluate_exactly(output, arrays, {})) < TOLERANCE


@pytest.mark.parametrize("heads, kv_heads, size", [(1, 1, 3), (12, 12, 64), (8, 2, 33)])
def test_dense_sizes(heads, kv_heads, size):
    mask = MASKS["padding"]
    arrays = dense_arrays(heads, kv_heads, size, mask)
    inputs, output = dense_body(heads, kv_heads, size, mask)
    got = Harness(inputs, output)(**arrays)
    assert error(got, evaluate_exactly(output, arrays, {})) < TOLERANCE


def test_rows_that_see_nothing_are_zero():
    mask = ("bool", (BATCH, 1, QUERIES, KEYS))
    arrays = dense_arrays(4, 2, 16, mask)
    arrays["mask"][1, 0, 5] = False
    inputs, output = dense_body(4, 2, 16, mask)
    got = Harness(inputs, output)(**arrays)
    assert (got[1, 5] == 0).all()
    assert error(got, evaluate_exactly(output, arrays, {})) < TOLERANCE


def test_values_of_another_size_and_transposed_keys():
    q = leaf("q", "f32", 1, 2, 9, 16)
    k = leaf("k", "f32", 1, 2, 16, 40)
    v = leaf("v", "f32", 1, 2, 40, 24)
    output = make("attention", q, make("transpose", k, permutation=(0, 1, 3, 2)), v)
    arrays = {"q": random((1, 2, 9, 16), "f32", 1), "k": random((1, 2, 16, 40), "f32", 2),
              "v": random((1, 2, 40, 24), "f32", 3)}
    got = Harness([q, k, v], output)(**arrays)
    assert error(got, evaluate_exactly(output, arrays, {})) < TOLERANCE


def test_computed_operands_are_refused():
    q, k, v = (leaf(name, "f32", 1, 2, 8, 16) for name in "qkv")
    with pytest.raises(CompileError, match="computed by neg"):
        Harness([q, k, v], make("attention", make("neg", q), k, v))


# ---- views -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20), (6, 4, 5), (1, 6, 2, 10, 1), (3, 40)])
def test_reshape_of_a_strided_view(shape):
    """Whenever a view can be reshaped, its addresses are NumPy's."""
    base = np.arange(6 * 50)
    sliced = View.rows((6, 50)).slice((0, 10), (1, 2), (6, 20))
    elements = base.reshape(6, 50)[:, 10:50:2]
    view = sliced.reshape(shape)
    if shape == (3, 40):
        assert view is None
        return
    index = np.indices(shape, sparse=True)
    address = view.offset + sum(i * stride for i, stride in zip(index, view.strides, strict=True))
    np.testing.assert_array_equal(base[address], elements.reshape(shape))


def test_reshape_with_symbols():
    batch, length = symbol("batch"), symbol("length")
    view = View.rows((batch, length, 12)).reshape((batch * length, 3, 4))
    assert view.strides == (12, 4, 1)
    back = view.reshape((batch, length, 12))
    assert back.strides == (length * 12, 12, 1)
