"""Products of activations as int8 codes by quantised weights: against the interpreter, which does
the same arithmetic, on odd shapes, all codes, both forms."""

from __future__ import annotations

import re

import numpy as np
import pytest

from llmc.codegen import generate
from llmc.codegen.host import coded_matmul
from llmc.codegen.host.byte_dot import ByteDot
from llmc.codegen.llvm import splat_constant
from llmc.codegen.target import Target
from llmc.driver import compile_imported
from llmc.frontend.traced_model import traced_model
from llmc.ir.activation_codes import coded, without_codes
from llmc.ir.dims import symbol
from llmc.ir.dtypes import dtype, f32
from llmc.ir.graph import Graph, TensorType
from llmc.ir.interpret import interpret
from llmc.ir.ops import make
from llmc.ir.quantized import FLOAT_START, FLOAT_START_VALUE, Quantized, coded_rows
from llmc.passes.activation_codes import code_activations
from llmc.passes.lower import lower
from llmc.passes.pipeline import optimize
from llmc.runtime.artifact import Artifact
from llmc.runtime.executor import Executor

CODES = ("i8", "u8", "i4", "u4", "i2", "u2")
HOST = Target.host()
pytestmark = pytest.mark.skipif(not HOST.byte_dot, reason="this CPU has no products of bytes")


def graph_of(rows, k, n, codes, zeros, group, activation="f32", scales="f32"):
    """y = x @ (codes - zeros) * scales with coded activations."""
    x = make("input", name="x", type=TensorType(dtype(activation), (rows, k)))
    blocks = -(-k // group)
    leaves = [make("parameter", name=name, type=TensorType(dtype(kind), shape))
              for name, kind, shape in (("w", codes, (n, k)), ("scales", scales, (n, blocks)),
                                        ("zeros", zeros, (n, blocks))) if kind]
    matrix = Quantized(leaves[0], leaves[1], leaves[2] if zeros else None, group, f32).matrix()
    y = make("matmul", x, matrix, dtype=f32)
    return code_activations(Graph("g", (x,), (("y", y),)))


def weights_of(graph, rng):
    """Codes over their whole range, scales of either sign."""
    arrays = {}
    for leaf in graph.parameters():
        own, shape = leaf.dtype, leaf.shape
        if own.is_float:
            arrays[leaf["name"]] = rng.standard_normal(shape).astype(own.numpy)
        else:
            low = -(1 << own.bits - 1) if own.kind == "int" else 0
            arrays[leaf["name"]] = rng.integers(low, low + (1 << own.bits), shape).astype(own.numpy)
    return arrays


def magnitudes(x, weights):
    """|x| @ |w|: what the rounding errors of sums in f32 are a small part of."""
    group = -(-weights["w"].shape[1] // weights["scales"].shape[1])
    of_k = np.arange(weights["w"].shape[1])
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    block = of_k // max(1, group)
    size = np.abs(wide["w"]) + (np.abs(wide["zeros"])[:, block] if "zeros" in wide else 0) + 128
    return np.abs(x.astype(np.float64)) @ (size * np.abs(wide["scales"])[:, block]).T


@pytest.fixture
def check(tmp_path):
    def check(graph, sizes, kinds, seed=0, make_x=None):
        rng = np.random.default_rng(seed)
        weights = weights_of(graph, rng)
        compiled = compile_imported(traced_model(graph, weights), Target.host())
        assert [each.kind for each in compiled.programs["generic"].stages()] == kinds
        executor = Executor(Artifact(compiled.write(tmp_path / "m.llmc")), threads=2)
        try:
            for rows in sizes:
                x = rng.standard_normal((rows, graph.inputs[0].shape[1]))
                if make_x:
                    x = make_x(x)
                x = x.astype(graph.inputs[0].dtype.numpy)
                wanted = interpret(graph, {"x": x}, weights)["y"]
                got = executor.run({"x": x})["y"]
                error = np.abs(got - wanted)
                assert np.isfinite(wanted).all()
                assert (error <= 1e-6 * magnitudes(x, weights)).all(), error.max()
        finally:
            executor.close()

    return check


BLOCKED, FEW = ["coded_rows", "matmul"], ["matmul"]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("zeros", [None, "own", "f32"])
def test_many_rows(check, codes, zeros):
    of_zeros = f"{codes[0]}8" if zeros == "own" else zeros
    check(graph_of(symbol("m", 1), 75, 37, codes, of_zeros, 32), (1, 5, 6, 17, 64), BLOCKED)


@pytest.mark.parametrize("k", [512, 1152, 1280])
def test_long_rows_are_coded_in_pieces(check, k):
    check(graph_of(symbol("m", 1), k, 33, "i8", None, 128), (1, 5, 13, 32), BLOCKED)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("zeros", [None, "own"])
def test_few_rows(check, codes, zeros):
    of_zeros = f"{codes[0]}8" if zeros else None
    check(graph_of(symbol("m", 1, 4), 75, 37, codes, of_zeros, 32), (1, 2, 3, 4), FEW)


def emulated_dot(dot, e, total, column, bytes_):
    """vpdpbusd by plain operations."""
    def number(x):
        return splat_constant(total.type, x)

    for byte in range(4):
        unsigned = e.b.and_(e.b.lshr(column, number(8 * byte)), number(255))
        signed = e.b.ashr(e.b.shl(bytes_, number(24 - 8 * byte)), number(24))
        total = e.b.add(total, e.b.mul(unsigned, signed))
    return total


@pytest.mark.parametrize("codes, zeros", [("i8", None), ("i4", None), ("u4", "u8")])
def test_layouts_of_avx512_on_any_cpu(check, codes, zeros, monkeypatch):
    monkeypatch.setattr(ByteDot, "dot", emulated_dot)
    for name, value in (("vector_lanes", 16), ("byte_dot", "vnni"), ("bf16_dot", False)):
        monkeypatch.setattr(Target, name, value)
    for rows, kinds in ((13, BLOCKED), (3, FEW)):
        check(graph_of(rows, 75, 37, codes, zeros, 32), (rows,), kinds)
    for rows, k, group in ((29, 1100, 32), (17, 1300, 128)):
        check(graph_of(rows, k, 37, codes, zeros, group, scales="bf16"), (rows,), BLOCKED)


@pytest.mark.parametrize("rows, kinds", [(symbol("m", 1), BLOCKED), (symbol("m", 1, 4), FEW)])
@pytest.mark.parametrize("k, n, group", [(3, 2, 32), (17, 5, 32), (64, 33, 16), (130, 20, 64),
                                         (256, 24, 128), (300, 17, 300), (160, 16, 160),
                                         (97, 8, 192)])
def test_blocks_and_groups(check, rows, kinds, k, n, group):
    for codes in ("i8", "u4"):
        if group * dtype(codes).bits % 32 == 0:
            check(graph_of(rows, k, n, codes, None, group), (1, 3, 4), kinds)


@pytest.mark.parametrize("activation", ["f16", "bf16"])
@pytest.mark.parametrize("scales", ["f16", "bf16"])
def test_narrow_types(check, activation, scales):
    check(graph_of(symbol("m", 1), 96, 24, "i4", None, 32, activation, scales), (3, 20), BLOCKED)
    check(graph_of(3, 96, 24, "i4", None, 32, activation, scales), (3,), FEW)


@pytest.mark.parametrize("codes", ["i8", "u8", "u4"])
def test_extremes(check, codes):
    """The largest codes on both sides, all of one sign: no sum of pairs may saturate."""
    for scales in ("f32", "bf16"):
        check(graph_of(symbol("m", 1), 256, 16, codes, None, 128, scales=scales), (1, 7), BLOCKED,
              make_x=lambda x: np.full_like(x, -3.0))
    check(graph_of(2, 256, 16, codes, None, 128), (2,), FEW,
          make_x=lambda x: np.where(x > 0, 1e30, -1e30))
    check(graph_of(symbol("m", 1), 64, 16, codes, None, 32), (2,), BLOCKED,
          make_x=lambda x: np.zeros_like(x))


def test_a_block_with_an_infinity_is_nan(tmp_path):
    graph = graph_of(symbol("m", 1), 64, 8, "i8", None, 32)
    weights = weights_of(graph, np.random.default_rng(0))
    path = compile_imported(traced_model(graph, weights), HOST).write(tmp_path / "m.llmc")
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    x[1, 3], x[2, 40] = np.inf, np.nan
    executor = Executor(Artifact(path), threads=1)
    got, wanted = executor.run({"x": x})["y"], interpret(graph, {"x": x}, weights)["y"]
    executor.close()
    assert (np.isnan(got) == np.isnan(wanted)).all()
    assert np.isnan(got).all(1).tolist() == [False, True, True, False]


def test_a_norm_before_and_an_activation_behind_join_in(check):
    for rows, kinds in ((symbol("m", 1), BLOCKED), (3, FEW)):
        graph = graph_of(rows, 64, 48, "i8", None, 32)
        product = graph.outputs[0][1]
        weight = make("parameter", name="norm", type=TensorType(f32, (64,)))
        normed = make("rms_norm", product.inputs[0], weight, epsilon=1e-5)
        y = make("relu", make("matmul", normed, product.inputs[1], dtype=f32,
                              activation_block=32))
        graph = Graph("g", graph.inputs, (("y", y),))
        check(graph, (3,), kinds)


def test_error_of_codes_is_that_of_eight_bits():
    x = np.random.default_rng(0).standard_normal((16, 200)).astype(np.float32)
    rounded = coded(x, 32)
    largest = np.abs(np.pad(x, ((0, 0), (0, 24))).reshape(16, 7, 32)).max(-1).repeat(32, 1)[:, :200]
    assert (np.abs(rounded - x) <= largest / 127 * 0.5001).all()
    assert rounded.dtype == np.float32 and (np.abs(rounded - x) > 0).any()


def test_other_ops_do_the_same_where_there_is_no_kernel():
    graph = graph_of(symbol("m", 1), 75, 16, "i4", "i8", 32)
    node = graph.outputs[0][1]
    plain = Graph("g", graph.inputs, (("y", without_codes(node)),))
    rng = np.random.default_rng(0)
    weights, x = weights_of(graph, rng), rng.standard_normal((5, 75)).astype(np.float32)
    np.testing.assert_allclose(interpret(plain, {"x": x}, weights)["y"],
                               interpret(graph, {"x": x}, weights)["y"], rtol=1e-5, atol=1e-4)
    for target in ("x86_64:nehalem", "nvptx:sm_90a"):
        capabilities = Target.parse(target).capabilities()
        optimized = optimize(graph, capabilities)
        bodies = [node.bodies[0] for node in optimized.nodes() if node.op == "fusion"]
        products = [node for body in bodies for node in body.nodes() if node.op == "matmul"]
        assert [node["activation_block"] for node in products] == [0]


def inner_loop(text, instruction):
    pieces = re.split(r"^\.?L?[\w.]+:.*$|^\s+(?:j\w+|b\.\w+|tbn?z|cbn?z)\s.*$", text,
                      flags=re.MULTILINE)
    return max(pieces, key=lambda piece: len(re.findall(instruction, piece)))


@pytest.mark.parametrize("target, instruction, least, most", [
    ("x86_64:znver3", "vpmaddubsw", 48, 12), ("x86_64:alderlake", "vpdpbusd", 96, 32),
    ("x86_64:znver5", "vpdpbusd", 96, 0), ("x86_64:emeraldrapids", "vpdpbusd", 96, 0),
    ("x86_64:skylake-avx512", "vpmaddubsw", 48, 40), ("aarch64:neoverse-n1", "sdot", 64, 3)])
@pytest.mark.parametrize("codes, group", [("i4", 32), ("i8", 128)])
def test_inner_loop_is_dot_products_with_few_spills(target, instruction, least, most, codes,
                                                    group):
    where = Target.parse(target)
    capabilities = where.capabilities()
    graph = graph_of(symbol("m", 64, 512), 2048, 256, codes, None, group, scales="bf16")
    program = lower(optimize(graph, capabilities), capabilities, {"m": (512, 512)})
    loop = inner_loop(generate(program, where).asm(), instruction)
    assert len(re.findall(instruction, loop)) >= least
    assert len(re.findall(r"%rsp|\[sp", loop)) <= most
    assert not re.search("vcvtdq2ps|scvtf", loop)


@pytest.mark.parametrize("target, instruction, hints", [
    ("x86_64:znver3", "vpmaddubsw", {"t0"}), ("x86_64:znver5", "vpdpbusd", {"t0"}),
    ("x86_64:emeraldrapids", "vpdpbusd", {"t0", "t1"})])
@pytest.mark.parametrize("codes, rows", [("i4", 1), ("i8", 1), ("i8", 2)])
def test_few_rows_stream_codes_without_spills(target, instruction, hints, codes, rows):
    """All vectors of a panel together."""
    where = Target.parse(target)
    capabilities = where.capabilities()
    graph = graph_of(rows, 2048, 256, codes, None, 128, scales="f16")
    program = lower(optimize(graph, capabilities), capabilities, {})
    loop = inner_loop(generate(program, where).asm(), instruction)
    assert len(re.findall(instruction, loop)) >= 16 * rows
    assert set(re.findall(r"prefetch(t\d)", loop)) == hints
    assert not re.search(r"%rsp", loop), loop


def test_integers_start_as_floats_where_scales_are_short():
    capabilities = HOST.capabilities()
    starts = {}
    for zeros in (None, "u8"):
        for scales in ("f32", "f16", "bf16"):
            product = graph_of(4, 64, 16, "u8", zeros, 32, scales=scales).outputs[0][1]
            starts[zeros, scales] = coded_rows(product, capabilities, 4).start
    assert {kind for kind, start in starts.items() if start} == {(None, "f16"), (None, "bf16")}
    assert np.uint32(FLOAT_START).view(np.float32) == FLOAT_START_VALUE


@pytest.mark.parametrize("scales", ["f32", "bf16"])
@pytest.mark.parametrize("codes", ["i8", "u8", "i4"])
@pytest.mark.parametrize("k, group", [(1100, 32), (4224, 128), (520, 1040)])
def test_panels_of_several_pieces(check, scales, codes, k, group):
    """A piece in the middle, one at the end, and what is behind the last whole block."""
    check(graph_of(symbol("m", 1), k, 21, codes, None, group, scales=scales), (1, 7, 40), BLOCKED)


@pytest.mark.parametrize("k", [96, 1100])
def test_groups_of_row_blocks(check, k, monkeypatch):
    """Row blocks in groups of one and two; of one piece, and of several whose sums wait."""
    tile = HOST.capabilities().matmul_rows * HOST.capabilities().panel_columns * 4
    for held in (tile, 2 * tile):
        monkeypatch.setattr(coded_matmul, "SUMS_BYTES", held)
        check(graph_of(symbol("m", 1), k, 37, "i4", None, 32, scales="bf16"), (41,), BLOCKED)
