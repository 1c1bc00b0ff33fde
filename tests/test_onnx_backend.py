"""The Backend interface: prepare, run_model, run_node, supports_device."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

import llmc.onnx_backend as backend
from llmc.errors import ModelError, ShapeError


def model(*operators: str):
    """A chain of unary operators on x[2, 3]."""
    names = ["x", *(f"t{i}" for i in range(len(operators)))]
    nodes = [helper.make_node(op, [a], [b])
             for op, a, b in zip(operators, names, names[1:], strict=False)]
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, [2, 3])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


X = np.array([[1, 4, 9], [16, 25, 36]], np.float32)


@pytest.mark.parametrize("inputs", [[X], X, {"x": X}])
def test_prepare_and_run(inputs: object):
    outputs = backend.prepare(model("Sqrt", "Neg")).run(inputs)
    np.testing.assert_array_equal(outputs.t1, -np.sqrt(X))
    assert len(outputs) == 1


def test_run_model():
    (y,) = backend.run_model(model("Neg"), [X])
    np.testing.assert_array_equal(y, -X)


def test_run_node():
    (y,) = backend.run_node(helper.make_node("Add", ["a", "b"], ["c"]), [X, X[0]])
    np.testing.assert_array_equal(y, X + X[0])


def test_too_many_and_too_few_inputs():
    prepared = backend.prepare(model("Neg"))
    with pytest.raises(ShapeError, match="2 inputs for a model that takes 1: x"):
        prepared.run([X, X])
    with pytest.raises(ShapeError, match="missing input x"):
        prepared.run([])


def test_an_operator_that_is_missing_is_named():
    with pytest.raises(ModelError, match=r"unsupported operators: Nonsense \('t0'\)"):
        backend.prepare(model("Nonsense"))


def test_devices():
    assert backend.supports_device("CPU")
