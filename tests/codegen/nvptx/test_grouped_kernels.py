"""Mixtures of experts on GPUs: kernels assembled without one, and compared with the references."""

import numpy as np
import pytest

import llmc
from llmc.codegen.nvptx import generate
from llmc.codegen.nvptx.assemble import is_available
from llmc.codegen.nvptx.grouped import grouped_matmul
from llmc.codegen.nvptx.matmul_tensor import TensorMatmul
from llmc.codegen.nvptx.matrix_vector import MatrixVector
from llmc.codegen.nvptx.matvec import TensorMatvec
from llmc.codegen.nvptx.tiled_matmul import TiledMatmul
from llmc.codegen.target import Target
from llmc.errors import DeviceError
from llmc.ir.dims import evaluate, symbol
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph
from llmc.ir.interpret import allowed, interpret
from llmc.ir.layouts import Columns
from llmc.ir.ops import make
from llmc.passes.pipeline import optimize
from llmc.runtime.cuda_device import Device
from tests.codegen.harness import leaf, stage_program
from tests.models.test_experts import mixture, random_case

assembled = pytest.mark.skipif(not is_available(), reason="nvJitLink is not installed")


def gated(kind, k, n, groups, rows):
    """A stage's body: silu(gate) * up of each row, by the matrices of its group."""
    leaves = [leaf("x", kind, rows, k), leaf("w", kind, k, 2 * groups * n),
              leaf("starts", "i32", groups + 1)]
    both = make("grouped_matmul", *leaves, groups=groups, parts=2)
    gate, up = (make("slice", both, starts=(0, first), stops=(rows, first + n), steps=(1, 1))
                for first in (0, n))
    return make("mul", make("silu", gate), up)


def stage(kind, k, n, groups, rows, target):
    return stage_program("grouped_matmul", {"y": gated(kind, k, n, groups, rows)},
                         (("rows", 1, 1 << 16),), {"w": Columns()}, target=target)


@assembled
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("kind, k, n, groups", [
    ("bf16", 1024, 3584, 8), ("f16", 33, 17, 60), ("f32", 64, 48, 4)])
def test_assembles_without_spills(architecture, kind, k, n, groups):
    target = Target.parse(f"nvptx:{architecture}")
    program = stage(kind, k, n, groups, symbol("rows", 1, 1 << 16), target)
    made = generate(program, target).assembled[architecture]
    assert len(made.report) == (2 if kind == "f32" else 4)
    assert all(kernel.spill_bytes == kernel.stack_bytes == 0 for kernel in made.report)
    assert not made.warnings


@assembled
def test_sorting_assembles_without_spills():
    node = make("group_rows", leaf("numbers", "i64", symbol("rows", 1, 1 << 16)), groups=60)
    outputs = {name: make("get", node, index=number)
               for number, name in enumerate(("order", "place", "starts"))}
    target = Target.parse("nvptx:sm_80,sm_90a")
    program = stage_program("group_rows", outputs, (("rows", 1, 1 << 16),), target=target)
    for made in generate(program, target).assembled.values():
        assert all(kernel.spill_bytes == kernel.stack_bytes == 0 for kernel in made.report)


@pytest.mark.parametrize("kind, kernels", [
    ("bf16", [TensorMatvec, TensorMatmul, TensorMatmul, TensorMatmul]),
    ("f32", [MatrixVector, TiledMatmul])])
def test_each_range_of_rows_has_its_kernel(kind, kernels):
    target = Target.parse("nvptx:sm_90a")
    program = stage(kind, 64, 48, 8, symbol("rows", 1, 1 << 16), target)
    launches = grouped_matmul(program.steps[0], program, target).launches
    assert [type(launch.kernel.kernel) for launch in launches] == kernels
    for rows in (1, 2, 32, 33, 256, 257, 1024, 1025, 1 << 16):
        (used,) = [each for each in launches if evaluate(each.blocks(), {"rows": rows})]
        assert any(first <= rows <= last for first, last in used.ranges)
        inner = used.kernel
        tiles = evaluate(used.blocks(), {"rows": rows}) // inner.columns // inner.split
        worst = min(rows, 7) + -(-(rows - min(rows, 7)) // inner.size)  # 7 groups have one row
        assert worst <= tiles <= rows


def test_a_token_reads_its_own_experts_only():
    target = Target.parse("nvptx:sm_90a")
    program = stage("bf16", 1024, 3584, 8, 2, target)
    (launch,) = grouped_matmul(program.steps[0], program, target).launches
    assert launch.blocks() == 2 * 3584 * 2 // 16


def test_experts_become_grouped_products():
    graph = optimize(mixture(4, 2, 33, 17), Target.parse("nvptx").capabilities())
    anchors = [node["anchor"] for node in graph.nodes() if node.op == "fusion"]
    assert anchors.count("grouped_matmul") == 2 and anchors.count("group_rows") == 1


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> None:
    """Skips where there is no GPU."""
    try:
        Device()
    except DeviceError as error:
        pytest.skip(str(error))


def compared(runtime, graph, inputs, parameters, kind):
    with allowed():
        want = interpret(graph, inputs, parameters, exact=True)["y"]
    got = runtime.run(inputs)["y"].astype(np.float64)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < {"f32": 1e-5, "f16": 3e-3, "bf16": 2e-2}[kind], (inputs["x"].shape, error)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("experts, chosen, hidden, inner", [
    (4, 1, 64, 48), (4, 2, 33, 17), (4, 4, 96, 80), (60, 1, 33, 17), (60, 2, 64, 48),
    (60, 4, 136, 72), (257, 2, 32, 16)])
def test_against_the_reference(gpu, kind, experts, chosen, hidden, inner):
    graph = mixture(experts, chosen, hidden, inner, kind)
    _, parameters = random_case(graph, experts, 1)
    with llmc.Runtime(graph, parameters=parameters, target="nvptx") as runtime:
        for tokens, crowd in ((1, False), (3, True), (17, False), (33, False), (33, True),
                              (129, True), (300, False)):
            inputs, _ = random_case(graph, experts, tokens, crowd)
            compared(runtime, graph, inputs, parameters, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_experts_that_nobody_chose_are_not_read(gpu, kind):
    graph = mixture(4, 2, 64, 48, kind)
    for tokens in (1, 6, 200):
        inputs, parameters = random_case(graph, 4, tokens, crowd=True)
        unused = sorted(set(range(4)) - set(inputs["numbers"][0]))
        with allowed():
            want = interpret(graph, inputs, parameters, exact=True)["y"]
        for matrix in parameters.values():
            matrix.reshape(4, -1)[unused] = np.nan
        with llmc.Runtime(graph, parameters=parameters, target="nvptx") as runtime:
            got = runtime.run(inputs)["y"].astype(np.float64)
        assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_a_product_read_as_a_whole_and_in_halves(gpu, parts):
    """However many parts the weight has."""
    rows, groups, k, n = symbol("rows"), 5, 40, 24
    weight = make("parameter", name="w", type=leaf("w", "bf16", k, 2 * groups * n).type)
    x, starts = leaf("x", "bf16", rows, k), leaf("starts", "i32", groups + 1)
    whole = make("grouped_matmul", x, weight, starts, groups=groups, parts=parts)
    low, high = (make("slice", whole, starts=(0, first), stops=(rows, first + n), steps=(1, 1))
                 for first in (0, n))
    given = np.random.default_rng(0)
    parameters = {"w": given.normal(size=(k, 2 * groups * n)).astype(dtype("bf16").numpy)}
    for outputs in ({"y": make("abs", whole)}, {"y": make("sub", low, high)}):
        graph = Graph("parts", (x, starts), tuple(outputs.items()))
        with llmc.Runtime(graph, parameters=parameters, target="nvptx") as runtime:
            for counts in ((0, 1, 0, 2, 0), (9, 0, 7, 1, 0), (3, 0, 70, 1, 90), (0, 0, 0, 0, 900)):
                inputs = {"x": given.normal(size=(sum(counts), k)).astype(dtype("bf16").numpy),
                          "starts": np.cumsum([0, *counts], dtype=np.int32)}
                compared(runtime, graph, inputs, parameters, "bf16")


@pytest.mark.gpu
def test_sorted_rows(gpu):
    """Exactly the reference's, of numbers that do not exist too."""
    numbers = leaf("numbers", "i64", symbol("rows"))
    for groups in (1, 5, 60):
        node = make("group_rows", numbers, groups=groups)
        graph = Graph("sorted", (numbers,), tuple(
            (name, make("get", node, index=number))
            for number, name in enumerate(("order", "place", "starts"))))
        with llmc.Runtime(graph, parameters={}, target="nvptx") as runtime:
            for rows in (1, 2, 17, 255, 257, 5000):
                given = np.random.default_rng(rows).integers(0, groups, rows) // 2 * 2
                with allowed():
                    want = interpret(graph, {"numbers": given})
                got = runtime.run({"numbers": given})
                assert all(np.array_equal(got[name], want[name]) for name in want)
