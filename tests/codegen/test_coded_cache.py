"""paged_attention over caches of 8-bit codes with a scale for each token and head."""

import numpy as np
import pytest
from attention_harness import Harness, leaf, oracle, paged_case

from llmc.errors import GraphError
from llmc.ir.dtypes import bf16
from llmc.ir.layouts import KeyPages, ValuePages, pack, unpack
from llmc.ir.ops import OPS, PAGE, Context, make

MIX = [(3, 40), (1, 70), (17, 0), (1, 0), (33, 31)]


def coded_case(sequences, heads, kv_heads, size, seed=0, **attributes):
    """As paged_case, with codes and scales instead of keys and values, and these dequantised."""
    inputs, _, layouts, arrays, dense = paged_case(sequences, heads, kv_heads, size, seed=seed)
    shape = inputs[1].shape
    lengths = [new + past for new, past in sequences]
    for name, which in (("k", 0), ("v", 1)):
        floats = unpack(arrays[name], layouts[name], shape)
        largest = np.abs(floats).max(-1, keepdims=True)
        scales = (largest / 127).astype(bf16.numpy)  # of slots that no token fills: NaN
        with np.errstate(invalid="ignore"):
            codes = np.rint(floats / scales.astype(np.float32)).astype(np.int8)
        arrays[name] = pack(codes, layouts[name])
        arrays[f"{name}_scales"] = pack(scales, KeyPages())
        rounded = codes * scales.astype(np.float32)
        for index, length in enumerate(lengths):
            pages = arrays["page_table"][index][np.arange(length) // PAGE]
            dense[index][which] = rounded[pages, np.arange(length) % PAGE]
    inputs[1] = leaf("k", "i8", *shape)
    inputs[2] = leaf("v", "i8", *shape)
    inputs += [leaf(f"{name}_scales", "bf16", *shape[:3], 1) for name in "kv"]
    layouts |= {"k": KeyPages(), "v": ValuePages(), "k_scales": KeyPages(), "v_scales": KeyPages()}
    return inputs, make("paged_attention", *inputs, **attributes), layouts, arrays, dense


@pytest.mark.parametrize("heads, kv_heads, size, attributes", [
    (4, 4, 8, {}), (8, 2, 64, {}), (6, 2, 20, {}), (3, 1, 17, {}), (8, 2, 32, {"window": 20}),
    (8, 2, 32, {"softcap": 5.0}), (4, 2, 16, {"scale": 0.3})])
def test_equals_attention_over_what_the_codes_stand_for(heads, kv_heads, size, attributes):
    inputs, result, layouts, arrays, dense = coded_case(MIX, heads, kv_heads, size, **attributes)
    found = Harness(inputs, result, layouts=layouts)(**arrays)
    start = 0
    for (new, _), (keys, values) in zip(MIX, dense, strict=True):
        rows = slice(start, start + new)
        wanted = oracle(arrays["q"][rows], keys, values, attributes.get("scale", size**-0.5),
                        attributes.get("window", 0), attributes.get("softcap", 0.0))
        np.testing.assert_allclose(found[rows], wanted, atol=3e-6, rtol=3e-5)
        start += new


def test_the_reference_multiplies_codes_by_scales():
    inputs, result, layouts, arrays, _ = coded_case([(2, 33)], 4, 2, 16)
    shapes = {each["name"]: each.shape for each in inputs}
    given = [unpack(arrays[name], layouts[name], shapes[name]) if name in layouts else arrays[name]
             for name in shapes]
    wanted = OPS["paged_attention"].reference(result, given, Context(exact=True))
    found = Harness(inputs, result, layouts=layouts)(**arrays)
    np.testing.assert_allclose(found, wanted, atol=3e-6, rtol=3e-5)


def test_codes_need_scales_of_their_own():
    inputs, *_ = coded_case([(1, 5)], 4, 2, 16)
    with pytest.raises(GraphError):
        make("paged_attention", *inputs[:7])
    with pytest.raises(GraphError, match="keys and of values"):
        make("paged_attention", *inputs[:8])
    with pytest.raises(GraphError, match="one scale"):
        make("paged_attention", *inputs[:8], leaf("s", "bf16", *inputs[8].shape[:3], 2))
