"""Matmul kernels for GPUs: assembled without one, compared with float64 where there is one."""

import numpy as np
import pytest
from matmul_on_device import MatmulStage, first_rows, product_body, rows_symbol, run_once

from llmc.codegen.nvptx import matmul_rows
from llmc.codegen.nvptx.matmul_loader import TileShape
from llmc.codegen.nvptx.matmul_tensor import TensorMatmul
from llmc.codegen.nvptx.matmul_tiles import (
    MOST_TILINGS,
    Tiling,
    choose_ranges,
    choose_tiling,
    estimate,
    tilings,
)
from llmc.codegen.nvptx.matvec import TensorMatvec
from llmc.errors import DeviceError
from llmc.ir.dims import evaluate
from llmc.ir.graph import Graph
from llmc.ir.interpret import interpret
from llmc.runtime.cuda_device import Device

pytest.importorskip("cuda.bindings.nvjitlink")

ASSEMBLED = [  # dtype, k, n, most rows, options
    ("bf16", 4096, 4096, 1, {"residual": True}), ("bf16", 2048, 16384, 8, {"gated": True}),
    ("f16", 33, 17, 16, {}), ("bf16", 4096, 4096, 64, {"residual": True}),
    ("bf16", 14336, 4096, 512, {"residual": True}), ("bf16", 4096, 28672, 2048, {"gated": True}),
    ("f16", 33, 17, 77, {}), ("f16", 264, 96, 300, {"result": "f32"}),
]
COMPUTED = [
    *(("bf16", k, n, rows, {"result": "f32"}) for k, n in ((33, 17), (128, 130), (264, 96))
      for rows in (1, 3, 8, 9, 16, 17, 33, 65, 129, 300)),
    *(("f16", 2048, 1024, rows, {"residual": True}) for rows in (1, 2, 7, 33, 64, 129, 512)),
    *(("bf16", 1024, 2048, rows, {"gated": True}) for rows in (1, 8, 16, 17, 64, 128, 513, 2047)),
]


@pytest.fixture(scope="module")
def gpu():
    """The first GPU; skips where there is none."""
    try:
        device = Device()
    except DeviceError as error:
        pytest.skip(f"no GPU: {error}")
    return device


def symbolic_rows(most):
    return rows_symbol(most) if most > 1 else 1


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype, k, n, rows, options", ASSEMBLED)
def test_assembles_without_spills(architecture, dtype, k, n, rows, options):
    body = product_body(dtype, k, n, symbolic_rows(rows), **options)
    stage = MatmulStage(*body, architecture=architecture, rows=(first_rows(rows), rows))
    assert isinstance(stage.kernel, TensorMatvec if rows <= 8 else TensorMatmul)
    assert stage.report.spill_bytes == stage.report.stack_bytes == 0
    assert stage.warnings == ()


def test_each_range_of_rows_has_its_kernel():
    stage = MatmulStage(*product_body("bf16", 1024, 4096, rows_symbol(8192, low=0)), rows=(0, 8192))
    kernels = stage.kernel.launches
    assert 4 <= len(kernels) <= 1 + MOST_TILINGS
    ranges = sorted(ends for kernel in kernels for ends in kernel.ranges)
    assert [first for first, _ in ranges] == [0, *(last + 1 for _, last in ranges[:-1])]
    assert ranges[0] == (0, 8) and ranges[-1][1] == 8192
    for number, own in enumerate(kernels):
        for rows in {max(1, end) for ends in own.ranges for end in ends}:
            blocks = [evaluate(kernel.blocks(), {"rows": rows}) for kernel in kernels]
            assert [other for other, count in enumerate(blocks) if count] == [number]
            assert blocks[number] == evaluate(own.kernel.blocks(), {"rows": rows})
    assert not any(evaluate(kernel.blocks(), {"rows": 0}) for kernel in kernels)


@pytest.mark.parametrize("k, n", [(2048, 2048), (2048, 16384), (8192, 2048), (4096, 28672)])
def test_few_tilings_lose_little_against_the_best(k, n):
    product = MatmulStage(*product_body("bf16", k, n, 300), rows=(300, 300)).kernel.product
    chosen = choose_ranges(product, "sm_90a", 9, 1 << 62)
    assert len(chosen) <= MOST_TILINGS
    for rows in (9, 64, 100, 128, 200, 300, 512, 1000, 2048, 5000):
        tiling = next(tiling for tiling, ranges in chosen.items()
                      if any(first <= rows <= last for first, last in ranges))
        assert estimate(product, tiling, rows) <= 1.25 * min(
            estimate(product, each, rows) for each in tilings(product, "sm_90a"))
    for rows in (9, 300, 2048):  # code for exactly so many rows has the best
        assert choose_ranges(product, "sm_90a", rows, rows) == {
            choose_tiling(product, "sm_90a", rows): [(rows, rows)]}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 9, 33, 64, 65, 129, 256, 300, 2049])
def test_all_ranges_against_float64(gpu, rows):
    check(gpu, "bf16", 264, 96, rows, {"result": "f32"}, (1, 4096))


def test_large_tiles_use_the_tensor_cores_of_the_architecture():
    body = product_body("bf16", 1024, 4096, rows_symbol(2048))
    assert "wgmma.mma_async" in MatmulStage(*body, architecture="sm_90a", rows=(257, 2048)).ptx
    older = MatmulStage(*body, architecture="sm_80", rows=(257, 2048)).ptx
    assert "wgmma" not in older and "mma.sync.aligned.m16n8k16" in older


def test_few_rows_stream_whole_pieces_of_the_weight():
    stage = MatmulStage(*product_body("bf16", 2048, 2048, 1), rows=(1, 1))
    assert "ld.global.nc.L1::no_allocate.L2::128B.v4.b32" in stage.ptx


def use_tiling(monkeypatch, tiling):
    """Let every range of rows have this tiling."""
    monkeypatch.setattr(matmul_rows, "choose_ranges", lambda *given: {tiling: [given[2:]]})


TALL = [Tiling(TileShape(320, 128, 640, 4), 1, 1, None),
        Tiling(TileShape(192, 128, 384, 5), 2, 1, None)]
SPLIT = [Tiling(TileShape(64, 64, 128, 4), 4, 1, None),
         Tiling(TileShape(32, 32, 128, 5), 2, 2, (2, 2)),
         Tiling(TileShape(128, 192, 256, 4), 8, 1, None)]


@pytest.mark.parametrize("tiling", SPLIT)
def test_clusters_share_out_k(monkeypatch, tiling):
    use_tiling(monkeypatch, tiling)
    stage = MatmulStage(*product_body("bf16", 1096, 200, rows_symbol(300)), rows=(257, 300))
    assert f".reqnctapercluster {tiling.split}" in stage.ptx
    assert stage.report.spill_bytes == 0 and stage.warnings == ()


@pytest.mark.parametrize("tiling", TALL)
@pytest.mark.parametrize("options", [{"residual": True}, {"gated": True}])
def test_tall_tiles_assemble_without_spills(monkeypatch, tiling, options):
    use_tiling(monkeypatch, tiling)
    stage = MatmulStage(*product_body("bf16", 1096, 400, rows_symbol(300), **options),
                        rows=(257, 300))
    assert stage.kernel.threads == 2 * tiling.shape.rows
    assert stage.report.spill_bytes == stage.report.stack_bytes == 0 and stage.warnings == ()


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [*SPLIT, *TALL])
@pytest.mark.parametrize("options", [{"result": "f32"}, {"gated": True}])
def test_clusters_against_float64(gpu, monkeypatch, tiling, options):
    if gpu.architecture != "sm_90a":
        pytest.skip("clusters and wgmma need sm_90a")
    use_tiling(monkeypatch, tiling)
    check(gpu, "bf16", 1096, 400, 300, options, (257, 300))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, k, n, rows, options", COMPUTED)
def test_against_float64(gpu, dtype, k, n, rows, options):
    check(gpu, dtype, k, n, rows, options, (first_rows(rows), rows))


def check(gpu, dtype, k, n, rows, options, limits):
    """A product's kernels against float64, and against themselves; limits: of the rows' symbol."""
    symbol = rows_symbol(limits[1], limits[0]) if rows > 1 else 1
    inputs, outputs = product_body(dtype, k, n, symbol, **options)
    rng = np.random.default_rng(0)
    arrays = {}
    for x in inputs:
        shape = [rows if not isinstance(dim, int) else dim for dim in x.shape]
        scale = k ** -0.5 if x["name"] == "w" else 1.0
        arrays[x["name"]] = (rng.standard_normal(shape) * scale).astype(x.dtype.numpy)
    fixed, expected = product_body(dtype, k, n, rows, **options)
    graph = Graph("body", tuple(fixed), tuple(expected.items()))
    exact = interpret(graph, arrays, exact=True)["result"].astype(np.float64)
    stage = MatmulStage(inputs, outputs, gpu.architecture, limits)
    result = run_once(gpu, stage, rows, arrays)
    error = np.linalg.norm(result.astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error <= (2e-6 if options.get("result") == "f32" else 4e-3)
    assert np.array_equal(result, run_once(gpu, stage, rows, arrays))

