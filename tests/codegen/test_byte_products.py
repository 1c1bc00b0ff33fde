"""Products of 8-bit codes less their zero points, four bytes at a time; CPUs without such an
instruction multiply and add in its stead. Exact, whatever the shapes and types."""

from __future__ import annotations

import numpy as np
import pytest
from llvmlite import ir

from llmc.codegen.host.byte_dot import ByteDot
from llmc.codegen.llvm import I8, I32, vector
from llmc.codegen.target import Target
from llmc.driver import compile_imported
from llmc.frontend.traced_model import traced_model
from llmc.ir.dims import symbol
from llmc.ir.dtypes import dtype, f32, from_numpy, i16, i32
from llmc.ir.graph import Graph, TensorType
from llmc.ir.layouts import Panels
from llmc.ir.ops import constant, make
from llmc.runtime.artifact import Artifact
from llmc.runtime.executor import Executor


def multiply_and_add(self, e, total, column, bytes_):
    """What vpdpbusd does."""
    narrow, wide = vector(I8, 4 * self.lanes), vector(I32, 4 * self.lanes)
    products = e.b.mul(e.b.zext(e.b.bitcast(column, narrow), wide),
                       e.b.sext(e.b.bitcast(bytes_, narrow), wide))
    for byte in range(4):
        places = ir.Constant(ir.VectorType(I32, self.lanes), list(range(byte, 4 * self.lanes, 4)))
        total = e.b.add(total, e.b.shuffle_vector(products, products, places))
    return total


@pytest.fixture(autouse=True)
def instruction(monkeypatch):
    if Target.host().byte_dot not in ("vnni", "sdot"):
        monkeypatch.setattr(Target, "byte_dot", "vnni")
        monkeypatch.setattr(ByteDot, "dot", multiply_and_add)


def extremes(rng, dtype_name, shape):
    """Values over the whole range of 8 bits, its ends among them."""
    low, high = (0, 255) if dtype_name == "u8" else (-128, 127)
    values = rng.integers(low, high + 1, shape)
    values.flat[::3] = low
    values.flat[::5] = high
    return values.astype(dtype(dtype_name).numpy)


def centred(node, zero):
    if zero is None:
        return node
    return make("sub", make("cast", node, dtype=i16), zero)


def run(path, x, weight, rows, left_zero, right_zero):
    """0.5 * ((x - left zero) @ (weight - right zero)), computed from bytes."""
    own = make("input", name="x", type=TensorType(from_numpy(x.dtype), (rows, x.shape[1])))
    matrix = make("parameter", name="w", type=TensorType(from_numpy(weight.dtype), weight.shape))
    product = make("matmul", centred(own, left_zero), centred(matrix, right_zero), dtype=i32)
    y = make("mul", make("cast", product, dtype=f32), constant(0.5, f32))
    model = traced_model(Graph("g", (own,), (("y", y),)), {"w": weight})
    compiled = compile_imported(model, Target.host())
    buffers = compiled.programs["generic"].buffers.values()
    assert x.shape[1] == 1 or any(
        isinstance(buffer.layout, Panels) and buffer.layout.interleave == 4 for buffer in buffers)
    executor = Executor(Artifact(compiled.write(path / "model.llmc")), threads=2)
    try:
        return executor.run({"x": x})["y"]
    finally:
        executor.close()


ZEROS = {
    "u8": (None, 0, 131),
    "i8": (None, -3, 127),
}


@pytest.mark.parametrize("left", ["u8", "i8"])
@pytest.mark.parametrize("right", ["u8", "i8"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 17, 33), (33, 130, 65)])
def test_products_are_exact(tmp_path, left, right, m, k, n):
    rng = np.random.default_rng(m)
    x, weight = extremes(rng, left, (m, k)), extremes(rng, right, (k, n))
    own, other = ZEROS[left][m % 3], {"u8": 128, "i8": None}[right]
    if m == 3:  # a zero point for each column
        other = rng.integers(0, 100, n)
    rows = m if k % 2 else symbol("m", 1)
    got = run(tmp_path, x, weight, rows, *(None if zero is None else constant(
        np.asarray(zero, np.int16), i16) for zero in (own, other)))
    wanted = (x.astype(np.int64) - (own or 0)) @ (
        weight.astype(np.int64) - (0 if other is None else other))
    assert (got == wanted.astype(np.float32) * np.float32(0.5)).all()


def test_zero_points_of_rows_that_the_step_computes(tmp_path):
    rng = np.random.default_rng(5)
    x, weight = extremes(rng, "u8", (9, 20)), extremes(rng, "i8", (20, 40))
    own = make("input", name="x", type=TensorType(dtype("u8"), (9, 20)))
    zeros = make("input", name="zeros", type=TensorType(dtype("u8"), (9, 1)))
    matrix = make("parameter", name="w", type=TensorType(dtype("i8"), (20, 40)))
    product = make("matmul", centred(own, make("cast", zeros, dtype=i16)), matrix, dtype=i32)
    model = traced_model(Graph("g", (own, zeros), (("y", product),)), {"w": weight})
    compiled = compile_imported(model, Target.host())
    executor = Executor(Artifact(compiled.write(tmp_path / "model.llmc")), threads=2)
    points = rng.integers(0, 256, (9, 1)).astype(np.uint8)
    got = executor.run({"x": x, "zeros": points})["y"]
    executor.close()
    assert (got == (x.astype(np.int32) - points) @ weight.astype(np.int32)).all()
