"""Matmul kernels for GPUs: assembled without one, compared with float64 where there is one."""

import numpy as np
import pytest
from matmul_on_device import MatmulStage, first_rows, product_body, rows_symbol, run_once

from llmc.codegen.nvptx import matmul_tensor
from llmc.codegen.nvptx.matmul_loader import TileShape
from llmc.codegen.nvptx.matmul_tensor import TensorMatmul
from llmc.codegen.nvptx.matmul_tiles import Tiling
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
    assert isinstance(stage.kernel, TensorMatvec if rows <= 16 else TensorMatmul)
    assert stage.report.spill_bytes == stage.report.stack_bytes == 0
    assert stage.warnings == ()


def test_each_range_of_rows_has_its_kernel():
    stage = MatmulStage(*product_body("bf16", 1024, 4096, rows_symbol(8192, low=0)), rows=(0, 8192))
    kernels = stage.kernel.launches
    for rows, chosen in ((0, None), (1, 0), (16, 0), (17, 1), (64, 1), (65, 2), (256, 2), (257, 3),
                         (512, 3), (513, 4), (1024, 4), (1025, 5), (8192, 5)):
        blocks = [evaluate(kernel.blocks(), {"rows": rows}) for kernel in kernels]
        assert [number for number, count in enumerate(blocks) if count] == (
            [] if chosen is None else [chosen])
        if chosen is not None:
            assert blocks[chosen] == evaluate(kernels[chosen].kernel.blocks(), {"rows": rows})


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 256, 257, 513, 1025, 2049])
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


SPLIT = [Tiling(TileShape(64, 64, 128, 4), 4, 1, None),
         Tiling(TileShape(32, 32, 128, 5), 2, 2, (2, 2)),
         Tiling(TileShape(128, 192, 256, 4), 8, 1, None)]


@pytest.mark.parametrize("tiling", SPLIT)
def test_clusters_share_out_k(monkeypatch, tiling):
    monkeypatch.setattr(matmul_tensor, "choose_tiling", lambda *_: tiling)
    stage = MatmulStage(*product_body("bf16", 1096, 200, rows_symbol(300)), rows=(257, 300))
    assert f".reqnctapercluster {tiling.split}" in stage.ptx
    assert stage.report.spill_bytes == 0 and stage.warnings == ()


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", SPLIT)
@pytest.mark.parametrize("options", [{"result": "f32"}, {"gated": True}])
def test_clusters_against_float64(gpu, monkeypatch, tiling, options):
    if gpu.architecture != "sm_90a":
        pytest.skip("clusters and wgmma need sm_90a")
    monkeypatch.setattr(matmul_tensor, "choose_tiling", lambda *_: tiling)
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

