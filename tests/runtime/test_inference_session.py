"""InferenceSession: onnxruntime's calls and what they answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import llmc
from tests.runtime.test_cuda import why_no_gpu


def linear() -> bytes:
    """y = x @ w + b for x[batch, 3], and the rows' sums."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 2], [1.0, 2, 3, 4, 5, 6])
    bias = helper.make_tensor("b", TensorProto.FLOAT, [2], [10.0, 20])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"]),
         helper.make_node("ReduceSum", ["y", "axes"], ["total"], keepdims=0)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2]),
         helper.make_tensor_value_info("total", TensorProto.FLOAT, ["batch"])],
        [weight, bias, axes])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = X @ np.array([[1, 2], [3, 4], [5, 6]], np.float32) + np.array([10, 20], np.float32)


@pytest.fixture(scope="module")
def session() -> llmc.InferenceSession:
    return llmc.InferenceSession(linear(), providers=["CPUExecutionProvider"])


def test_all_outputs_in_order(session: llmc.InferenceSession):
    y, total = session.run(None, {"x": X})
    np.testing.assert_allclose(y, Y, rtol=1e-6)
    np.testing.assert_allclose(total, Y.sum(1), rtol=1e-6)


def test_outputs_by_name_in_the_order_asked_for(session: llmc.InferenceSession):
    total, y = session.run(["total", "y"], {"x": X[:1]})
    assert total.shape == (1,)
    assert y.shape == (1, 2)
    (again,) = session.run(["y"], {"x": X[:1]}, None)
    np.testing.assert_array_equal(again, y)


def test_what_inputs_and_outputs_are(session: llmc.InferenceSession):
    (x,) = session.get_inputs()
    assert (x.name, x.shape, x.type) == ("x", ["batch", 3], "tensor(float)")
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("y", ["batch", 2]), ("total", ["batch"])]
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_modelmeta().graph_name == "linear"


def test_what_the_file_says_of_itself(tmp_path: Path):
    model = onnx.load_from_string(linear())
    model.producer_name, model.domain, model.model_version = "exporter", "org.example", 7
    model.doc_string, model.graph.doc_string = "about the model", "about the graph"
    helper.set_model_props(model, {"author": "someone"})
    onnx.save(model, tmp_path / "linear.onnx")
    for source in (tmp_path / "linear.onnx", model.SerializeToString()):
        meta = llmc.InferenceSession(source, cache_dir=tmp_path / "cache").get_modelmeta()
        assert (meta.producer_name, meta.graph_name, meta.domain, meta.version) == (
            "exporter", "linear", "org.example", 7)
        assert (meta.description, meta.graph_description) == ("about the model", "about the graph")
        assert meta.custom_metadata_map == {"author": "someone"}


def test_a_file_that_says_nothing_of_itself(session: llmc.InferenceSession):
    meta = session.get_modelmeta()
    assert (meta.producer_name, meta.version, meta.custom_metadata_map) == ("", 2**63 - 1, {})


@pytest.mark.parametrize(("feeds", "words"), [
    ({}, "missing input x"),
    ({"x": X, "z": X}, "unknown input z"),
    ({"x": X[0]}, "input x: .* has 2 axes"),
    ({"x": X[:, :2]}, "input x"),
    ({"x": np.array([["a", "b", "c"]])}, "input x cannot take"),
    ({"x": None}, "input x is None"),
    ({"x": X.astype(np.complex64)}, "input x.* cannot take"),
    ({"x": np.full((1, 3), 1e300)}, r"input x is a tensor\(float\) .* float64"),
    ({"x": X.astype(np.int64)}, r"input x is a tensor\(float\) .* int64"),
])
def test_bad_feeds_are_named(session: llmc.InferenceSession, feeds: dict, words: str):
    with pytest.raises(llmc.ShapeError, match=words):
        session.run(None, feeds)


def test_a_list_becomes_an_array_of_the_inputs_type(session: llmc.InferenceSession):
    np.testing.assert_allclose(session.run(["y"], {"x": X.tolist()})[0], Y, rtol=1e-6)


def test_numbers_are_no_text():
    graph = helper.make_graph(
        [helper.make_node("StringConcat", ["x", "x"], ["y"])], "twice",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [2])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [2])])
    session = llmc.InferenceSession(helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())
    with pytest.raises(llmc.ShapeError, match=r"input x is a tensor\(string\) .* int64"):
        session.run(None, {"x": np.array([1, 2])})
    assert session.run(None, {"x": np.array(["a", "b"])})[0].tolist() == ["aa", "bb"]


def test_an_output_that_is_not_there_is_named(session: llmc.InferenceSession):
    with pytest.raises(llmc.ShapeError, match="no output nothing; the model has total, y"):
        session.run(["nothing"], {"x": X})


def test_a_file_with_options(tmp_path: Path):
    path = tmp_path / "linear.onnx"
    path.write_bytes(linear())
    options = SimpleNamespace(intra_op_num_threads=2)
    session = llmc.InferenceSession(str(path), options, [("CPUExecutionProvider", {})],
                                    cache_dir=tmp_path / "cache")
    np.testing.assert_allclose(session.run(["y"], {"x": X})[0], Y, rtol=1e-6)
    session.close()
    with pytest.raises(llmc.LlmcError, match="closed"):
        session.run(None, {"x": X})


def test_axes_without_a_name_are_none():
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])], "negation",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [None, 2])])
    session = llmc.InferenceSession(helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    (x,) = session.get_inputs()
    assert (x.shape, x.type) == ([None, 2], "tensor(bfloat16)")


def test_unknown_providers_and_damaged_bytes_are_refused():
    with pytest.raises(llmc.LlmcError, match="no provider of Nonsense"):
        llmc.InferenceSession(linear(), providers=["Nonsense"])
    with pytest.raises(llmc.ModelError, match="damaged"):
        llmc.InferenceSession(linear()[:50])


def test_without_a_gpu_the_cpu_is_taken_if_it_is_named():
    if not why_no_gpu():
        pytest.skip("there is a GPU")
    with pytest.warns(UserWarning, match="the model runs on the CPU: ") as warned:
        session = llmc.InferenceSession(
            linear(), providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert len(warned) == 1 and warned[0].filename == __file__
    assert session.get_providers() == ["CPUExecutionProvider"]
    np.testing.assert_allclose(session.run(["y"], {"x": X})[0], Y, rtol=1e-6)
    with pytest.raises(llmc.DeviceError, match=r"providers=\['CPUExecutionProvider'\]"):
        llmc.InferenceSession(linear(), providers=["CUDAExecutionProvider"])


# ---- shapes that depend on values ----------------------------------------------------------------


def sliced() -> bytes:
    """y = relu(x)[:n] for x[batch, 3], where n = round(sum(x)) is computed."""
    ints = {"zero": [0], "shape": [1]}
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
         helper.make_node("Cast", ["total"], ["whole"], to=TensorProto.INT64),
         helper.make_node("Reshape", ["whole", "shape"], ["n"]),
         helper.make_node("Relu", ["x"], ["r"]),
         helper.make_node("Slice", ["r", "zero", "n"], ["y"])],
        "sliced", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor(name, TensorProto.INT64, [1], values)
         for name, values in ints.items()])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


@pytest.mark.parametrize("from_file", [False, True])
def test_a_shape_that_a_computed_value_decides(tmp_path: Path, from_file: bool):
    (tmp_path / "sliced.onnx").write_bytes(sliced())
    session = llmc.InferenceSession(tmp_path / "sliced.onnx" if from_file else sliced(),
                                    cache_dir=tmp_path / "cache")
    assert [(o.name, o.shape, o.type) for o in session.get_outputs()] == [
        ("y", [None, 3], "tensor(float)")]
    for total, rows in ((1.0, 4), (3.0, 7), (1.0, 5)):
        x = np.full((rows, 3), total / 3 / rows, np.float32) + np.float32(0.01)
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], x[:int(x.sum())])
    session.close()


def test_a_shape_that_is_an_input():
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])], "expansion",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 1]),
         helper.make_tensor_value_info("shape", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, None])])
    session = llmc.InferenceSession(helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    x = np.arange(3, dtype=np.float32)[:, None]
    for width in (1, 17):
        shape = np.array([1, width])
        (y,) = session.run(None, {"x": x, "shape": shape})
        np.testing.assert_array_equal(y, np.broadcast_to(x, (3, width)))
    with pytest.raises(llmc.ShapeError, match="missing input shape"):
        session.run(None, {"x": x})
    with pytest.raises(llmc.ShapeError, match=r"input shape is a tensor\(int64\) .* float32"):
        session.run(None, {"x": x, "shape": shape.astype(np.float32)})


def overridable(ir_version: int = 8, text: bool = False) -> onnx.ModelProto:
    """y = reshape(x * scale, shape), where scale [1] and shape [2] are inputs with initializers."""
    inputs = {"x": (TensorProto.FLOAT, ["rows", 4]), "scale": (TensorProto.FLOAT, [1]),
              "shape": (TensorProto.INT64, [2])}
    nodes = [helper.make_node("Mul", ["x", "scale"], ["scaled"]),
             helper.make_node("Reshape", ["scaled", "shape"], ["y"])]
    outputs = {"y": (TensorProto.FLOAT, [None, None])}
    initializers = [helper.make_tensor("scale", TensorProto.FLOAT, [1], [2.0]),
                    helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 2])]
    if text:
        inputs["suffix"] = outputs["twice"] = (TensorProto.STRING, [1])
        nodes.append(helper.make_node("StringConcat", ["suffix", "suffix"], ["twice"]))
        initializers.append(helper.make_tensor("suffix", TensorProto.STRING, [1], [b"a"]))
    graph = helper.make_graph(
        nodes, "overridable",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        initializers)
    return helper.make_model(graph, ir_version=ir_version,
                             opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("from_file", [False, True])
def test_an_initializer_that_is_an_input_may_be_fed(tmp_path: Path, from_file: bool):
    path = tmp_path / "overridable.onnx"
    onnx.save(overridable(), path)
    session = llmc.InferenceSession(path if from_file else path.read_bytes(),
                                    cache_dir=tmp_path / "cache")
    assert [each.name for each in session.get_inputs()] == ["x"]
    assert session.get_overridable_initializers() == [
        llmc.runtime.inference_session.NodeArg("scale", [1], "tensor(float)"),
        llmc.runtime.inference_session.NodeArg("shape", [2], "tensor(int64)")]
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    scale, shape = np.array([-0.5], np.float32), np.array([4, 3])
    for _ in range(2):  # the second time from what was compiled
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], 2 * x.reshape(6, 2))
        np.testing.assert_array_equal(session.run(None, {"x": x, "scale": scale})[0],
                                      -0.5 * x.reshape(6, 2))
        np.testing.assert_array_equal(session.run(None, {"x": x, "shape": shape})[0],
                                      2 * x.reshape(4, 3))
        np.testing.assert_array_equal(
            session.run(None, {"x": x, "scale": scale, "shape": shape})[0], -0.5 * x.reshape(4, 3))
    with pytest.raises(llmc.ShapeError, match=r"scale is a tensor\(float\) .* float64"):
        session.run(None, {"x": x, "scale": np.array([1.0])})
    with pytest.raises(llmc.ShapeError, match="input scale"):
        session.run(None, {"x": x, "scale": np.ones(2, np.float32)})
    session.close()
    for feeds in ({"x": x, "scale": scale}, {"x": x}):
        with pytest.raises(llmc.LlmcError, match="closed"):
            session.run(None, feeds)


def test_an_overridable_initializer_of_text():
    session = llmc.InferenceSession(overridable(text=True).SerializeToString())
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    assert session.run(["twice"], {"x": x})[0].tolist() == ["aa"]
    y, twice = session.run(["y", "twice"], {"x": x, "suffix": np.array(["bc"])})
    assert twice.tolist() == ["bcbc"]
    np.testing.assert_array_equal(y, 2 * x.reshape(2, 2))


def test_before_ir_version_4_an_initializer_is_a_constant():
    session = llmc.InferenceSession(overridable(ir_version=3).SerializeToString())
    assert session.get_overridable_initializers() == []
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], np.full((2, 2), 2.0))
    with pytest.raises(llmc.ShapeError, match="unknown input scale"):
        session.run(None, {"x": x, "scale": np.ones(1, np.float32)})


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path):
    """A file, bytes, and a shape that a computed value decides."""
    if reason := why_no_gpu():
        pytest.skip(reason)
    (tmp_path / "linear.onnx").write_bytes(linear())
    for source in (tmp_path / "linear.onnx", linear()):
        session = llmc.InferenceSession(source, providers=["CUDAExecutionProvider"],
                                        cache_dir=tmp_path / "cache")
        assert session.get_providers() == ["CUDAExecutionProvider"]
        np.testing.assert_allclose(session.run(["y"], {"x": X})[0], Y, rtol=1e-6)
    session = llmc.InferenceSession(sliced(), providers=["CUDAExecutionProvider"])
    x = np.full((4, 3), 0.2, np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x[:2])
