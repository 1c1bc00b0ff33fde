"""Axes of size 0: every result is what onnx's reference evaluator gives, from the program that
serves the other sizes too; what has no value for no items is refused."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from llmc.errors import ModelError, ShapeError
from llmc.runtime.inference_session import InferenceSession

NONE = np.zeros(0, np.int64)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def ints(*items: int) -> np.ndarray:
    return np.array(items, np.int64)


def model(op, feeds, weights, attributes, outputs, empty):
    """One node whose inputs are `feeds`; their axes of size 0 are of size `empty`."""
    inputs = [helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(array.dtype),
        [empty if size == 0 else size for size in array.shape]) for name, array in feeds.items()]
    names = [name if name in feeds or name in weights else "" for name in "abcd"]
    while not names[-1]:
        names.pop()
    made = "yz"[:outputs]
    graph = helper.make_graph(
        [helper.make_node(op, names, list(made), name=op.lower(), **attributes)], "g", inputs,
        [helper.make_empty_tensor_value_info(name) for name in made],
        [numpy_helper.from_array(array, name) for name, array in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


# (operator, inputs, weights, attributes, number of outputs)
CASES = [
    ("MatMul", {"a": floats(0, 3), "b": floats(3, 4)}, {}, {}, 1),
    ("MatMul", {"a": floats(2, 0), "b": floats(0, 4)}, {}, {}, 1),
    ("MatMul", {"a": floats(2, 3), "b": floats(3, 0)}, {}, {}, 1),
    ("MatMul", {"a": floats(0, 2, 3)}, {"b": floats(3, 4)}, {}, 1),
    ("MatMul", {"a": floats(2, 0)}, {"b": floats(0, 4)}, {}, 1),
    ("MatMul", {"a": floats(2, 5, 0), "b": floats(2, 0, 4)}, {}, {}, 1),
    ("Gemm", {"a": floats(2, 0), "b": floats(0, 4)}, {"c": floats(4)}, {}, 1),
    ("Add", {"a": floats(0, 3), "b": floats(1, 3)}, {}, {}, 1),
    *((f"Reduce{kind}", {"a": floats(*shape)}, {"b": ints(axis)}, {}, 1)
      for kind, shape, axis in [
          ("Sum", (3, 0), 1), ("Sum", (0, 3), 0), ("Sum", (0, 3), 1), ("Mean", (3, 0), 1),
          ("Prod", (3, 0), 1), ("Prod", (0, 3), 0), ("Max", (0, 3), 0), ("Max", (0, 3), 1),
          ("Min", (3, 0), 1), ("L2", (3, 0), 1), ("LogSumExp", (3, 0), 1)]),
    ("ReduceSum", {"a": floats(2, 0, 3)}, {}, {"keepdims": 0}, 1),
    ("ReduceProd", {"a": floats(2, 0, 3)}, {}, {"keepdims": 0}, 1),
    ("Concat", {"a": floats(0, 3), "b": floats(2, 3)}, {}, {"axis": 0}, 1),
    ("Concat", {"a": floats(2, 3), "b": floats(2, 0)}, {}, {"axis": 1}, 1),
    ("Gather", {"a": floats(4, 3), "b": NONE}, {}, {"axis": 0}, 1),
    ("Gather", {"a": floats(0, 3), "b": ints(0, 2)}, {}, {"axis": 1}, 1),
    ("Gather", {"b": np.zeros((0, 4), np.int64)}, {"a": floats(300, 3)}, {"axis": 0}, 1),
    ("GatherElements", {"a": floats(4, 3), "b": np.zeros((0, 3), np.int64)}, {}, {"axis": 0}, 1),
    ("GatherND", {"a": floats(4, 3), "b": np.zeros((0, 1), np.int64)}, {}, {}, 1),
    ("Softmax", {"a": floats(0, 3)}, {}, {}, 1),
    ("Softmax", {"a": floats(3, 0)}, {}, {}, 1),
    ("LayerNormalization", {"a": floats(0, 3)}, {"b": floats(3), "c": floats(3)}, {}, 1),
    ("Transpose", {"a": floats(0, 3)}, {}, {"perm": [1, 0]}, 1),
    ("Reshape", {"a": floats(0, 3)}, {"b": ints(3, 0)}, {"allowzero": 1}, 1),
    ("Slice", {"a": floats(0, 3)}, {"b": ints(0), "c": ints(2), "d": ints(0)}, {}, 1),
    ("Expand", {"a": floats(1, 3)}, {"b": ints(0, 3)}, {}, 1),
    ("Pad", {"a": floats(0, 3)}, {"b": ints(1, 0, 1, 0)}, {}, 1),
    ("CumSum", {"a": floats(0, 3)}, {"b": np.array(0)}, {}, 1),
    ("ArgMax", {"a": floats(0, 3)}, {}, {"axis": 1}, 1),
    ("TopK", {"a": floats(0, 3)}, {"b": ints(2)}, {"axis": 1}, 2),
    ("TopK", {"a": floats(2, 3)}, {"b": ints(0)}, {"axis": 1}, 2),
    ("ScatterND", {"a": floats(4, 3), "b": np.zeros((0, 1), np.int64), "c": floats(0, 3)}, {}, {},
     1),
    ("NonZero", {"a": np.zeros((4, 3), np.float32)}, {}, {}, 1),
    ("NonZero", {"a": floats(0, 3)}, {}, {}, 1),
    ("Einsum", {"a": floats(2, 0), "b": floats(0, 3)}, {}, {"equation": "ij,jk->ik"}, 1),
    ("Conv", {"a": floats(0, 3, 5, 5)}, {"b": floats(4, 3, 3, 3)}, {}, 1),
    ("MaxPool", {"a": floats(0, 3, 5, 5)}, {}, {"kernel_shape": [2, 2]}, 1),
    ("Resize", {"a": floats(0, 1, 4, 4)}, {"c": np.array([1, 1, 2, 2], np.float32)}, {}, 1),
    ("Attention", {"a": floats(1, 2, 0, 8), "b": floats(1, 2, 4, 8), "c": floats(1, 2, 4, 8)}, {},
     {}, 1),
]


@pytest.mark.parametrize(("op", "feeds", "weights", "attributes", "outputs"), CASES,
                         ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
@pytest.mark.parametrize("empty", ["n", 0], ids=["symbol", "number"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_as_the_reference(op, feeds, weights, attributes, outputs, empty):
    proto = model(op, feeds, weights, attributes, outputs, empty)
    session = InferenceSession(proto.SerializeToString(), threads=1)
    expected = ReferenceEvaluator(proto).run(None, feeds)
    for got, wanted in zip(session.run(None, feeds), expected, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6, strict=True)


def session_of(op, feeds, weights, attributes, empty):
    return InferenceSession(
        model(op, feeds, weights, attributes, 1, empty).SerializeToString(), threads=1)


def test_one_program_for_all_sizes():
    session = session_of("MatMul", {"a": floats(0, 3)}, {"b": floats(3, 4)}, {}, "n")
    for rows in (0, 5, 1):
        [got] = session.run(None, {"a": floats(rows, 3)})
        np.testing.assert_allclose(got, floats(rows, 3) @ floats(3, 4), rtol=1e-5, strict=True)


def test_the_largest_of_nothing_is_refused():
    feeds = {"a": floats(0, 3)}
    with pytest.raises(ModelError, match=r"'argmax'.*takes 1 items of an axis of 0"):
        session_of("ArgMax", feeds, {}, {"axis": 0}, 0)
    with pytest.raises(ShapeError, match=r"axis 0 has 0, but n must be in 1\.\."):
        session_of("ArgMax", feeds, {}, {"axis": 0}, "n").run(None, feeds)


def test_what_is_taken_must_be_there():
    feeds = {"a": floats(0, 3)}
    with pytest.raises(ModelError, match=r"'topk'.*takes 4 items of an axis of 3"):
        session_of("TopK", feeds, {"b": ints(4)}, {"axis": 1}, "n")
    with pytest.raises(ShapeError, match=r"axis 0 has 0, but n must be in 4\.\."):
        session_of("TopK", feeds, {"b": ints(4)}, {"axis": 0}, "n").run(None, feeds)
    with pytest.raises(ShapeError, match=r"axis 0 has 0, but n must be in 2\.\."):
        session_of("Gather", feeds, {"b": ints(-2)}, {"axis": 0}, "n").run(None, feeds)


def test_unique_of_nothing():
    feeds = {"a": floats(0)}
    [got] = session_of("Unique", feeds, {}, {}, 0).run(None, feeds)
    assert got.shape == (0,)
    with pytest.raises(ShapeError, match="n must be in 1"):
        session_of("Unique", feeds, {}, {}, "n").run(None, feeds)


def test_no_batch_in_an_inferred_shape():
    for empty in ("n", 0):
        feeds = {"a": floats(0, 3, 2)}
        [got] = session_of("Reshape", feeds, {"b": ints(0, -1)}, {}, empty).run(None, feeds)
        assert got.shape == (0, 6)


def test_last_of_a_sequence_needs_one():
    nodes = [helper.make_node("Gather", ["a", "last"], ["y"], axis=0)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["seq", "b"])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.array(-1), "last")])
    session = InferenceSession(helper.make_model(graph).SerializeToString(), threads=1)
    assert session.run(None, {"a": floats(3, 0)})[0].shape == (0,)
    with pytest.raises(ShapeError, match="seq must be in 1"):
        session.run(None, {"a": floats(0, 3)})
