"""Host attention that multiplies pairs of bf16, as CPUs with such an instruction do; on others the
instruction is replaced by two multiply-adds."""

import numpy as np
import pytest
from attention_harness import Harness, evaluate_exactly, leaf, oracle, paged_case, random
from test_coded_cache import coded_case

from llmc.codegen.host import attention_blocks
from llmc.codegen.llvm import F32, splat_constant, vector
from llmc.codegen.target import Target
from llmc.ir.dtypes import dtype
from llmc.ir.ops import make

LANES = 16
MIX = [(7, 30), (33, 0), (2, 200), (1, 31), (129, 5), (2, 64)]
ROUNDED = 2.0**-8  # of the largest value: weights have 8 bits


def two_multiply_adds(e, accumulator, pairs, column):
    wide = vector(F32, accumulator.type.count)
    for part in (lambda word: e.b.shl(word, splat_constant(word.type, 16)),
                 lambda word: e.b.and_(word, splat_constant(word.type, 0xFFFF0000))):
        accumulator = e.fma(e.b.bitcast(part(pairs), wide), e.b.bitcast(part(column), wide),
                            accumulator)
    return accumulator


@pytest.fixture(autouse=True)
def instruction(monkeypatch):
    if not Target.host().bf16_dot:
        monkeypatch.setattr(attention_blocks, "dot_product", two_multiply_adds)
        monkeypatch.setattr(attention_blocks, "rounded_to_bf16",
                            lambda e, value: e.f32_to_bf16(value))


def compiled(inputs, result, **options):
    wide = make("cast", result, dtype=dtype("f32"))
    harness = Harness(inputs, wide, lanes=LANES, bf16_dot=True, **options)
    assert harness.kernel.pairs
    return harness


def check(found, wanted):
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() < ROUNDED * np.abs(wanted).max()


@pytest.mark.parametrize("heads, kv_heads, size, attributes", [
    (1, 1, 8, {}), (8, 2, 64, {}), (6, 2, 20, {}), (5, 1, 66, {}), (8, 2, 32, {"window": 33}),
    (4, 4, 32, {"window": 40, "softcap": 5.0}), (4, 2, 16, {"scale": 0.3})])
def test_paged(heads, kv_heads, size, attributes):
    inputs, result, layouts, arrays, dense = paged_case(MIX, heads, kv_heads, size, "bf16",
                                                        **attributes)
    found = compiled(inputs, result, layouts=layouts)(**arrays)
    starts = arrays["offsets"]
    options = {"scale": size**-0.5} | attributes
    check(found, np.concatenate([oracle(arrays["q"][starts[i]:starts[i + 1]], *pair, **options)
                                 for i, pair in enumerate(dense)]))


def test_codes():
    _, _, _, floats, _ = paged_case(MIX, 8, 2, 64, "bf16")
    inputs, _, layouts, arrays, dense = coded_case(MIX, 8, 2, 64)
    inputs[0] = leaf("q", "bf16", *inputs[0].shape)
    arrays["q"] = floats["q"]
    found = compiled(inputs, make("paged_attention", *inputs), layouts=layouts)(**arrays)
    starts = arrays["offsets"]
    check(found, np.concatenate([oracle(arrays["q"][starts[i]:starts[i + 1]], *pair, 64**-0.5)
                                 for i, pair in enumerate(dense)]))


@pytest.mark.parametrize("attributes", [{}, {"causal": True, "window": 9}])
@pytest.mark.parametrize("heads, kv_heads, size", [(2, 2, 2), (4, 2, 24), (6, 2, 64)])
def test_packed(heads, kv_heads, size, attributes):
    tokens = 140
    q, k, v = (leaf(name, "bf16", tokens, count, size)
               for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
    offsets = leaf("offsets", "i32", 5)
    result = make("packed_attention", q, k, v, offsets, **attributes)
    arrays = {node["name"]: random(node.shape, "bf16", seed)
              for seed, node in enumerate((q, k, v))}
    arrays["offsets"] = np.array([0, 1, 18, 51, 140], np.int32)
    found = compiled([q, k, v, offsets], result)(**arrays)
    check(found, evaluate_exactly(result, arrays, {}))


@pytest.mark.parametrize("mask", [("bool", (2, 1, 1, 75)), ("f32", (2, 4, 37, 75))])
def test_dense_with_a_mask(mask):
    q, k, v = (leaf(name, "bf16", 2, 4, count, 16)
               for name, count in (("q", 37), ("k", 75), ("v", 75)))
    hidden = leaf("mask", mask[0], *mask[1])
    result = make("attention", q, k, v, hidden)
    arrays = {node["name"]: random(node.shape, "bf16", seed)
              for seed, node in enumerate((q, k, v))}
    values = random(mask[1], "f32", 7)
    arrays["mask"] = values > -1 if mask[0] == "bool" else values
    check(compiled([q, k, v, hidden], result)(**arrays), evaluate_exactly(result, arrays, {}))


def test_odd_sizes_and_other_dtypes_are_multiplied_as_f32():
    for dtype_name, size in (("bf16", 7), ("f16", 8), ("f32", 8)):
        inputs, result, layouts, _, _ = paged_case([(2, 3)], 2, 2, size, dtype_name)
        harness = Harness(inputs, result, layouts=layouts, lanes=LANES, bf16_dot=True)
        assert not harness.kernel.pairs


