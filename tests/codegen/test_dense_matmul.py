"""Products of computed tensors against f64, in every arrangement of axes."""

from __future__ import annotations

import re

import pytest

from llmc.codegen import generate
from llmc.codegen.target import Target
from llmc.ir.dims import symbol
from llmc.ir.dtypes import dtype
from llmc.ir.ops import constant, make
from tests.codegen.harness import check, leaf, stage_program

SHAPES = [((1, 1), (1, 1)), ((3, 17), (17, 33)), ((33, 5), (5, 1)), ((5, 33), (33, 600)),
          ((2, 3, 7, 17), (2, 3, 17, 9)), ((2, 1, 7, 17), (3, 17, 9)), ((7, 17), (4, 17, 9)),
          ((17,), (17, 9)), ((3, 17), (17,)), ((17,), (17,)), ((2, 5, 17), (17,)), ((3, 0), (0, 4))]


@pytest.mark.parametrize("dtype_name", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_shapes(left, right, dtype_name):
    check("dense_matmul", {"out": make("matmul", leaf("a", dtype_name, *left),
                                       leaf("b", dtype_name, *right))})


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype_name", ["f32", "bf16"])
def test_scores_read_keys_in_place(dtype_name, workers):
    tokens, context = symbol("tokens", 1, 100), symbol("context", 1, 100)
    q, k = leaf("q", dtype_name, tokens, 4, 24), leaf("k", dtype_name, context, 4, 24)
    q, k = make("transpose", q, permutation=(1, 0, 2)), make("transpose", k, permutation=(1, 2, 0))
    product = make("matmul", q, make("cast", k, dtype=dtype(dtype_name)))
    scaled = make("mul", product, constant(0.125, dtype_name))
    for dims in ({"tokens": 1, "context": 33}, {"tokens": 17, "context": 3}):
        check("dense_matmul", {"out": scaled}, dims, [("tokens", 1, 100), ("context", 1, 100)],
              workers)


@pytest.mark.parametrize("dtypes", [("i8", "i8"), ("u8", "i8"), ("i32", "i32"), ("i64", "i64")])
def test_integers(dtypes):
    a, b = leaf("a", dtypes[0], 5, 17), leaf("b", dtypes[1], 17, 9)
    target = "i64" if dtypes[0] == "i64" else "i32"
    check("dense_matmul", {"out": make("matmul", a, b, dtype=dtype(target))})
    swapped = make("transpose", leaf("b", dtypes[1], 9, 17), permutation=(1, 0))
    check("dense_matmul", {"out": make("matmul", a, swapped, dtype=dtype(target))})


def test_what_follows_is_fused():
    a, b, bias = leaf("a", "f32", 5, 17), leaf("b", "f32", 17, 9), leaf("bias", "f32", 9)
    product = make("matmul", a, b)
    check("dense_matmul", {"out": make("relu", make("add", product, bias)), "plain": product})


def test_sums_of_products_of_bytes_keep_all_lanes():
    """After the dot product instruction of bytes there are four sums or more to add up."""
    a, b = leaf("a", "u8", 1, 16), leaf("b", "i8", 1, 16)
    product = make("matmul", a, make("transpose", b, permutation=(1, 0)), dtype=dtype("i32"))
    wide = [make("cast", each, dtype=dtype("i32")) for each in (a, b)]
    total = make("reduce_sum", make("mul", *wide), axes=(1,), keep=False)
    target = Target.parse("x86_64:emeraldrapids")
    for kind, node in ("dense_matmul", product), ("reduce", total):
        text = generate(stage_program(kind, {"out": node}, target=target), target).asm()
        last = text.rsplit("vpdpbusd", 1)
        assert len(last) == 2
        assert len(re.findall("vpaddd|vphaddd", last[1].split("vmovd")[0])) >= 2
