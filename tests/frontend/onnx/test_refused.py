"""Bad files end in one ModelError that names the file and the culprit."""

import random
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.errors import LlmcError, ModelError
from llmc.frontend.onnx import import_onnx

GOLDENS = Path(__file__).parents[2] / "goldens" / "onnx"
WEIGHT = numpy_helper.from_array(np.ones((8, 6), np.float32), "w")


def save(directory, nodes, outputs=("y",), tensors=(WEIGHT,), inputs=None, functions=(), opset=18):
    """A model over x: f32[n, 8]; returns its path."""
    inputs = inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "graph", inputs, results, list(tensors))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions))
    path = directory / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, name=f"the_{op}", **attributes)


MATMUL = node("MatMul", ["x", "w"], ["y"])


def refused(path, *words):
    with pytest.raises(ModelError) as caught:
        import_onnx(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    assert all(word in text for word in words), text


def test_the_control_is_accepted(tmp_path):
    assert import_onnx(save(tmp_path, [MATMUL])).graph.outputs[0][1].shape[1] == 6


def test_all_unsupported_operators_are_listed(tmp_path):
    nodes = [MATMUL, node("Frobnicate", ["y"], ["a"]), node("Mangle", ["a", "a"], ["b"])]
    nodes += [helper.make_node("Own", ["b"], ["c"], domain="else.where")]
    refused(save(tmp_path, nodes), "Frobnicate ('the_Frobnicate')", "Mangle", "else.where.Own")


def test_number_of_inputs(tmp_path):
    refused(save(tmp_path, [node("MatMul", ["x"], ["y"])]), "the_MatMul", "1 inputs, not 2")


def test_left_out_input(tmp_path):
    refused(save(tmp_path, [node("MatMul", ["", "w"], ["y"])]), "the_MatMul", "input 0")


def test_dangling_output(tmp_path):
    refused(save(tmp_path, [MATMUL], outputs=("y", "z")), "output 'z'")


def test_dangling_input(tmp_path):
    refused(save(tmp_path, [node("MatMul", ["x", "v"], ["y"])]), "the_MatMul", "'v'")


def test_cycle(tmp_path):
    nodes = [node("Add", ["x", "b"], ["a"]), node("Neg", ["a"], ["b"])]
    refused(save(tmp_path, nodes, outputs=("b",)), "the_Add", "'b'")


def test_name_given_twice(tmp_path):
    refused(save(tmp_path, [MATMUL, node("Relu", ["x"], ["y"])]), "the_Relu", "'y'")
    refused(save(tmp_path, [MATMUL], tensors=(WEIGHT, WEIGHT)), "tensor 'w'")


def test_shapes_that_do_not_fit(tmp_path):
    refused(save(tmp_path, [node("MatMul", ["w", "w"], ["y"])]), "the_MatMul", "6 is not 8")
    nodes = [node("Constant", [], ["s"], value_ints=[5, -1]), node("Reshape", ["w", "s"], ["y"])]
    refused(save(tmp_path, nodes), "the_Reshape")


def test_axis_outside_the_rank(tmp_path):
    refused(save(tmp_path, [node("Softmax", ["x"], ["y"], axis=2)]), "the_Softmax", "axis 2")


def test_data_dependent_shape(tmp_path):
    nodes = [node("Cast", ["x"], ["s"], to=TensorProto.INT64), node("Reshape", ["x", "s"], ["y"])]
    refused(save(tmp_path, nodes), "the_Reshape", "depends on data")


@pytest.mark.parametrize("kind", [TensorProto.COMPLEX64, TensorProto.STRING, 99])
def test_element_types(tmp_path, kind):
    inputs = [helper.make_tensor_value_info("x", kind, ["n", 8])]
    refused(save(tmp_path, [node("Relu", ["x"], ["y"])], inputs=inputs), "input 'x'")


@pytest.mark.parametrize("opset", [0, 99])
def test_opsets(tmp_path, opset):
    refused(save(tmp_path, [MATMUL], opset=opset), f"opset {opset}")


def test_input_of_unknown_rank(tmp_path):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    refused(save(tmp_path, [MATMUL], inputs=inputs), "input 'x'")


@pytest.mark.parametrize("shape", [[8, 7], [8, 5], [-8, 6], [2**40, 2**40]])
def test_values_that_do_not_fit_the_shape(tmp_path, shape):
    wrong = TensorProto()
    wrong.CopyFrom(WEIGHT)
    wrong.dims[:] = shape
    refused(save(tmp_path, [MATMUL], tensors=[wrong]), "tensor 'w'")


def test_function_that_calls_itself(tmp_path):
    inner = helper.make_node("Again", ["a"], ["b"], domain="local")
    opset = [helper.make_opsetid("", 18)]
    function = helper.make_function("local", "Again", ["a"], ["b"], [inner], opset)
    call = helper.make_node("Again", ["x"], ["y"], domain="local")
    refused(save(tmp_path, [call], functions=[function]), "call themselves")


def external(location="weights.bin", **entries):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8, 6])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_external_data(tmp_path):
    values = np.arange(48, dtype=np.float32)
    (tmp_path / "weights.bin").write_bytes(b"12345" + values.tobytes())
    model = import_onnx(save(tmp_path, [MATMUL], tensors=[external(offset=5, length=192)]))
    assert (model.parameters["w"].read() == values.reshape(8, 6)).all()


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**63},
        {"length": 100},
        {"offset": "here"},
        {"location": "missing.bin"},
        {"location": "../weights.bin"},
        {"location": "a/../../weights.bin"},
        {"location": "/etc/passwd"},
        {"location": ""},
        {"location": "..\\weights.bin"},
    ],
)
def test_external_data_is_checked(tmp_path, entries):
    (tmp_path / "weights.bin").write_bytes(bytes(192))
    refused(save(tmp_path, [MATMUL], tensors=[external(**entries)]), "tensor 'w'")


def test_no_model(tmp_path):
    path = tmp_path / "model.onnx"
    for content in (b"", b"not a protobuf", struct.pack("<Q", 2**63)):
        path.write_bytes(content)
        refused(path, "damaged")
    refused(tmp_path / "missing.onnx", "cannot read")


def test_damaged_bytes_never_escape(tmp_path):
    """Random bytes of a real export changed: accepted or refused, never another exception."""
    source = (GOLDENS / "opset23_block" / "model.onnx").read_bytes()
    model = onnx.load_from_string(source)
    del model.graph.initializer[:]  # the structure is what is damaged here, not the weights
    for name in ("wq", "wk", "wv", "wo", "up", "down", "norm", "norm2", "cos", "sin"):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["r", "c"]))
    clean, path, chance = model.SerializeToString(), tmp_path / "model.onnx", random.Random(7)
    for _ in range(300):
        damaged = bytearray(clean)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            import_onnx(path)
        except LlmcError as error:
            assert str(path) in str(error)
