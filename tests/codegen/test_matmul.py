"""The packed matmul against float64: both forms, every weight dtype, odd shapes, 1B shapes."""

import re

import numpy as np
import pytest

from llmc.codegen.host import microkernel
from llmc.codegen.host.deep_matmul import DeepMatmul
from llmc.codegen.host.matmul import ASKING_LANES, body_sizes, matmul
from llmc.codegen.llvm import splat_constant
from llmc.codegen.target import Target
from llmc.errors import CompileError
from llmc.ir.dims import symbol
from llmc.ir.dtypes import dtype
from llmc.ir.ops import make
from tests.codegen.matmul_harness import Runner, assembly, leaf, make_stage, rows_symbol

DTYPES = ("f32", "bf16", "f16", "f64")
FEW = (1, 2, 3, 7, 8)
MANY = (1, 2, 7, 8, 17, 64, 129)
SHAPES = ((1, 1), (3, 5), (17, 33), (64, 48), (130, 40), (773, 24), (2048, 16))


def random(shape, name, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype(name).numpy)


def plain(form, dtype_name, k, n, rows=None, leading=()):
    """x @ w as a stage. few: rows in memory as the weight's dtype; blocked: packed rows."""
    blocked = form == "blocked"
    packed = "f64" if dtype_name == "f64" else "f32"
    rows = rows or rows_symbol(4096 if blocked else 8)
    a = leaf("a", packed if blocked else dtype_name, *leading, rows, k)
    w = leaf("w", dtype_name, k, n)
    y = make("matmul", a, w, dtype=dtype(packed))
    return Runner(*make_stage([a, w], {"y": y}, blocked=blocked))


def check(result, a, w):
    """|error| <= k * 2^-24 * |a| @ |w| (f64: 2^-53), the bound of any order of summation.

    Of wide results: the first and last columns, and some between.
    """
    if w.shape[1] > 200:
        columns = np.r_[:40, np.random.default_rng(0).integers(0, w.shape[1], 100), -40:0]
        result, w = result[..., columns], w[:, columns]
    exact = a.astype(np.float64) @ w.astype(np.float64)
    unit = 2.0**-53 if result.dtype == np.float64 else 2.0**-24
    bound = (a.shape[-1] + 1) * unit * (np.abs(a.astype(np.float64)) @ np.abs(
        w.astype(np.float64)))
    error = np.abs(result.astype(np.float64) - exact)
    worst = np.unravel_index((error - bound).argmax(), error.shape)
    assert (error <= bound).all(), f"{error[worst]} at {worst}, bound {bound[worst]}"


@pytest.mark.parametrize("form, sizes", [("few", FEW), ("blocked", MANY)])
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("k, n", SHAPES)
def test_matches_float64(form, sizes, dtype_name, k, n):
    run = plain(form, dtype_name, k, n)
    w = random((k, n), dtype_name, 1)
    for rows in sizes:
        a = random((rows, k), run.program.buffers["a"].type.dtype.name, rows)
        check(run(rows, a=a, w=w)["y"], a, w)


@pytest.mark.parametrize("form, sizes", [("few", (1, 2, 7, 8)), ("blocked", (17, 64, 129, 512))])
@pytest.mark.parametrize("dtype_name", ["f32", "bf16"])
@pytest.mark.parametrize("k, n", [(2048, 3072), (2048, 2048), (8192, 2048)])
def test_layers_of_1b(form, sizes, dtype_name, k, n):
    run = plain(form, dtype_name, k, n)
    w = random((k, n), dtype_name, 1)
    for rows in sizes:
        a = random((rows, k), run.program.buffers["a"].type.dtype.name, rows)
        check(run(rows, a=a, w=w)["y"], a, w)


def swiglu(form, dtype_name, k, n, result):
    rows = rows_symbol(4096 if form == "blocked" else 8)
    a = leaf("a", "f32", rows, k)
    w = leaf("w", dtype_name, k, 2 * n)
    y = make("matmul", a, w, dtype=dtype("f32"))
    gate, up = (make("slice", y, starts=(0, i * n), stops=(rows, (i + 1) * n), steps=(1, 1))
                for i in (0, 1))
    value = make("cast", make("mul", make("silu", gate), up), dtype=dtype(result))
    return Runner(*make_stage([a, w], {"y": value}, blocked=form == "blocked", parts=2))


@pytest.mark.parametrize("form, rows", [("few", 1), ("few", 7), ("blocked", 17)])
@pytest.mark.parametrize("result", ["f32", "bf16"])
@pytest.mark.parametrize("k, n", [(64, 24), (17, 8), (33, 13), (2048, 1024)])
def test_gate_and_up_in_one_tile(form, rows, result, k, n):
    run = swiglu(form, "bf16", k, n, result)
    a, w = random((rows, k), "f32", 1), random((k, 2 * n), "bf16", 2)
    product = a.astype(np.float64) @ w.astype(np.float64)
    gate, up = product[:, :n], product[:, n:]
    exact = gate / (1 + np.exp(-gate)) * up
    error = np.abs(run(rows, a=a, w=w)["y"].astype(np.float64) - exact)
    magnitude = np.abs(a) @ np.abs(w.astype(np.float64))
    slack = k * 2.0**-24 * (magnitude[:, :n] * np.abs(up) + magnitude[:, n:] * np.abs(gate) * 1.1)
    unit = 2.0**-8 if result == "bf16" else 2.0**-21
    assert (error <= slack + unit * np.abs(exact) + 1e-30).all()


@pytest.mark.parametrize("form, rows", [("few", 3), ("blocked", 19)])
@pytest.mark.parametrize("n", [32, 37])
def test_bias_activation_residual_and_cast(form, rows, n):
    count = rows_symbol(4096 if form == "blocked" else 8)
    a, w = leaf("a", "f32", count, 40), leaf("w", "bf16", 40, n)
    bias, residual = leaf("bias", "f32", n), leaf("residual", "bf16", count, n)
    product = make("matmul", a, w, dtype=dtype("f32"))
    activated = make("relu", make("add", product, bias))
    total = make("cast", make("add", activated, make("cast", residual, dtype=dtype("f32"))),
                 dtype=dtype("bf16"))
    run = Runner(*make_stage([a, w, bias, residual], {"y": total, "raw": activated},
                             blocked=form == "blocked"))
    arrays = {"a": random((rows, 40), "f32", 1), "w": random((40, n), "bf16", 2),
              "bias": random((n,), "f32", 3), "residual": random((rows, n), "bf16", 4)}
    wide = {name: value.astype(np.float64) for name, value in arrays.items()}
    exact = np.maximum(wide["a"] @ wide["w"] + wide["bias"], 0)
    results = run(rows, **arrays)
    np.testing.assert_allclose(results["raw"], exact, atol=2e-5)
    total_exact = exact + wide["residual"]
    error = np.abs(results["y"].astype(np.float64) - total_exact)
    assert (error <= 2.0**-8 * np.abs(total_exact) + 2e-5).all()


def test_norm_as_prologue():
    rows = rows_symbol(8)
    x, scale, w = leaf("x", "bf16", rows, 75), leaf("scale", "bf16", 75), leaf("w", "bf16", 75, 20)
    normed = make("rms_norm", x, scale, epsilon=1e-5)
    run = Runner(*make_stage([x, scale, w], {"y": make("matmul", normed, w, dtype=dtype("f32"))}))
    arrays = {"x": random((5, 75), "bf16", 1), "scale": random((75,), "bf16", 2),
              "w": random((75, 20), "bf16", 3)}
    wide = {name: value.astype(np.float64) for name, value in arrays.items()}
    mean = (wide["x"]**2).mean(-1, keepdims=True)
    normed_exact = wide["x"] / np.sqrt(mean + 1e-5) * wide["scale"]
    np.testing.assert_allclose(run(5, **arrays)["y"], normed_exact @ wide["w"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["few", "blocked"])
def test_leading_axes_are_rows(form):
    run = plain(form, "f32", 33, 20, rows=4, leading=(2,))
    a, w = random((2, 4, 33), "f32", 1), random((33, 20), "f32", 2)
    check(run(8, a=a, w=w)["y"], a, w)


def test_result_seen_with_another_shape():
    rows = rows_symbol(8)
    a, w = leaf("a", "f32", rows, 16), leaf("w", "f32", 16, 24)
    y = make("matmul", a, w, dtype=dtype("f32"))
    run = Runner(*make_stage([a, w], {"y": make("reshape", y, shape=(rows, 3, 8))}))
    arrays = {"a": random((3, 16), "f32", 1), "w": random((16, 24), "f32", 2)}
    check(run(3, **arrays)["y"].reshape(3, 24), arrays["a"], arrays["w"])


@pytest.mark.parametrize("form", ["few", "blocked"])
def test_no_rows_at_all(form):
    run = plain(form, "f32", 33, 20)
    assert run(0, a=random((0, 33), "f32", 1), w=random((33, 20), "f32", 2))["y"].shape == (0, 20)


def emulated_dot(e, accumulator, pairs, column):
    """What vdpbf16ps computes, in instructions that every CPU has."""
    for shift in (0, 16):
        factors = []
        for bits in (pairs, column):
            moved = bits if shift else e.b.shl(bits, splat_constant(bits.type, 16))
            high = e.b.and_(moved, splat_constant(bits.type, 0xFFFF0000))
            factors.append(e.b.bitcast(high, accumulator.type))
        accumulator = e.multiply_add(*factors, accumulator)
    return accumulator


@pytest.mark.parametrize("form, sizes", [("few", (1, 3, 4)), ("blocked", (5, 12, 29))])
@pytest.mark.parametrize("k, n", [(1, 3), (17, 33), (64, 64), (131, 40)])
def test_pairs_of_bf16_for_dot_products(form, sizes, k, n, monkeypatch):
    """The layouts of the dot path, on CPUs without the instruction too."""
    monkeypatch.setattr(microkernel, "dot_product", emulated_dot)
    a = leaf("a", "bf16", rows_symbol(4096 if form == "blocked" else 4), k)
    w = leaf("w", "bf16", k, n)
    run = Runner(*make_stage([a, w], {"y": make("matmul", a, w, dtype=dtype("f32"))},
                             blocked=form == "blocked", target=Target.parse("x86_64:znver5")))
    arrays = {"w": random((k, n), "bf16", 1)}
    for rows in sizes:
        arrays["a"] = random((rows, k), "bf16", rows)
        check(run(rows, **arrays)["y"], arrays["a"], arrays["w"])


@pytest.mark.parametrize("dtype_name, k, pieces", [
    ("bf16", 8224, 2), ("bf16", 8208, 1), ("f32", 8192, 4)])
def test_panels_beyond_the_cache_are_cut(dtype_name, k, pieces, monkeypatch):
    """Into equal pieces, or not at all."""
    monkeypatch.setattr(microkernel, "dot_product", emulated_dot)
    target = Target.parse("x86_64:znver5")
    a, w = leaf("a", dtype_name, rows_symbol(), k), leaf("w", dtype_name, k, 40)
    stage, program = make_stage([a, w], {"y": make("matmul", a, w, dtype=dtype("f32"))},
                                blocked=True, target=target)
    kernel = matmul(stage, program, target)
    assert (kernel.pieces if isinstance(kernel, DeepMatmul) else 1) == pieces
    run, weights = Runner(stage, program), random((k, 40), dtype_name, 1)
    for rows in (1, 29):
        left = random((rows, k), dtype_name, rows)
        check(run(rows, a=left, w=weights)["y"], left, weights)


def test_rows_do_not_depend_on_their_neighbours_or_workers():
    run = plain("blocked", "bf16", 70, 40)
    a, w = random((33, 70), "f32", 1), random((70, 40), "bf16", 2)
    whole = run(33, a=a, w=w)["y"]
    for workers in (1, 2, 5):
        np.testing.assert_array_equal(run(33, workers=workers, a=a, w=w)["y"], whole)
    np.testing.assert_array_equal(run(9, a=a[:9], w=w)["y"], whole[:9])


def test_not_elementwise_behind_the_product_is_refused():
    rows = rows_symbol(8)
    a, w = leaf("a", "f32", rows, 16), leaf("w", "f32", 16, 24)
    y = make("softmax", make("matmul", a, w, dtype=dtype("f32")), axis=1)
    with pytest.raises(CompileError, match="softmax"):
        Runner(*make_stage([a, w], {"y": y}))


# ---- golden properties of the code ---------------------------------------------------------


def inner_loop(text):
    """The straight piece of code with the most multiply-adds: the body of the loop over k."""
    return max(straight_pieces(text), key=multiply_adds)


def straight_pieces(text):
    """Assembly cut at labels and jumps."""
    return re.split(r"^\.?L?[\w.]+:.*$|^\s+(?:j\w+|b\.\w+|tbn?z|cbn?z)\s.*$", text,
                    flags=re.MULTILINE)


def on_stack(text, piece):
    """Whether a piece of assembly reads or writes the stack; %rbp is a register like others where
    no function keeps its frame there."""
    frame = r"|\(%rbp" if "%rsp, %rbp" in text else ""
    return re.search(r"\(%rsp|\[sp" + frame, piece)


def multiply_adds(piece):
    return len(re.findall(r"fmadd|fmla|dpbf16", piece))


CASES = {
    "x86_64:znver3 f32": (r"vfmadd\w+ps.*ymm", 48),
    "x86_64:znver3 bf16": (r"vfmadd\w+ps.*ymm", 48),
    "x86_64:znver3 f16": (r"vfmadd\w+ps.*ymm", 48),
    "x86_64:skylake-avx512 bf16": (r"vfmadd\w+ps.*zmm", 48),
    "x86_64:znver5 f32": (r"vfmadd\w+ps.*zmm", 48),
    "x86_64:znver5 bf16": (r"vdpbf16ps.*zmm", 48),
    "aarch64:neoverse-n1 f32": (r"fmla\s+v\d+\.4s", 48),
    "aarch64:neoverse-n1 bf16": (r"fmla\s+v\d+\.4s", 48),
}


@pytest.mark.parametrize("case", CASES)
def test_inner_loop_is_multiply_adds_without_spills(case):
    target, dtype_name = Target.parse(case.split()[0]), case.split()[1]
    pattern, least = CASES[case]
    packed = target.capabilities().packed_activation(dtype(dtype_name), dtype(dtype_name))
    a = leaf("a", packed, rows_symbol(), 2048)
    w = leaf("w", dtype_name, 2048, 256)
    y = make("matmul", a, w, dtype=dtype("f32"))
    stage, program = make_stage([a, w], {"y": y}, blocked=True, target=target)
    text = assembly(stage, program, target)
    loop = inner_loop(text)
    assert len(re.findall(pattern, loop)) >= least
    assert not on_stack(text, loop), loop


@pytest.mark.parametrize("target, dtype_name", [
    ("x86_64:znver3", "f32"), ("x86_64:znver5", "f32"), ("x86_64:znver5", "bf16"),
    ("x86_64:emeraldrapids", "bf16"), ("aarch64:neoverse-n1", "f32")])
@pytest.mark.parametrize("k", [2048, 16384])
def test_no_loop_of_any_tile_spills(target, dtype_name, k):
    """16384 k are more than a cache holds of a panel: see `DeepMatmul`."""
    where = Target.parse(target)
    packed = where.capabilities().packed_activation(dtype(dtype_name), dtype(dtype_name))
    a, w = leaf("a", packed, rows_symbol(), k), leaf("w", dtype_name, k, 256)
    stage, program = make_stage([a, w], {"y": make("matmul", a, w, dtype=dtype("f32"))},
                                blocked=True, target=where)
    text = assembly(stage, program, where)
    loops = [piece for piece in straight_pieces(text) if multiply_adds(piece) >= 24]
    assert len(loops) >= 4
    for loop in loops:
        # the next tile's panels are asked for into L2, where the CPU does that
        assert ("prefetcht1" in loop) == (where.capabilities().vector_lanes >= ASKING_LANES)
        assert not on_stack(text, loop), loop


@pytest.mark.parametrize("target, dtype_name, hints", [
    ("x86_64:znver3", "f32", {"t0"}), ("x86_64:znver5", "f32", {"t0"}),
    ("x86_64:znver5", "bf16", {"t0"}), ("x86_64:skylake-avx512", "f32", {"t0"}),
    ("x86_64:emeraldrapids", "bf16", {"t0"}), ("x86_64:emeraldrapids", "f32", {"t0"}),
    ("aarch64:neoverse-n1", "f32", set())])
def test_few_rows_stream_without_spills(target, dtype_name, hints):
    where = Target.parse(target)
    packed = where.capabilities().packed_activation(dtype(dtype_name), dtype(dtype_name))
    a, w = leaf("a", packed, rows_symbol(8), 2048), leaf("w", dtype_name, 2048, 256)
    stage, program = make_stage([a, w], {"y": make("matmul", a, w, dtype=dtype("f32"))},
                                target=where)
    text = assembly(stage, program, where)
    loops = [piece for piece in straight_pieces(text) if multiply_adds(piece) >= 8]
    assert len(loops) >= 3  # 1, 2 and 4 rows at least
    for loop in loops:
        assert set(re.findall(r"prefetch(t\d)", loop)) == hints
        assert not on_stack(text, loop), loop


def test_no_library_calls_on_the_oldest_cpu():
    target = Target.parse("x86_64:x86-64")
    a, w = leaf("a", "f32", rows_symbol(), 64), leaf("w", "bf16", 64, 64)
    y = make("matmul", a, w, dtype=dtype("f32"))
    stage, program = make_stage([a, w], {"y": y}, blocked=True, target=target)
    assert "call" not in assembly(stage, program, target)


@pytest.mark.parametrize(("most", "rows", "sizes"), [
    (6, 8, [4]), (6, 7, [3, 4]), (6, 13, [3, 5]), (12, 13, [6, 8]), (6, 1, [3]), (4, 9, [3]),
    (1, symbol("rows", 0), [1]), (2, symbol("rows", 0), [1, 2]),
    (6, symbol("rows", 0), [3, 4, 5, 6]), (12, symbol("rows", 0), [6, 8, 10, 12])])
def test_tiles_have_the_sizes_that_blocks_need(most, rows, sizes):
    assert body_sizes(most, rows) == sizes
