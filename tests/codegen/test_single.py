"""argmax, cumsum, top_k and scatters against the reference, ties and NaN included."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.ir.dims import symbol
from llmc.ir.ops import make
from tests.codegen.harness import check, leaf, reference, run

DTYPES = ("f32", "bf16", "f64", "i32", "u8")
ROWS = symbol("rows", 0, 50)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("op", ["argmax", "argmin"])
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_argmax(op, dtype_name, axis, last):
    x = leaf("x", dtype_name, 5, 3, 17)
    check(op, {"out": make(op, x, axis=axis, last=last, keep=last)})


def test_argmax_of_special_values():
    rows = np.array([[1, np.nan, 3, np.nan], [-np.inf] * 4, [0.0, -0.0, 0.0, -1],
                     [np.inf, np.inf, 1, 2]], np.float32)
    x = leaf("x", "f32", 4, 4)
    for op in ("argmax", "argmin"):
        for last in (False, True):
            check(op, {"out": make(op, x, axis=1, last=last)}, arrays={"x": rows})


def test_argmax_of_a_symbolic_number_of_rows():
    x = leaf("x", "f32", ROWS, 33)
    for rows in (0, 1, 17):
        check("argmax", {"out": make("argmax", x, axis=1)}, {"rows": rows}, [("rows", 0, 50)], 3)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype_name", "axis"), [("f32", 1), ("i64", 0), ("f32", 2)])
def test_cumsum(dtype_name, axis, exclusive, reverse):
    x = leaf("x", dtype_name, 3, 17, 5)
    check("cumsum", {"out": make("cumsum", x, axis=axis, exclusive=exclusive, reverse=reverse)})


@pytest.mark.parametrize(("dtype_name", "axis", "exclusive"), [("f32", 1, True), ("i32", 0, False)])
def test_cumprod(dtype_name, axis, exclusive):
    x = leaf("x", dtype_name, 3, 17, 5)
    check("cumsum", {"out": make("cumprod", x, axis=axis, exclusive=exclusive)})


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize(("axis", "k"), [(1, 1), (1, 17), (0, 3)])
def test_top_k(dtype_name, axis, k):
    x = leaf("x", dtype_name, 5, 17)
    node = make("top_k", x, k=k, axis=axis)
    check("top_k", {"values": make("get", node, index=0), "where": make("get", node, index=1)})


def test_top_k_of_ties_and_nan():
    rows = np.array([[1, np.nan, 1, 2, np.nan, -0.0, 0.0, -np.inf]], np.float32)
    node = make("top_k", leaf("x", "f32", 1, 8), k=8, axis=1)
    outputs = {"where": make("get", node, index=1)}
    got = run("top_k", outputs, {"x": rows})
    np.testing.assert_array_equal(got["where"], reference(outputs, {"x": rows}, {})["where"])


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatters(reduction):
    rng = np.random.default_rng(0)
    x, index, updates = leaf("x", "f32", 5, 6, 7), leaf("index", "i64", 4, 2), \
        leaf("updates", "f32", 4, 7)
    places = rng.integers(0, 3, (4, 2))
    check("scatter", {"out": make("scatter_nd", x, index, updates, reduction=reduction)},
          arrays={"index": places})
    y, index, updates = leaf("y", "i32", 5, 9), leaf("index", "i32", 3, 9), \
        leaf("updates", "i32", 3, 9)
    places = rng.integers(0, 5, (3, 9)).astype(np.int32)
    check("scatter", {"out": make("scatter_elements", y, index, updates, axis=0,
                                  reduction=reduction)}, arrays={"index": places})
