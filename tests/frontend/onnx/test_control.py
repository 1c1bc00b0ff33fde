"""Recurrent layers, loops, branches, sequences and counted results, compiled, against onnx's
reference evaluator."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from llmc.errors import ModelError, ShapeError
from llmc.runtime.inference_session import InferenceSession

RANDOM = np.random.default_rng(7)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def parse(text, **tensors):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def session(model):
    return InferenceSession(model.SerializeToString(), threads=1)


def check(model, feeds, tolerance=1e-5):
    compiled, reference = session(model), ReferenceEvaluator(model)
    for given in feeds:
        found, wanted = compiled.run(None, given), reference.run(None, given)
        for each, right in zip(found, wanted, strict=True):
            assert each.shape == right.shape and each.dtype == right.dtype
            np.testing.assert_allclose(each, right, rtol=tolerance, atol=tolerance)


# ---- recurrent ----------------------------------------------------------------------------------


def recurrent_model(op, gates, steps, *, lengths=False, **attributes):
    count = 2 if attributes.get("direction") == "bidirectional" else 1
    weights = {"w": normal(count, gates * 5, 3) / 2, "r": normal(count, gates * 5, 5) / 2,
               "b": normal(count, 2 * gates * 5) / 4}
    names = ["x", "w", "r", "b", "lengths"] if lengths else ["x", "w", "r", "b"]
    node = helper.make_node(op, names, ["y", "h"], hidden_size=5, **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, 2, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yh"],
        [numpy_helper.from_array(array, name) for name, array in weights.items()])
    if lengths:
        graph.input.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [2]))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_steps_written_out(op, gates, direction):
    check(recurrent_model(op, gates, 3, direction=direction), [{"x": normal(3, 2, 3)}])


@pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("steps", [0, "steps"])
def test_no_steps_leave_the_states_as_they_are(op, gates, direction, steps):
    """onnx's reference cannot stack nothing."""
    model = recurrent_model(op, gates, steps, direction=direction)
    count = 2 if direction == "bidirectional" else 1
    states = {name: normal(count, 2, 5) for name in ("hc" if gates == 4 else "h")}
    model.graph.node[0].input.extend(["", *(f"{name}0" for name in states)])
    model.graph.input.extend(
        helper.make_tensor_value_info(f"{name}0", TensorProto.FLOAT, [count, 2, 5])
        for name in states)
    if gates == 4:
        model.graph.node[0].output.append("c")
        model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    y, *last = session(model).run(None, {"x": normal(0, 2, 3), **{
        f"{name}0": state for name, state in states.items()}})
    assert (y.shape, y.dtype) == ((0, count, 2, 5), np.float32)
    for found, state in zip(last, states.values(), strict=True):
        np.testing.assert_array_equal(found, state)


@pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_no_steps_from_nothing_leave_zeros(op, gates):
    y, last = session(recurrent_model(op, gates, 0)).run(None, {"x": normal(0, 2, 3)})
    assert y.shape == (0, 1, 2, 5)
    np.testing.assert_array_equal(last, np.zeros((1, 2, 5), np.float32))


@pytest.mark.parametrize(("op", "gates"), [("GRU", 3), ("LSTM", 4)])
def test_many_steps_are_a_loop(op, gates):
    """Also for a number of steps that is a symbol: code is made for each."""
    model = recurrent_model(op, gates, "steps")
    check(model, [{"x": normal(steps, 2, 3)} for steps in (33, 1)])


def test_sequences_end_at_their_lengths():
    """As if each had been run alone; zeros behind, and the state of the last own step."""
    x, lengths = normal(4, 2, 3), np.array([2, 4], np.int32)
    model = recurrent_model("LSTM", 4, 4, lengths=True, direction="bidirectional")
    y, h = session(model).run(None, {"x": x, "lengths": lengths})
    assert not y[2:, :, 0].any()
    alone = recurrent_model("LSTM", 4, 2, direction="bidirectional")
    alone.graph.initializer.clear()
    alone.graph.initializer.extend(model.graph.initializer)
    y_alone, h_alone = ReferenceEvaluator(alone).run(None, {"x": x[:2]})
    np.testing.assert_allclose(y[:2, :, 0], y_alone[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(h[:, 0], h_alone[:, 0], atol=1e-6)


def test_unknown_activations_are_refused():
    with pytest.raises(ModelError, match="wobble"):
        session(recurrent_model("RNN", 1, 3, activations=["Wobble"]))


# ---- loops and branches -------------------------------------------------------------------------


def test_loop_until_a_condition_on_data():
    model = parse("""g (float x) => (float y, float[n] trail) {
        y, trail = Loop (most, yes, x) <body = turn (int64 i, bool go, float v) =>
            (bool on, float next, float out) {
                two = Constant<value_float = 2.0>()
                next = Mul(v, two)
                limit = Constant<value_float = 20.0>()
                on = Less(next, limit)
                out = Identity(next)
        }>
    }""", most=np.int64(50), yes=np.bool_(True))
    compiled = session(model)
    for start, trail in ((3, [6, 12, 24]), (15, [30])):
        y, found = compiled.run(None, {"x": np.float32(start)})
        assert y == trail[-1] and found.tolist() == trail


def test_scan_backwards_with_an_outer_value():
    model = parse("""g (float[3] start, float[5, 3] rows, float[3] scale) =>
            (float[3] last, float[5, 3] sums) {
        last, sums = Scan<num_scan_inputs = 1, scan_input_directions = [1],
                          scan_output_directions = [1], body = turn (float[3] total, float[3] row)
                          => (float[3] next, float[3] out) {
                scaled = Mul(row, scale)
                next = Add(total, scaled)
                out = Identity(next)
        }>(start, rows)
    }""")
    start, rows, scale = normal(3), normal(5, 3), normal(3)
    last, sums = session(model).run(None, {"start": start, "rows": rows, "scale": scale})
    wanted = start + np.cumsum((rows * scale)[::-1], 0)[::-1]
    np.testing.assert_allclose(sums, wanted, atol=1e-5)
    np.testing.assert_allclose(last, wanted[0], atol=1e-5)


def test_branch_by_data():
    model = parse("""g (float[n] x) => (float[m] y) {
        total = ReduceSum<keepdims = 0>(x)
        zero = Constant<value_float = 0.0>()
        up = Greater(total, zero)
        y = If(up) <then_branch = a () => (float[k] p) { p = Concat<axis = 0>(x, x) },
                    else_branch = b () => (float[k] q) { q = Neg(x) }>
    }""")
    check(model, [{"x": np.array(x, np.float32)} for x in ([1, 2], [-1, -2, 1], [3])])


# ---- results whose number depends on data --------------------------------------------------------


@pytest.mark.parametrize("body", [
    "y = NonZero(x)",
    "zero = Constant<value_float = 0.0>() c = Greater(x, zero) y = Compress(x, c)",
    "y, i, j, n = Unique(x)",
    "y, i, j, n = Unique<sorted = 0>(x)",
])
def test_counted_results(body):
    model = parse(f"g (float[n] x) => (float[m] y) {{ {body} }}")
    model.graph.output[0].type.Clear()
    if "NonZero" in body:
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    else:
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    rows = ([1, 0, -2, 1, 3, 0, 1], [0, 0, 1], [5], [2, 2, 2, -1] * 8 + [7])
    check(model, [{"x": np.array(row, np.float32)} for row in rows])


def test_best_boxes_of_many():
    """As a greedy loop in NumPy does it, for more boxes than turns are written out."""
    count, limit = 33, 0.4
    corners = RANDOM.uniform(0, 4, (1, count, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + RANDOM.uniform(1, 3, (1, count, 2))], 2)
    boxes, scores = boxes.astype(np.float32), RANDOM.permutation(count).astype(np.float32)
    model = parse(f"""g (float[1, {count}, 4] boxes, float[1, 1, {count}] scores) => (int64[k, 3] y)
        {{ y = NonMaxSuppression(boxes, scores, most, limit) }}""",
                  most=np.array([6], np.int64), limit=np.array([limit], np.float32))
    (found,) = session(model).run(None, {"boxes": boxes, "scores": scores[None, None]})
    chosen: list[int] = []
    for box in np.argsort(-scores):
        if len(chosen) < 6 and all(share(boxes[0, box], boxes[0, c]) <= limit for c in chosen):
            chosen.append(int(box))
    assert found.tolist() == [[0, 0, box] for box in chosen]


def share(a, b):
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    return sides.prod() / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod())


# ---- sequences and optionals ---------------------------------------------------------------------


def test_sequences_in_and_out():
    model = parse("""g (seq(float[k]) items, float[n] x) => (seq(float[k]) more, float[m] joined,
                                                           int64 count) {
        more = SequenceInsert(items, x, place)
        joined = ConcatFromSequence<axis = 0>(more)
        count = SequenceLength(more)
    }""", place=np.int64(0))
    compiled, x = session(model), normal(3)
    assert [each.type for each in compiled.get_inputs()] == ["seq(tensor(float))", "tensor(float)"]
    for sizes in ((1, 4), (), (2,)):
        items = [normal(size) for size in sizes]
        more, joined, count = compiled.run(None, {"items": items, "x": x})
        assert [each.tolist() for each in more] == [each.tolist() for each in (x, *items)]
        assert joined.tolist() == np.concatenate([x, *items]).tolist()
        assert count == len(items) + 1


def test_an_optional_that_is_empty():
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    graph = helper.make_graph(
        [helper.make_node("OptionalHasElement", ["x"], ["y"])], "g",
        [helper.make_value_info("x", kind)],
        [helper.make_tensor_value_info("y", TensorProto.BOOL, [])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    compiled = session(model)
    assert compiled.run(None, {"x": None}) == [np.False_]
    assert compiled.run(None, {"x": normal(2)}) == [np.True_]
    with pytest.raises(ShapeError, match="missing input x"):
        compiled.run(None, {})


def test_bad_positions_are_refused():
    model = parse("g (float[n] x) => (float[n] y) { s = SequenceConstruct(x) "
                  "y = SequenceAt(s, place) }", place=np.int64(3))
    with pytest.raises(ModelError, match="position 3 in a sequence of 1"):
        session(model)
    with pytest.raises(ModelError, match="sequence"):
        session(parse("g (float[n] x) => (float[n] y) { s = SequenceConstruct(x) y = Neg(s) }"))


# ---- what sizes have to fulfil ------------------------------------------------------------------


def test_an_inferred_axis_needs_a_multiple():
    model = parse("g (float[a, 6] x) => (float[c, 4] y) { y = Reshape(x, shape) }",
                  shape=np.array([-1, 4]))
    compiled = session(model)
    for rows in (2, 4, 34):
        x = normal(rows, 6)
        np.testing.assert_array_equal(compiled.run(None, {"x": x})[0], x.reshape(-1, 4))
    with pytest.raises(ShapeError, match="a must be a multiple of 2"):
        compiled.run(None, {"x": normal(3, 6)})


def test_an_inferred_axis_of_two_symbols_is_computed_for_their_sizes():
    model = parse("g (float[a, b, 6] x) => (float[c, 4] y) { y = Reshape(x, shape) }",
                  shape=np.array([-1, 4]))
    compiled = session(model)
    for sizes in ((2, 1), (1, 4), (3, 2)):
        x = normal(*sizes, 6)
        np.testing.assert_array_equal(compiled.run(None, {"x": x})[0], x.reshape(-1, 4))
    with pytest.raises(ShapeError, match="b must be a multiple of 2"):
        compiled.run(None, {"x": normal(3, 1, 6)})


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
def test_padding_cuts_no_more_than_there_is(mode):
    def padded(extent):
        return parse(f"g (float[{extent}] x) => (float[m] y) "
                     f'{{ [cutting] y = Pad <mode = "{mode}"> (x, pads) }}',
                     pads=np.array([-2, -2]))

    with pytest.raises(ModelError, match=r"'cutting'.*pads -2 and -2 cut more than there is"):
        session(padded(3))
    compiled = session(padded("n"))
    assert compiled.run(None, {"x": np.arange(5, dtype=np.float32)})[0].tolist() == [2.0]
    with pytest.raises(ShapeError, match="n must be in 4"):
        compiled.run(None, {"x": normal(3)})


@pytest.mark.parametrize("shape", ["", "[1]"])
def test_a_condition_may_have_one_axis(shape):
    model = parse(f"""g (float[3] x, bool{shape} c) => (float[3] y) {{
        d = Not (c)
        y = If (d) <then_branch = t () => (float[3] a) {{ a = Neg (x) }},
                    else_branch = e () => (float[3] b) {{ b = Exp (x) }}> }}""")
    x, compiled = normal(3), session(model)
    for value in (True, False):
        (y,) = compiled.run(None, {"x": x, "c": np.full([1] if shape else [], value)})
        np.testing.assert_allclose(y, np.exp(x) if value else -x, rtol=1e-5)
