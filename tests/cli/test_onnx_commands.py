"""`llmc run` of ONNX models that are no single program; commands given what they cannot take."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.conftest import GOLDENS

LLAMA = GOLDENS / "hf" / "llama_mha"


def save(path, nodes, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
              path)
    return path


def tensor(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def given(directory, **arrays):
    """--input options for arrays saved there."""
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)
    return [part for name in arrays for part in ("--input", f"{name}={directory / name}.npy")]


def test_run_where_shapes_depend_on_data(tmp_path, llmc_command):
    path = save(tmp_path / "model.onnx", [helper.make_node("NonZero", ["x"], ["y"])],
                [tensor("x", TensorProto.FLOAT, ["n"])], [tensor("y", TensorProto.INT64, [1, "m"])])
    x = np.array([0, 3, 0, 5], np.float32)
    result = llmc_command("run", path, *given(tmp_path, x=x), "--output", tmp_path)
    assert (result.status, result.out) == (0, "y: int64[1, 2]\n"), result.err
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), [[1, 3]])


def test_run_limits_no_graph_and_says_so(tmp_path, llmc_command):
    path = save(tmp_path / "model.onnx", [helper.make_node("Add", ["x", "x"], ["y"])],
                [tensor("x", TensorProto.FLOAT, ["n"])], [tensor("y", TensorProto.FLOAT, ["n"])])
    x = np.arange(5, dtype=np.float32)
    result = llmc_command("run", path, *given(tmp_path, x=x), "--max-context", 2,
                          "--output", tmp_path)
    assert (result.status, result.out) == (0, "y: float32[5]\n"), result.err
    said = " ".join(llmc_command("run", "--help").out.split())
    assert "ONNX graphs that are given arrays take what the shapes of their inputs allow" in said


def test_run_feeds_an_initializer(tmp_path, llmc_command):
    path = save(tmp_path / "model.onnx", [helper.make_node("Mul", ["x", "scale"], ["y"])],
                [tensor(name, TensorProto.FLOAT, [3]) for name in ("x", "scale")],
                [tensor("y", TensorProto.FLOAT, [3])])
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("scale", TensorProto.FLOAT, [3], [2.0] * 3))
    onnx.save(model, path)
    x = np.array([1, 2, 3], np.float32)
    arrays = given(tmp_path, x=x, scale=np.arange(3, dtype=np.float32))
    for options, expected in ((arrays[:2], [2, 4, 6]), (arrays, [0, 2, 6])):
        result = llmc_command("run", path, *options, "--output", tmp_path)
        assert result.status == 0, result.err
        assert np.load(tmp_path / "y.npy").tolist() == expected


def test_run_quantises_what_is_one_program_and_refuses_it_for_others(tmp_path, llmc_command):
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    path = save(tmp_path / "model.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])],
                [tensor("x", TensorProto.FLOAT, ["n", 64])],
                [tensor("y", TensorProto.FLOAT, ["n", 32])])
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    x = np.ones((1, 64), np.float32)
    options = ("--quantize", "int4", "--activations", "float", "--output", tmp_path)
    assert llmc_command("run", path, *given(tmp_path, x=x), *options).status == 0
    error = np.abs(np.load(tmp_path / "y.npy") - x @ weight).max()
    assert 1e-3 < error < 10  # of 64 weights with 4 bits each
    path = save(tmp_path / "counted.onnx", [helper.make_node("NonZero", ["x"], ["y"])],
                [tensor("x", TensorProto.FLOAT, ["n"])], [tensor("y", TensorProto.INT64, [1, "m"])])
    result = llmc_command("run", path, *given(tmp_path, x=x[0]), *options)
    assert result.status == 1 and "quantize is for an .onnx file that is one program" in result.err


def test_run_with_text(tmp_path, llmc_command):
    names = [tensor(name, TensorProto.STRING, ["n"]) for name in "abc"]
    path = save(tmp_path / "model.onnx", [helper.make_node("StringConcat", ["a", "b"], ["c"])],
                names[:2], names[2:])
    arrays = given(tmp_path, a=np.array(["x", "y"]), b=np.array(["1", "22"]))
    result = llmc_command("run", path, *arrays, "--output", tmp_path)
    assert result.status == 0, result.err
    assert np.load(tmp_path / "c.npy").tolist() == ["x1", "y22"]


def test_run_saves_the_items_of_a_sequence(tmp_path, llmc_command):
    made = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    path = save(tmp_path / "model.onnx",
                [helper.make_node("SplitToSequence", ["x"], ["y"], axis=0, keepdims=0)],
                [tensor("x", TensorProto.FLOAT, [2, 3])], [made])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = llmc_command("run", path, *given(tmp_path, x=x), "--output", tmp_path)
    assert result.status == 0, result.err
    np.testing.assert_array_equal(np.load(tmp_path / "y.1.npy"), x[1])


def test_an_artifact_is_no_source(tmp_path, llmc_command):
    assert llmc_command("compile", LLAMA, "-o", tmp_path / "a.llmc").status == 0
    for command in (("compile", tmp_path / "a.llmc", "-o", tmp_path / "b.llmc"),
                    ("compare", tmp_path / "a.llmc")):
        result = llmc_command(*command)
        assert result.status == 1 and "an artifact, which is compiled already" in result.err


def test_a_directory_without_a_model(tmp_path, llmc_command):
    result = llmc_command("generate", tmp_path, "--prompt", "x")
    assert result.status == 1 and "not a model; give" in result.err
    (tmp_path / "decoder.onnx").touch()
    result = llmc_command("generate", tmp_path, "--prompt", "x")
    assert "give decoder.onnx in it" in result.err


@pytest.mark.parametrize("options", [("--tokens", "1"), ("--other-dtype", "f16")])
def test_options_that_captured_blocks_leave_no_meaning(tmp_path, llmc_command, options):
    blocks = tmp_path / "blocks"
    taken = llmc_command("capture", LLAMA, "--blocks", "model.layers.0.mlp", "--tokens", "1,2",
                         "--output", blocks)
    assert taken.status == 0, taken.err
    assert llmc_command("compare", LLAMA, blocks).status == 0
    result = llmc_command("compare", LLAMA, blocks, *options)
    assert result.status == 1 and f"{options[0]} has no meaning here" in result.err


def test_blocks_are_named_where_none_match(tmp_path, llmc_command):
    result = llmc_command("capture", LLAMA, "--blocks", "mlp", "--output", tmp_path / "blocks")
    assert result.status == 1 and "model.layers.*.mlp" in result.err
