"""The matmul by a quantised weight against float64: codes of every kind, odd shapes, both forms."""

import re

import numpy as np
import pytest

from llmc.codegen.target import Target
from llmc.errors import CompileError
from llmc.ir.dtypes import dtype
from llmc.ir.ops import make
from tests.codegen.matmul_harness import Runner, assembly, leaf, make_stage, rows_symbol

FEW, MANY = (1, 2, 3, 7), (1, 5, 6, 17, 64)
CODES = ("i8", "u8", "i4", "u4", "i2", "u2")


def matrix(codes, zeros, group, k, n, scales="f32", wanted="f32"):
    """(inputs, the matrix[k, n] as lowering writes it)."""
    blocks = -(-k // group)
    inputs = [leaf("w", codes, k, n), leaf("scales", scales, blocks, n)]
    if zeros:
        inputs.append(leaf("zeros", zeros, blocks, n))
    operands = [make("transpose", each, permutation=(1, 0)) for each in inputs]
    whole = make("dequantize", *operands, group=group, dtype=dtype(wanted))
    return inputs, make("transpose", whole, permutation=(1, 0))


def stage_of(form, codes, zeros, group, k, n, scales="f32", activation="f32", target=None):
    inputs, w = matrix(codes, zeros, group, k, n, scales, activation)
    a = leaf("a", "f32" if form == "blocked" else activation,
             rows_symbol(4096 if form == "blocked" else 8), k)
    y = make("matmul", a, w, dtype=dtype("f32"))
    options = {"target": target} if target else {}
    return make_stage([a, *inputs], {"y": y}, blocked=form == "blocked", **options)


def values(stage, program, seed=0):
    """Random codes over their whole range, scales of either sign, zeros as the codes."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name in stage.operands:
        own, shape = program.buffers[name].type.dtype, program.buffers[name].type.shape
        if name == "a":
            continue
        if own.is_float:
            arrays[name] = rng.standard_normal(shape).astype(own.numpy)
        else:
            low = -(1 << own.bits - 1) if own.kind == "int" else 0
            arrays[name] = rng.integers(low, low + (1 << own.bits), shape).astype(own.numpy)
    return arrays


def dequantized(arrays, group):
    """The matrix in float64."""
    k = arrays["w"].shape[0]
    of_row = np.arange(k) // group
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    zeros = wide["zeros"][of_row] if "zeros" in wide else 0
    return (wide["w"] - zeros) * wide["scales"][of_row]


def check(result, a, w):
    """|error| <= k * 2^-24 * |a| @ |w|, as for floats, and the rounding of the scales."""
    exact = a.astype(np.float64) @ w
    bound = (a.shape[-1] + 2) * 2.0**-24 * (np.abs(a.astype(np.float64)) @ np.abs(w))
    error = np.abs(result.astype(np.float64) - exact)
    worst = np.unravel_index((error - bound).argmax(), error.shape)
    assert (error <= bound).all(), f"{error[worst]} at {worst}, bound {bound[worst]}"


def run_and_check(form, codes, zeros, group, k, n, sizes=None, **options):
    stage, program = stage_of(form, codes, zeros, group, k, n, **options)
    run, arrays = Runner(stage, program), values(stage, program)
    w = dequantized(arrays, group)
    rng = np.random.default_rng(1)
    for rows in sizes or (FEW if form == "few" else MANY):
        a = rng.standard_normal((rows, k)).astype(program.buffers["a"].type.dtype.numpy)
        check(run(rows, a=a, **arrays)["y"], a, w)


@pytest.mark.parametrize("form", ["few", "blocked"])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("zeros", [None, "own"])
def test_matches_float64(form, codes, zeros):
    of_zeros = zeros and f"{codes[0]}8"
    run_and_check(form, codes, of_zeros, 32, 75, 37)


@pytest.mark.parametrize("form", ["few", "blocked"])
@pytest.mark.parametrize("k, n, group", [(1, 1, 16), (33, 17, 16), (96, 24, 64), (70, 16, 128),
                                         (256, 32, 128)])
def test_groups(form, k, n, group):
    run_and_check(form, "i4", None, group, k, n)
    run_and_check(form, "u8", "u8", group, k, n)


@pytest.mark.parametrize("form", ["few", "blocked"])
@pytest.mark.parametrize("scales", ["f16", "bf16"])
@pytest.mark.parametrize("activation", ["f32", "f16", "bf16"])
def test_narrow_scales_and_activations(form, scales, activation):
    run_and_check(form, "u4", "u8", 32, 75, 33, scales=scales, activation=activation)


@pytest.mark.parametrize("zeros", ["f32", "f16"])
def test_zeros_between_codes(zeros):
    run_and_check("few", "u4", zeros, 16, 48, 20, sizes=(3,))


@pytest.mark.parametrize("form, sizes", [("few", (1, 4)), ("blocked", (17, 128))])
@pytest.mark.parametrize("codes", ["i4", "i8"])
@pytest.mark.parametrize("k, n", [(2048, 3072), (8192, 2048)])
def test_layers_of_1b(form, sizes, codes, k, n):
    run_and_check(form, codes, None, 32, k, n, sizes)


@pytest.mark.parametrize("form, rows", [("few", 1), ("few", 7), ("blocked", 17)])
@pytest.mark.parametrize("k, n", [(64, 24), (17, 8), (33, 13)])
def test_gate_and_up_in_one_tile(form, rows, k, n):
    count = rows_symbol(4096 if form == "blocked" else 8)
    inputs, w = matrix("u4", "u8", 16, k, 2 * n)
    a = leaf("a", "f32", count, k)
    y = make("matmul", a, w, dtype=dtype("f32"))
    gate, up = (make("slice", y, starts=(0, i * n), stops=(count, (i + 1) * n), steps=(1, 1))
                for i in (0, 1))
    stage, program = make_stage([a, *inputs], {"y": make("mul", make("relu", gate), up)},
                                blocked=form == "blocked", parts=2)
    arrays = values(stage, program)
    a = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
    product = a.astype(np.float64) @ dequantized(arrays, 16)
    exact = np.maximum(product[:, :n], 0) * product[:, n:]
    np.testing.assert_allclose(Runner(stage, program)(rows, a=a, **arrays)["y"], exact,
                               rtol=1e-5, atol=1e-2)


def test_groups_that_cut_a_lane_are_refused():
    with pytest.raises(CompileError, match="groups of 12"):
        Runner(*stage_of("few", "i4", None, 12, 24, 16))


def inner_loop(text):
    """The straight piece of code with the most multiply-adds: the body of the loop over k."""
    pieces = re.split(r"^\.?L?[\w.]+:.*$|^\s+(?:j\w+|b\.\w+|tbn?z|cbn?z)\s.*$", text,
                      flags=re.MULTILINE)
    return max(pieces, key=lambda piece: len(re.findall(r"fmadd|fmla", piece)))


@pytest.mark.parametrize("target", ["x86_64:znver3", "x86_64:skylake-avx512", "x86_64:znver5",
                                    "aarch64:neoverse-n1"])
@pytest.mark.parametrize("codes", ["i4", "u4", "i8"])
def test_inner_loop_is_multiply_adds_without_spills(target, codes):
    where = Target.parse(target)
    stage, program = stage_of("blocked", codes, None, 32, 2048, 256, target=where)
    loop = inner_loop(assembly(stage, program, where))
    assert len(re.findall(r"vfmadd\w+ps|fmla\s+v\d+\.4s", loop)) >= 48
    assert not re.search(r"\(%r[sb]p|\[sp", loop), loop
