"""Indexes outside the axis that they pick from: at import where they are constants, else when they
arrive."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.errors import ModelError, ShapeError
from llmc.runtime.inference_session import InferenceSession

DATA = np.arange(12, dtype=np.float32).reshape(4, 3)
TUPLES = np.array([[3, -3], [-4, 2]])


def session(op, constant=None, shape=("n", 3), **attributes):
    """One node over "data" with the index as an input, or this constant."""
    inputs = [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)]
    weights = [] if constant is None else [numpy_helper.from_array(np.array(constant), "index")]
    if constant is None:
        inputs.append(helper.make_tensor_value_info(
            "index", TensorProto.INT64, ["i"] if op == "Gather" else ["i", "j"]))
    names = ["data", "index"]
    if op.startswith("Scatter"):
        inputs.append(helper.make_tensor_value_info(
            "updates", TensorProto.FLOAT, ["i"] if op == "ScatterND" else ["i", "j"]))
        names.append("updates")
    graph = helper.make_graph([helper.make_node(op, names, ["y"], name="pick", **attributes)], "g",
                              inputs, [helper.make_empty_tensor_value_info("y")], weights)
    return InferenceSession(helper.make_model(graph).SerializeToString(), threads=1)


@pytest.mark.parametrize(("index", "wrong"), [([4], 4), ([0, -5], -5)])
def test_gather_checks_what_arrives(index, wrong):
    picking = session("Gather")
    np.testing.assert_array_equal(
        picking.run(None, {"data": DATA, "index": np.array([3, -4])})[0], DATA[[3, 0]])
    with pytest.raises(ShapeError, match=f"input index.*index {wrong} is outside an axis of 4"):
        picking.run(None, {"data": DATA, "index": np.array(index)})


def test_gather_elements_checks_what_arrives():
    picking = session("GatherElements", axis=1)
    [got] = picking.run(None, {"data": DATA, "index": np.array([[2, -3]] * 4)})
    np.testing.assert_array_equal(got, DATA[:, [2, 0]])
    with pytest.raises(ShapeError, match="index 3 is outside an axis of 3"):
        picking.run(None, {"data": DATA, "index": np.array([[2, 3]] * 4)})


def test_tuples_are_checked_by_axis():
    picking = InferenceSession(helper.make_model(helper.make_graph(
        [helper.make_node("GatherND", ["data", "index"], ["y"])], "g",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["n", 3]),
         helper.make_tensor_value_info("index", TensorProto.INT64, ["i", 2])],
        [helper.make_empty_tensor_value_info("y")])).SerializeToString(), threads=1)
    [got] = picking.run(None, {"data": DATA, "index": TUPLES})
    np.testing.assert_array_equal(got, [DATA[3, 0], DATA[0, 2]])
    with pytest.raises(ShapeError, match="index 3 is outside an axis of 3"):
        picking.run(None, {"data": DATA, "index": np.array([[3, 3]])})


def test_scatter_checks_what_arrives():
    updates = np.ones((1, 3), np.float32)
    writing = session("ScatterElements", axis=0)
    writing.run(None, {"data": DATA, "index": np.array([[3, -4, 0]]), "updates": updates})
    with pytest.raises(ShapeError, match="index -5 is outside an axis of 4"):
        writing.run(None, {"data": DATA, "index": np.array([[3, -5, 0]]), "updates": updates})


@pytest.mark.parametrize(("op", "index", "wrong"), [
    ("Gather", [4], r"\[4\]"), ("GatherElements", [[0, 1, -5]], "-5"),
    ("GatherND", [[3, 3]], "3"), ("ScatterND", [[4, 0]], "4"),
    ("ScatterElements", [[0, 4, 0]], "4")])
def test_constants_are_checked_at_import(op, index, wrong):
    with pytest.raises(ModelError, match=rf"'pick' \({op}\): index {wrong} is outside an axis"):
        session(op, index, shape=(4, 3))


def test_a_constant_makes_a_symbol_longer():
    picking = session("GatherND", [[5]])
    assert picking.run(None, {"data": np.ones((6, 3), np.float32)})[0].shape == (1, 3)
    with pytest.raises(ShapeError, match="n must be in 6"):
        picking.run(None, {"data": DATA})


def test_index_of_too_many_axes():
    with pytest.raises(ModelError, match="an index of 3 items for 2 axes"):
        session("GatherND", [[0, 0, 0]])
