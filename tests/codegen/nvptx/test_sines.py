"""Sines of angles of any size on GPUs: assembled without one, and compared with NumPy's where one
is."""

import numpy as np
import pytest

import llmc
from llmc.codegen.nvptx import generate
from llmc.codegen.nvptx.assemble import is_available
from llmc.codegen.target import Target
from llmc.errors import DeviceError
from llmc.ir.dims import symbol
from llmc.ir.graph import Graph
from llmc.ir.ops import make
from llmc.runtime.cuda_device import Device
from tests.codegen.harness import leaf, stage_program

ROWS = symbol("rows", 1, 1 << 16)


def both(dtype):
    x = leaf("x", dtype, ROWS, 33)
    return x, {"sine": make("sin", x), "cosine": make("cos", x)}


@pytest.mark.skipif(not is_available(), reason="nvJitLink is not installed")
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_assembles_without_spills(dtype):
    target = Target.parse("nvptx:sm_80,sm_90a")
    program = stage_program("map", both(dtype)[1], (("rows", 1, 1 << 16),), target=target)
    for made in generate(program, target).assembled.values():
        assert all(kernel.spill_bytes == kernel.stack_bytes == 0 for kernel in made.report)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_angles_of_all_sizes(dtype):
    try:
        Device()
    except DeviceError as error:
        pytest.skip(str(error))
    x, outputs = both(dtype)
    largest = np.log2(float(np.finfo(x.dtype.numpy).max))
    random = np.random.default_rng(0)
    values = random.choice([-1, 1], (301, 33)) * 2.0 ** random.uniform(-20, largest, (301, 33))
    values[0, :3] = np.nan, np.inf, -np.inf
    values = values.astype(x.dtype.numpy)
    with llmc.Runtime(Graph("sines", (x,), tuple(outputs.items())), parameters={},
                      target="nvptx") as runtime:
        got = runtime.run({"x": values})
    wide = values.astype(np.float64 if dtype == "f32" else np.longdouble)
    for name, function in (("sine", np.sin), ("cosine", np.cos)):
        with np.errstate(invalid="ignore"):
            want = function(wide)
        np.testing.assert_array_equal(np.isnan(got[name]), np.isnan(want))
        known = ~np.isnan(want)
        error = np.abs(got[name].astype(wide.dtype) - want)[known]
        assert (error <= 2 * np.spacing(np.abs(want[known]).astype(values.dtype))).all()
