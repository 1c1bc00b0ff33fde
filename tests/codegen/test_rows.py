"""map and reduce stages: tiles, threads, symbolic shapes, layouts, cache appends."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.ir.dims import symbol
from llmc.ir.dtypes import dtype
from llmc.ir.layouts import KeyPages, Panels, RowBlocks, Rows, ValuePages
from llmc.ir.ops import PAGE, constant, make
from tests.codegen.harness import (
    Runner,
    assert_close,
    check,
    leaf,
    random,
    reference,
    stage_program,
)

SIZES = (1, 3, 17, 33)
TOKENS = symbol("tokens", 0, 1000)
KEY = [("tokens", 0, 1000)]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("width", [1, 5, 64, 2048, 5000])
def test_every_shape_of_one_program(workers, width):
    x, y = leaf("x", "f32", TOKENS, width), leaf("y", "f32", width)
    outputs = {"out": make("add", x, y)}
    runner = Runner(stage_program("map", outputs, KEY), workers)
    rng = np.random.default_rng(0)
    for tokens in (0, 1, 3, 17, 33, 129):
        dims = {"tokens": tokens}
        arrays = {node["name"]: random(rng, node, dims) for node in (x, y)}
        got = runner.run(arrays, dims)["out"]
        assert_close(got, reference(outputs, arrays, dims)["out"], "f32")


def test_a_long_symbolic_row_is_shared_by_tiles():
    x = leaf("x", "f32", TOKENS)
    check("map", {"out": make("exp", x)}, {"tokens": 777}, KEY, workers=3)
    check("map", {"out": make("exp", x)}, {"tokens": 1}, KEY, workers=3)


def test_outputs_of_different_shapes():
    x = leaf("x", "f32", TOKENS, 96)
    parts = {"q": (0, 48), "k": (48, 80), "v": (80, 96)}
    outputs = {name: make("slice", x, starts=(0, start), stops=(TOKENS, stop))
               for name, (start, stop) in parts.items()}
    outputs["count"] = make("dim", value=TOKENS, dtype=dtype("f32"))
    for tokens in SIZES:
        check("map", outputs, {"tokens": tokens}, KEY, workers=3)


# ---- row-wise reductions ---------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype_name", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("width", [*SIZES, 2048])
def test_norms_and_softmax(width, dtype_name, workers):
    x, weight, bias = leaf("x", dtype_name, TOKENS, width), leaf("weight", dtype_name, width), \
        leaf("bias", dtype_name, width)
    outputs = {"rms": make("rms_norm", x, weight, epsilon=1e-5),
               "layer": make("layer_norm", x, weight, bias, epsilon=1e-5),
               "softmax": make("softmax", x, axis=-1)}
    for tokens in (1, 5):
        check("reduce", outputs, {"tokens": tokens}, KEY, workers=workers)


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_along_other_axes(axis):
    check("map", {"out": make("softmax", leaf("x", "f32", 5, 17, 9), axis=axis)})


def test_a_norm_sums_each_row_once():
    x, weight = leaf("x", "f32", TOKENS, 256), leaf("weight", "f32", 256)
    program = stage_program("reduce", {"out": make("rms_norm", x, weight, epsilon=1e-5)}, KEY)
    text = Runner(program).code.llvm
    assert text.count("@llvm.sqrt") <= 2  # one call and its declaration


@pytest.mark.parametrize("packed", [False, True])
def test_norms_of_heads_made_flat(packed):
    x, weight = leaf("x", "f32", TOKENS, 3 * 24), leaf("weight", "f32", 24)
    heads = make("reshape", x, shape=(TOKENS, 3, 24))
    out = make("reshape", make("rms_norm", heads, weight, epsilon=1e-5), shape=(TOKENS, 72))
    layouts = {"out": RowBlocks(6)} if packed else {}
    check("reduce", {"out": out}, {"tokens": 17}, KEY, layouts=layouts)


def test_softmax_over_a_symbolic_row():
    x = leaf("x", "f32", 3, TOKENS)
    for tokens in (1, 3, 17, 33, 100):
        check("reduce", {"out": make("softmax", x, axis=-1)}, {"tokens": tokens}, KEY)


def test_reductions_that_keep_no_axis():
    x = leaf("x", "f32", TOKENS, 33)
    outputs = {"max": make("reduce_max", x, axes=(1,), keep=False),
               "mean": make("reduce_mean", x, axes=(1,), keep=True)}
    for tokens in SIZES:
        check("reduce", outputs, {"tokens": tokens}, KEY)


# ---- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype_name", "interleave"), [("f32", 1), ("bf16", 2)])
@pytest.mark.parametrize("width", SIZES)
def test_packed_rows_are_padded_with_zeros(dtype_name, interleave, width):
    x, weight = leaf("x", dtype_name, TOKENS, width), leaf("weight", dtype_name, width)
    outputs = {"rows": make("rms_norm", x, weight, epsilon=1e-5)}
    layout = RowBlocks(6, interleave)
    runner = Runner(stage_program("reduce", outputs, KEY, {"rows": layout}), 3)
    rng = np.random.default_rng(0)
    for tokens in (1, 6, 13):
        dims = {"tokens": tokens}
        arrays = {node["name"]: random(rng, node, dims) for node in (x, weight)}
        got = runner.run(arrays, dims)["rows"]
        assert_close(got, reference(outputs, arrays, dims)["rows"], dtype_name)
        if width % interleave:
            flat = runner.memory["rows"].view(dtype(dtype_name).numpy)
            place = layout.address((tokens, width), (np.arange(tokens), width))
            assert not flat[place].astype(np.float32).any()


@pytest.mark.parametrize("layout", [Panels(16, 2), Panels(16, 1), Panels(12, 2, 2)])
def test_rows_of_a_packed_matrix_are_gathered(layout):
    packed, ids = leaf("packed", "bf16", 33, 50), leaf("ids", "i32", TOKENS)
    table = make("transpose", packed, permutation=(1, 0))
    check("map", {"out": make("gather", table, ids, axis=0)}, {"tokens": 3}, KEY,
          layouts={"packed": layout}, arrays={"ids": np.array([49, 0, 7], np.int32)})


# ---- appends to a cache ----------------------------------------------------------------------

POOL, HEADS, HEAD = 5, 2, 24


def append(name, values):
    state = leaf(name, values.dtype.name, POOL, PAGE, HEADS, HEAD)
    others = (leaf("page_table", "i32", 2, 2), leaf("sequence", "i32", TOKENS),
              leaf("positions", "i32", TOKENS))
    return make("cache_append", state, values, *others)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype_name", ["f32", "bf16"])
@pytest.mark.parametrize("layouts", [(Rows(), Rows()), (KeyPages(), ValuePages())])
def test_rope_and_append_in_one_stage(layouts, dtype_name, workers):
    qkv = leaf("qkv", dtype_name, TOKENS, 3 * HEADS * HEAD)
    angles = [leaf(name, "f32", TOKENS, HEAD // 2) for name in ("cos", "sin")]
    angles = [make("cast", angle, dtype=dtype(dtype_name)) for angle in angles]
    q, k, v = (make("reshape", make("slice", qkv, starts=(0, part * 48),
                                    stops=(TOKENS, (part + 1) * 48)),
                    shape=(TOKENS, HEADS, HEAD)) for part in range(3))
    outputs = {"q": make("rope", q, *angles), "k": append("k", make("rope", k, *angles)),
               "v": append("v", v)}
    program = stage_program("map", outputs, KEY, dict(zip("kv", layouts, strict=True)), ("k", "v"))
    rng, dims = np.random.default_rng(1), {"tokens": 9}
    arrays = {node["name"]: random(rng, node, dims) for node in program.steps[0].body.inputs}
    arrays |= {"page_table": np.array([[3, 1], [0, 4]], np.int32),
               "sequence": np.array([0] * 4 + [1] * 5, np.int32),
               "positions": np.array([30, 31, 32, 33, 0, 1, 2, 3, 63], np.int32)}
    got = Runner(program, workers).run(arrays, dims)
    wanted = reference(outputs, arrays, dims)
    for name in outputs:
        assert_close(got[name], wanted[name], dtype_name)


# ---- scalars and constants -------------------------------------------------------------------


def test_rank_zero_and_empty_results():
    x, y = leaf("x", "f32"), leaf("y", "f32", 0, 5)
    check("map", {"scalar": make("add", x, constant(1.0, "f32")), "empty": make("exp", y)})


def test_values_repeat_bit_for_bit():
    x, weight = leaf("x", "f32", TOKENS, 300), leaf("weight", "f32", 300)
    outputs = {"out": make("rms_norm", x, weight, epsilon=1e-5)}
    runner, dims = Runner(stage_program("reduce", outputs, KEY), 3), {"tokens": 50}
    arrays = {node["name"]: random(np.random.default_rng(0), node, dims) for node in (x, weight)}
    first = runner.run(arrays, dims)["out"].tobytes()
    assert all(runner.run(arrays, dims)["out"].tobytes() == first for _ in range(200))
    single = Runner(stage_program("reduce", outputs, KEY)).run(arrays, dims)["out"]
    assert single.tobytes() == first
