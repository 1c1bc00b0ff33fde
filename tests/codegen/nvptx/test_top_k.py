"""top_k on GPUs: assembled without one, and compared with the reference where one is."""

import numpy as np
import pytest

import llmc
from llmc.codegen.nvptx import generate
from llmc.codegen.nvptx.assemble import is_available
from llmc.codegen.target import Target
from llmc.errors import DeviceError
from llmc.ir.dims import symbol
from llmc.ir.graph import Graph
from llmc.ir.interpret import allowed, interpret
from llmc.ir.ops import make
from llmc.runtime.cuda_device import Device
from tests.codegen.harness import leaf, stage_program

ROWS = symbol("rows", 1, 1 << 16)


def both(x, k, axis=1):
    node = make("top_k", x, k=k, axis=axis)
    return {"values": make("get", node, index=0), "where": make("get", node, index=1)}


@pytest.mark.skipif(not is_available(), reason="nvJitLink is not installed")
@pytest.mark.parametrize("dtype, size, axis", [("f32", 128, 1), ("bf16", 3000, 1), ("i64", 60, 0)])
def test_assembles_without_spills(dtype, size, axis):
    target = Target.parse("nvptx:sm_80,sm_90a")
    shape = (ROWS, size) if axis else (size, ROWS)
    program = stage_program("top_k", both(leaf("x", dtype, *shape), 8, axis),
                            (("rows", 1, 1 << 16),), target=target)
    for made in generate(program, target).assembled.values():
        assert all(kernel.spill_bytes == kernel.stack_bytes == 0 for kernel in made.report)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i64", "i8"])
@pytest.mark.parametrize("size, k, axis", [(1, 1, 1), (3, 3, 1), (17, 4, 1), (60, 4, 1),
                                           (128, 8, 1), (3001, 33, 1), (17, 4, 0)])
def test_against_the_reference(dtype, size, k, axis):
    try:
        Device()
    except DeviceError as error:
        pytest.skip(str(error))
    x = leaf("x", dtype, *((ROWS, size) if axis else (size, ROWS)))
    graph = Graph("top", (x,), tuple(both(x, k, axis).items()))
    rng = np.random.default_rng(0)
    with llmc.Runtime(graph, parameters={}, target="nvptx") as runtime:
        for rows in (1, 33):
            shape = (rows, size) if axis else (size, rows)
            values = rng.integers(-20, 20, shape).astype(x.dtype.numpy)  # many are equal
            if x.dtype.is_float and size > 4:
                values.flat[:3] = np.nan, np.inf, -np.inf
            with allowed():
                want = interpret(graph, {"x": values})
            got = runtime.run({"x": values})
            for name, array in want.items():
                np.testing.assert_array_equal(got[name].astype(np.float64),
                                              array.astype(np.float64))
