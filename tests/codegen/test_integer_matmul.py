"""Products of integers by packed weights of integers: exact, whatever the shapes and types."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.codegen.target import Target
from llmc.driver import compile_imported
from llmc.frontend.traced_model import traced_model
from llmc.ir.dims import symbol
from llmc.ir.dtypes import dtype, f32, from_numpy, i32
from llmc.ir.graph import Graph, TensorType
from llmc.ir.ops import constant, make
from llmc.runtime.artifact import Artifact
from llmc.runtime.executor import Executor


def extremes(rng, dtype_name, shape):
    """Values over the whole range of 8 bits (of their difference from a zero point, in i16), the
    ends among them."""
    low, high = (0, 255) if dtype_name == "u8" else (-128, 127)
    if dtype_name == "i16":
        low, high = -255, 255
    values = rng.integers(low, high + 1, shape)
    values.flat[::3] = low
    values.flat[::5] = high
    return values.astype(dtype(dtype_name).numpy)


@pytest.fixture
def run(tmp_path):
    def run(x, weight, rows, zero=0):
        """0.5 * ((x - zero) @ weight), and the kinds of the stages that compute it."""
        own = make("input", name="x", type=TensorType(from_numpy(x.dtype), (rows, x.shape[1])))
        left = own
        if zero:
            wide = make("cast", own, dtype=dtype("i16"))
            left = make("sub", wide, constant(zero, dtype("i16")))
        kind = TensorType(from_numpy(weight.dtype), weight.shape)
        product = make("matmul", left, make("parameter", name="w", type=kind), dtype=i32)
        y = make("mul", make("cast", product, dtype=f32), constant(0.5, f32))
        model = traced_model(Graph("g", (own,), (("y", y),)), {"w": weight})
        compiled = compile_imported(model, Target.host())
        executor = Executor(Artifact(compiled.write(tmp_path / "model.llmc")), threads=2)
        stages = [stage.kind for stage in compiled.programs["generic"].stages()]
        try:
            return executor.run({"x": x})["y"], stages
        finally:
            executor.close()

    return run


@pytest.mark.parametrize(("left", "right"), [("u8", "i8"), ("i8", "i8"), ("u8", "u8"),
                                             ("i16", "i8"), ("i16", "i16")])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 17, 33), (7, 50, 16), (33, 129, 65)])
def test_products_are_exact(run, left, right, m, k, n):
    rng = np.random.default_rng(m)
    x, weight = extremes(rng, left, (m, k)), extremes(rng, right, (k, n))
    wanted = (x.astype(np.int64) @ weight.astype(np.int64)).astype(np.float32) * np.float32(0.5)
    rows = m if k % 2 else symbol("m", 1)
    got, stages = run(x, weight, rows)
    assert (got == wanted).all()
    assert "matmul" in stages and "dense_matmul" not in stages


@pytest.mark.parametrize("rows", (1, 33))
def test_zero_points_are_subtracted_on_the_way_in(run, rows):
    rng = np.random.default_rng(0)
    x, weight = extremes(rng, "u8", (rows, 40)), extremes(rng, "i8", (40, 17))
    got, stages = run(x, weight, rows, zero=131)
    wanted = (x.astype(np.int64) - 131) @ weight.astype(np.int64)
    assert (got == wanted.astype(np.float32) * np.float32(0.5)).all()
    assert len(stages) <= 2 and stages[-1] == "matmul"
