"""Loops whose turns nobody can count before they run: one program for the body, turned by the host;
against onnx's reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from llmc.errors import ModelError, ShapeError
from llmc.runtime import staged
from llmc.runtime.inference_session import InferenceSession

I64, F32, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL
WEIGHT = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) / 4


def tensor(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes, inputs, outputs, **weights):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [
        numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def constant(name, array):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def halving():
    """x @ w again and again while its largest item is above a limit; puts out the largest rows.

    (The reference stacks what turns put out rightly only where that has one axis.)
    """
    body = helper.make_graph(
        [node("MatMul", "h w", "next"), node("ReduceMax", "next rows", "top", keepdims=0),
         node("ReduceMax", "top", "most", keepdims=0), node("Greater", "most limit", "more")],
        "body",
        [tensor("turn", I64), tensor("go", BOOL), tensor("h", F32, None, 4)],
        [tensor("more", BOOL), tensor("next", F32, None, 4), tensor("top", F32, 4)])
    loop = helper.make_node("Loop", ["trips", "start", "x"], ["y", "tops"], body=body, name="loop")
    return model_of(
        [node("Abs", "given", "x"), loop, node("Add", "y one", "z")],
        [tensor("given", F32, "n", 4), tensor("trips", I64), tensor("start", BOOL),
         tensor("limit", F32)],
        [tensor("z", F32, None, 4), tensor("tops", F32, None, 4)],
        w=np.abs(WEIGHT), one=np.float32(1), rows=np.array([0]))


def check(model, feeds):
    session = InferenceSession(model.SerializeToString(), threads=1)
    for given in feeds:
        expected = ReferenceEvaluator(model).run(None, given)
        for got, wanted in zip(session.run(None, given), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6, strict=True)
    return session


@pytest.fixture
def compilations(monkeypatch):
    """A list that grows by one for every program that is made."""
    made = []
    whole = staged.StagedModel._compile
    monkeypatch.setattr(staged.StagedModel, "_compile",
                        lambda self, values: made.append(values) or whole(self, values))
    return made


def given_to_halving(rows, trips, limit, start=True):
    x = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32) * 100
    return {"given": x, "trips": np.array(trips), "start": np.array(start),
            "limit": np.float32(limit)}


def test_a_condition_on_data_ends_it(compilations):
    session = check(halving(), [given_to_halving(3, 100, 1e-3), given_to_halving(3, 2, 0),
                                given_to_halving(3, 100, 1e6)])
    given = given_to_halving(3, 3, 1, start=False)
    unturned, nothing = session.run(None, given)
    np.testing.assert_array_equal(unturned, np.abs(given["given"]) + 1)
    assert nothing.shape == (0, 4)
    assert len(compilations) <= 4  # the question, before, the body, after: not one for each turn


def test_any_number_of_rows(compilations):
    check(halving(), [given_to_halving(rows, 9, 1e-3) for rows in (3, 5, 1, 17)])
    assert len(compilations) <= 7


def growing():
    """A sequence that gets longer by its last item plus the turn's number; two inputs from
    outside."""
    body = helper.make_graph(
        [node("Gather", "s last", "end", axis=0), node("Add", "end step", "sum"),
         node("Add", "sum turn", "item"), node("Concat", "s item", "longer", axis=0),
         node("Identity", "go", "again")], "body",
        [tensor("turn", I64), tensor("go", BOOL), tensor("s", I64, None)],
        [tensor("again", BOOL), tensor("longer", I64, None), tensor("item", I64, None)])
    loop = helper.make_node("Loop", ["trips", "", "start"], ["all", "items"], body=body)
    return model_of([constant("last", np.array([-1])), loop],
                    [tensor("start", I64, "n"), tensor("step", I64), tensor("trips", I64)],
                    [tensor("all", I64, None), tensor("items", I64, None, 1)])


def test_state_that_grows(compilations):
    session = InferenceSession(growing().SerializeToString(), threads=1)
    whole, items = session.run(
        None, {"start": np.array([4, 2]), "step": np.array(10), "trips": np.array(40)})
    expected = [4, 2]
    for turn in range(40):
        expected.append(expected[-1] + 10 + turn)
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(items, np.array(expected[2:])[:, None])
    assert len(compilations) <= 3  # the question, the first turn, all others


def counting(trips):
    body = helper.make_graph(
        [node("Add", "s turn", "next"), node("Identity", "go", "again")], "body",
        [tensor("turn", I64), tensor("go", BOOL), tensor("s", I64)],
        [tensor("again", BOOL), tensor("next", I64)])
    return model_of([helper.make_node("Loop", ["trips", "", "start"], ["y"], body=body)],
                    [tensor("start", I64)], [tensor("y", I64)], trips=np.array(trips))


def test_more_turns_than_are_written_out():
    session = InferenceSession(counting(5000).SerializeToString(), threads=1)
    assert session.run(None, {"start": np.array(3)})[0] == 3 + sum(range(5000))


def test_a_scan_of_any_length(compilations):
    """Backwards over one input, forwards over another; its outputs on the last axis."""
    body = helper.make_graph(
        [node("MatMul", "h w", "mixed"), node("Add", "mixed a", "sum"), node("Mul", "sum b", "new"),
         node("Neg", "new", "out")], "body",
        [tensor("h", F32, 4), tensor("a", F32, 4), tensor("b", F32, 4)],
        [tensor("new", F32, 4), tensor("out", F32, 4)])
    scan = helper.make_node(
        "Scan", ["h0", "x", "y"], ["last", "outs"], body=body, num_scan_inputs=2,
        scan_input_axes=[0, 1], scan_input_directions=[1, 0], scan_output_axes=[-1],
        scan_output_directions=[1])
    model = model_of([scan], [tensor("h0", F32, 4), tensor("x", F32, "n", 4),
                              tensor("y", F32, 4, "n")],
                     [tensor("last", F32, 4), tensor("outs", F32, 4, "n")], w=WEIGHT)
    random = np.random.default_rng(3)
    session = InferenceSession(model.SerializeToString(), threads=1)
    for length in (5, 33, 2000):
        h, x, y = (random.normal(size=shape).astype(np.float32) / 2
                   for shape in ((4,), (length, 4), (4, length)))
        last, outs = session.run(None, {"h0": h, "x": x, "y": y})
        found = []
        for turn in range(length):
            h = (h @ WEIGHT + x[length - 1 - turn]) * y[:, turn]
            found.append(-h)
        np.testing.assert_allclose(last, h, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(outs, np.stack(found[::-1], -1), rtol=1e-4, atol=1e-6)
    assert len(compilations) <= 3
    with pytest.raises(ShapeError, match="scanned inputs of different lengths: x 3, y 4"):
        session.run(None, {"h0": h, "x": np.zeros((3, 4), np.float32),
                           "y": np.zeros((4, 4), np.float32)})


def test_a_loop_in_a_loop():
    inner = helper.make_graph(
        [node("Add", "t k", "t2"), node("Less", "t2 outer_limit", "on")], "inner",
        [tensor("k", I64), tensor("c", BOOL), tensor("t", I64)],
        [tensor("on", BOOL), tensor("t2", I64)])
    outer = helper.make_graph(
        [node("Mul", "s two", "outer_limit"),
         helper.make_node("Loop", ["", "go", "s"], ["s2"], body=inner, name="inner"),
         node("Less", "s2 limit", "more")], "outer",
        [tensor("i", I64), tensor("go", BOOL), tensor("s", I64)],
        [tensor("more", BOOL), tensor("s2", I64)])
    loop = helper.make_node("Loop", ["", "start", "x"], ["y"], body=outer, name="outer")
    model = model_of([constant("two", np.array(2)), loop],
                     [tensor("x", I64), tensor("start", BOOL), tensor("limit", I64)],
                     [tensor("y", I64)])
    session = InferenceSession(model.SerializeToString(), threads=1)
    x = 7
    while True:
        limit, k = 2 * x, 0
        while True:
            x, k = x + k, k + 1
            if x >= limit:
                break
        if x >= 1000:
            break
    feeds = {"x": np.array(7), "start": np.array(True), "limit": np.array(1000)}
    assert session.run(None, feeds)[0] == x


def test_operators_that_are_missing_are_named_at_once():
    model = halving()
    model.graph.node[1].attribute[0].g.node[0].op_type = "Frobnicate"
    with pytest.raises(ModelError, match="Frobnicate"):
        InferenceSession(model.SerializeToString(), threads=1)


def test_weights_in_a_file_of_their_own(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(halving(), path, save_as_external_data=True, location="w.bin",
                    size_threshold=0)
    given = given_to_halving(3, 5, 0)
    expected = ReferenceEvaluator(halving()).run(None, given)
    for got, wanted in zip(InferenceSession(path, threads=1).run(None, given), expected,
                           strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
