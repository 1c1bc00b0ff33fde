"""Every op of the expression emitter against the reference, at odd sizes."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.ir.dims import symbol
from llmc.ir.dtypes import dtype
from llmc.ir.ops import constant, make
from tests.codegen.harness import check, leaf, random, run

SIZES = (1, 3, 17, 33)
FLOATS = ("f32", "bf16", "f16", "f64")


@pytest.mark.parametrize("dtype_name", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_broadcasting_chain(dtype_name, size):
    x, y, z = leaf("x", dtype_name, 5, size), leaf("y", dtype_name, size), \
        leaf("z", dtype_name, 5, 1)
    check("map", {"out": make("mul", make("add", x, y), make("silu", z))})


UNARY = ("neg abs exp sqrt rsqrt reciprocal sin cos tanh erf floor ceil round sign relu sigmoid "
         "silu softplus gelu log").split()


@pytest.mark.parametrize("dtype_name", ("f32", "f64"))
def test_unary_functions(dtype_name):
    x = leaf("x", dtype_name, 3, 17)
    outputs = {op: make(op, x) for op in UNARY}
    outputs["gelu_tanh"] = make("gelu", x, approximate="tanh")
    check("map", outputs, low=0.25, high=3.0)


@pytest.mark.parametrize("dtype_name", ("i8", "i32", "i64", "u8", "u32"))
def test_integer_arithmetic(dtype_name):
    x, y = leaf("x", dtype_name, 3, 17), leaf("y", dtype_name, 17)
    outputs = {op: make(op, x, y)
               for op in ("add sub mul div floor_div mod max min and or xor "
                          "shift_left shift_right").split()}
    outputs |= {op: make(op, x) for op in ("abs", "sign", "not", "relu")}
    outputs["pow"] = make("pow", x, make("and", y, constant(7, dtype_name)))
    check("map", outputs)


def test_integer_division_by_zero_and_minus_one_does_not_trap():
    x, y = leaf("x", "i32", 4), leaf("y", "i32", 4)
    arrays = {"x": np.array([-2**31, 5, -2**31, 7], np.int32),
              "y": np.array([-1, 0, 0, -2], np.int32)}
    check("map", {op: make(op, x, y) for op in ("div", "floor_div", "mod")}, arrays=arrays)


def test_comparisons_and_booleans():
    x, y, flag = leaf("x", "i32", 3, 17), leaf("y", "i32", 17), leaf("flag", "bool", 3, 1)
    outputs = {op: make(op, x, y) for op in
               "equal not_equal less less_equal greater greater_equal".split()}
    outputs["logic"] = make("or", make("and", outputs["less"], flag), make("not", flag))
    outputs["where"] = make("where", flag, x, y)
    check("map", outputs)


def test_nan_wins_max_and_min_and_is_found():
    x, y = leaf("x", "f32", 4), leaf("y", "f32", 4)
    arrays = {"x": np.array([np.nan, 1, np.nan, 2], np.float32),
              "y": np.array([1, np.nan, np.nan, 3], np.float32)}
    outputs = {"max": make("max", x, y), "min": make("min", x, y)}
    got = check("map", {"nan": make("is_nan", x)}, arrays=arrays)
    assert got["nan"].tolist() == [True, False, True, False]
    got = check("map", outputs, arrays=arrays)
    assert np.isnan(got["max"]).tolist() == [True, True, True, False]


CASTS = [("f32", "bf16"), ("f32", "f16"), ("bf16", "f32"), ("f32", "i32"), ("i8", "f32"),
         ("u8", "i64"), ("i64", "i8"), ("bool", "f32"), ("f32", "bool"), ("i32", "bool"),
         ("f64", "f32"), ("f32", "f64"), ("i32", "u8")]


@pytest.mark.parametrize(("source", "target"), CASTS)
def test_casts(source, target):
    x = leaf("x", source, 3, 17)
    check("map", {"out": make("cast", x, dtype=dtype(target))})


@pytest.mark.parametrize("source", ["f8e4m3fn", "f8e5m2", "f8e4m3fnuz", "f8e5m2fnuz", "f8e8m0"])
def test_every_small_float_is_decoded(source):
    x = leaf("x", source, 256)
    bits = np.arange(256, dtype=np.uint8).view(dtype(source).numpy)
    check("map", {"out": make("cast", x, dtype=dtype("f32"))}, arrays={"x": bits})


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    x = leaf("x", "f32", 9)
    values = np.array([1.00390625, 1.01171875, -1.00390625, np.inf, -np.inf, np.nan, 3.4e38, 0.0,
                       -0.0], np.float32)
    got = run("map", {"out": make("cast", x, dtype=dtype("bf16"))}, {"x": values})["out"]
    wanted = values.astype(dtype("bf16").numpy)
    np.testing.assert_array_equal(np.delete(got, 5).view(np.uint16),
                                  np.delete(wanted, 5).view(np.uint16))
    assert np.isnan(np.float32(got[5]))


# ---- movement --------------------------------------------------------------------------------


@pytest.mark.parametrize("permutation", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_transpose(permutation):
    x = leaf("x", "f32", 3, 5, 17)
    check("map", {"out": make("transpose", x, permutation=permutation)})


@pytest.mark.parametrize(("old", "new"), [
    ((3, 48), (3, 3, 16)), ((3, 3, 16), (3, 48)), ((6, 17), (17, 6)), ((5, 1, 33), (5, 33)),
    ((5, 33), (5, 33, 1)), ((24, 16), (2, 3, 64)), ((2, 3, 64), (24, 16)), ((1,), ()), ((), (1, 1)),
    ((4, 6, 8), (4, 48)), ((4, 48), (4, 2, 24)), ((2, 3, 5), (30,)), ((7, 9), (3, 21))])
def test_reshape(old, new):
    x = leaf("x", "f32", *old)
    check("map", {"out": make("neg", make("reshape", x, shape=new))})


def test_reshape_with_symbols():
    tokens = symbol("tokens", 1, 100)
    x = leaf("x", "bf16", tokens, 48)
    y = make("reshape", make("transpose", make("reshape", x, shape=(tokens, 3, 16)),
                             permutation=(1, 0, 2)), shape=(3 * tokens, 16))
    for count in SIZES:
        check("map", {"out": y}, {"tokens": count}, [("tokens", 1, 100)])


@pytest.mark.parametrize(("starts", "stops", "steps"), [
    ((0, 8), (5, 33), (1, 1)), ((1, 3), (4, 20), (1, 1)), ((0, 1), (5, 32), (2, 3)),
    ((0, 2), (5, 30), (-1, -1))])
def test_slice(starts, stops, steps):
    x = leaf("x", "f32", 5, 33)
    check("map", {"out": make("slice", x, starts=starts, stops=stops, steps=steps)})


@pytest.mark.parametrize(("axis", "sizes"), [(0, (2, 1, 3)), (1, (16, 8, 24)), (1, (3, 17, 5))])
def test_concat(axis, sizes):
    shapes = [(size, 9) if axis == 0 else (4, size) for size in sizes]
    pieces = [leaf(f"x{i}", "f32", *shape) for i, shape in enumerate(shapes)]
    check("map", {"out": make("exp", make("concat", *pieces, axis=axis))})


def test_pad():
    x = leaf("x", "f32", 3, 17)
    outputs = {"rows": make("pad", x, constant(7.0, "f32"), low=(1, 0), high=(2, 0)),
               "both": make("pad", x, constant(-1.0, "f32"), low=(1, 3), high=(0, 2))}
    check("map", outputs)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather(axis):
    x, index = leaf("x", "f32", 9, 9, 17), leaf("index", "i64", 2, 3)
    positions = np.array([[0, 8, 3], [2, 2, 7]])
    check("map", {"out": make("gather", x, index, axis=axis)}, arrays={"index": positions})


@pytest.mark.parametrize("axis", [0, 1])
def test_gather_elements(axis):
    x, index = leaf("x", "f32", 5, 17), leaf("index", "i32", 3, 17)
    positions = np.arange(51, dtype=np.int32).reshape(3, 17) % 5
    check("map", {"out": make("gather_elements", x, index, axis=axis)}, arrays={"index": positions})


@pytest.mark.parametrize(("shape", "depth", "batch"), [((4, 2), 2, 0), ((5, 3, 1), 1, 1)])
def test_gather_nd(shape, depth, batch):
    x, index = leaf("x", "f32", 5, 6, 17), leaf("index", "i64", *shape)
    positions = np.arange(np.prod(shape)).reshape(shape) % 5
    out = make("gather_nd", x, index, batch_dims=batch)
    check("map", {"out": out}, arrays={"index": positions})


def test_gather_never_reads_outside():
    x, index = leaf("x", "f32", 4, 8), leaf("index", "i32", 3)
    program_index = np.array([-5, 1000000, 2], np.int32)
    values = random(np.random.default_rng(0), x)
    arrays = {"x": values, "index": program_index}
    got = run("map", {"out": make("gather", x, index, axis=0)}, arrays)["out"]
    np.testing.assert_array_equal(got, values[[0, 3, 2]])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "half"), [(16, 8), (64, 32), (6, 3), (24, 8), (10, 3)])
def test_rope(interleaved, size, half):
    tokens = 3
    x, cos, sin = leaf("x", "f32", tokens, 2, size), leaf("cos", "f32", tokens, half), \
        leaf("sin", "f32", tokens, half)
    check("map", {"out": make("rope", x, cos, sin, interleaved=interleaved)})


@pytest.mark.parametrize("axis", [0, 1])
def test_iota_and_constants(axis):
    x = leaf("x", "f32", 3, 17)
    numbers = make("iota", dtype=dtype("f32"), shape=(3, 17), axis=axis)
    table = constant(np.arange(17, dtype=np.float32) / 7)
    check("map", {"out": make("add", make("mul", x, numbers), table)})


def test_dim():
    tokens = symbol("tokens", 1, 100)
    x = leaf("x", "f32", tokens, 3)
    size = make("dim", value=2 * tokens + 1, dtype=dtype("f32"))
    for count in SIZES:
        check("map", {"out": make("div", x, size)}, {"tokens": count}, [("tokens", 1, 100)])


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group", [16, 5])
def test_dequantize(with_zeros, group):
    codes, scales = leaf("codes", "i8", 3, 33), leaf("scales", "f32", 3, -(-33 // group))
    zeros = [leaf("zeros", "f32", 3, -(-33 // group))] if with_zeros else []
    check("map", {"out": make("dequantize", codes, scales, *zeros, group=group)})


# ---- reductions inside an expression ---------------------------------------------------------

REDUCTIONS = ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod")


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize(("axes", "keep"), [((1,), True), ((0,), False), ((0, 1), False),
                                            ((2,), False), ((1, 2), True), ((0, 1, 2), False)])
def test_reductions_over_any_axes(op, axes, keep):
    x = leaf("x", "f32", 3, 5, 17)
    check("map", {"out": make(op, x, axes=axes, keep=keep)}, low=0.5, high=1.5)


def test_long_chains_of_ops_do_not_exhaust_the_stack():
    x = value = leaf("x", "f32", 3)
    for _ in range(3000):
        value = make("neg", value)
    check("map", {"out": make("add", value, x)})
