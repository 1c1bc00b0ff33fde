"""Traced graphs with arrays in memory: compiled, run, saved; wrong arrays are named."""

from __future__ import annotations

import numpy as np
import pytest

import llmc
from llmc.errors import LlmcError, ShapeError
from llmc.frontend.trace import Tensor, parameter
from llmc.ir.dims import symbol


def scaled(x: Tensor) -> Tensor:
    return x @ parameter("w", "f32", (17, 3)) + parameter("b", "f32", (3,))


@pytest.fixture
def graph() -> llmc.Graph:
    return llmc.trace(scaled, llmc.Spec("x", "f32", (symbol("rows"), 17)))


def values(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"w": random.standard_normal((17, 3), np.float32),
            "b": random.standard_normal(3, np.float32)}


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_a_traced_graph_runs(graph, rows):
    x = np.random.default_rng(rows).standard_normal((rows, 17), np.float32)
    parameters = values()
    with llmc.Runtime(graph, parameters=parameters, threads=2) as runtime:
        got = runtime.run({"x": x})["output"]
    np.testing.assert_allclose(got, x @ parameters["w"] + parameters["b"], rtol=1e-5, atol=1e-5)


def test_the_cache_tells_parameters_apart(graph):
    x = np.eye(17, dtype=np.float32)
    for seed in (1, 2):
        with llmc.Runtime(graph, parameters=values(seed), threads=1) as runtime:
            got = runtime.run({"x": x})["output"]
        np.testing.assert_allclose(got, values(seed)["w"] + values(seed)["b"], rtol=1e-5)
    assert (llmc.compile(graph, parameters=values(1)).path
            == llmc.compile(graph, parameters=values(1)).path)


def test_a_compiled_graph_can_be_saved(graph, tmp_path):
    path = llmc.compile(graph, parameters=values()).save(tmp_path / "scaled.llmc")
    with llmc.Runtime(path, threads=1) as runtime:
        assert runtime.run({"x": np.ones((2, 17), np.float32)})["output"].shape == (2, 3)


@pytest.mark.parametrize(("change", "message"), [
    ({"w": None}, "needs values of w"), ({"extra": np.ones(1)}, "no parameter extra"),
    ({"w": np.ones((3, 17), np.float32)}, r"w must be f32\[17, 3\], got float32\[3, 17\]"),
    ({"b": np.ones(3)}, r"parameter b must be f32\[3\], got float64\[3\]"),
])
def test_wrong_parameters_are_named(graph, change, message):
    parameters = {k: v for k, v in (values() | change).items() if v is not None}
    with pytest.raises(ShapeError, match=message):
        llmc.Runtime(graph, parameters=parameters)


def test_parameters_and_dtypes_where_they_do_not_belong(graph, embedded_artifact):
    with pytest.raises(LlmcError, match="parameters are for a traced graph"):
        llmc.Runtime(embedded_artifact, parameters=values())
    with pytest.raises(LlmcError, match="traced graph computes in the dtypes"):
        llmc.compile(graph, dtype="bf16", parameters=values())
