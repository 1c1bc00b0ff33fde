"""`llmc compare` names the op at which two runs part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.cli import main
from llmc.errors import LlmcError
from llmc.examine.compare import difference

LAYERS, HIDDEN = 4, 24
GOLDENS = Path(__file__).parents[1] / "goldens"


def layered_model(path: Path, epsilons: list[float], fused: bool) -> Path:
    """x [n, HIDDEN] through layers x + gelu(norm(x) @ w): the norm as one node or written out."""
    random = np.random.default_rng(1)
    nodes, weights, x = [], [], "x"

    def weight(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def add(layer: int, part: str, op: str, *inputs: str, **attributes) -> str:
        name = f"/layers.{layer}/{part}/{op}"
        nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    for layer, epsilon in enumerate(epsilons):
        scale = weight(f"scale.{layer}", random.normal(1, 0.1, HIDDEN))
        matrix = weight(f"matrix.{layer}", random.normal(0, 0.3, (HIDDEN, HIDDEN)))
        if fused:
            shift = weight(f"shift.{layer}", random.normal(0, 0.1, HIDDEN))
            normed = add(layer, "norm", "LayerNormalization", x, scale, shift, epsilon=epsilon)
        else:
            square = add(layer, "norm", "Mul", x, x)
            mean = add(layer, "norm", "ReduceMean", square, "last", keepdims=1)
            shifted = add(layer, "norm", "Add", mean, weight(f"epsilon.{layer}", epsilon))
            root = add(layer, "norm", "Sqrt", shifted)
            normed = add(layer, "norm", "Div", x, root)
        inner = add(layer, "mlp", "Tanh", add(layer, "mlp", "MatMul", normed, matrix))
        x = add(layer, "residual", "Add", x, inner)
    weights.append(numpy_helper.from_array(np.array([-1], np.int64), "last"))
    output = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", HIDDEN])
    first = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", HIDDEN])
    graph = helper.make_graph(nodes, "layered", [first], [output], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)],
                                ir_version=9), path)
    return path


@pytest.fixture
def small_input(tmp_path) -> str:
    x = np.random.default_rng(2).normal(0, 0.05, (5, HIDDEN)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return f"x={tmp_path / 'x.npy'}"


@pytest.mark.parametrize("layer, fused", [(0, True), (3, True), (1, False), (2, False)])
def test_a_wrong_epsilon_is_named(tmp_path, small_input, capsys, layer, fused):
    epsilons = [1e-5] * LAYERS
    right = layered_model(tmp_path / "right.onnx", epsilons, fused)
    epsilons[layer] = 1e-3
    wrong = layered_model(tmp_path / "wrong.onnx", epsilons, fused)
    assert main(["compare", str(right), str(wrong), "--input", small_input, "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    op = "LayerNormalization" if fused else "Add"
    assert f"/layers.{layer}/norm/{op}" in verdict["first"]["what"]
    assert all(each["difference"]["relative"] <= verdict["tolerance"]
               for each in verdict["operands"])


def test_the_same_model_does_not_differ(tmp_path, small_input, capsys):
    path = layered_model(tmp_path / "right.onnx", [1e-5] * LAYERS, True)
    assert main(["compare", str(path), "--input", small_input]) == 0
    assert "no difference above 0.0001" in capsys.readouterr().out


def branched_model(path: Path, factors: list[float]) -> Path:
    """x [n, HIDDEN] through a branch relu(x * factor) for every factor, each an output."""
    nodes, weights, outputs = [], [], []
    for number, factor in enumerate(factors):
        weights.append(numpy_helper.from_array(np.array(factor, np.float32), f"factor.{number}"))
        inner = f"m.{number}"
        nodes += [helper.make_node("Mul", ["x", f"factor.{number}"], [inner], f"mul.{number}"),
                  helper.make_node("Relu", [inner], [f"y.{number}"], f"relu.{number}")]
        outputs.append(
            helper.make_tensor_value_info(f"y.{number}", TensorProto.FLOAT, ["n", HIDDEN]))
    first = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", HIDDEN])
    graph = helper.make_graph(nodes, "branched", [first], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)],
                                ir_version=9), path)
    return path


@pytest.mark.parametrize("branch", [0, 22, 37])
def test_every_output_is_compared(tmp_path, small_input, capsys, branch):
    factors = [1.0 + number / 64 for number in range(38)]
    right = branched_model(tmp_path / "right.onnx", factors)
    factors[branch] *= 50
    wrong = branched_model(tmp_path / "wrong.onnx", factors)
    assert main(["compare", str(right), str(wrong), "--input", small_input, "--json"]) == 1
    assert f"mul.{branch}" in json.loads(capsys.readouterr().out)["first"]["what"]


def test_outputs_are_paired_by_name(tmp_path, small_input, capsys):
    """Though the ops of both models are the same."""
    right = branched_model(tmp_path / "right.onnx", [1.0, 2.0])
    model = onnx.load(right)
    for node in model.graph.node[1::2]:
        node.output[0] = {"y.0": "y.1", "y.1": "y.0"}[node.output[0]]
    onnx.save(model, tmp_path / "wrong.onnx")
    assert main(["compare", str(right), str(tmp_path / "wrong.onnx"), "--input", small_input]) == 1
    assert "first difference above" in capsys.readouterr().out


def test_a_coarser_dtype_is_within_its_own_tolerance(capsys):
    """And in f32's tolerance the first rounded value is found: the embedding."""
    model = str(GOLDENS / "hf" / "llama_mha")
    assert main(["compare", model, "--other-dtype", "bf16", "--tokens", "1,2,3", "--json",
                 "--tolerance", "1e-5"]) == 1
    assert json.loads(capsys.readouterr().out)["first"]["number"] == 0


@pytest.mark.parametrize("command", [["compare"], ["capture", "--blocks", "*", "--output", "b"]])
@pytest.mark.parametrize("option", ["--quantize=int8", "--kv-cache=int8", "--max-context=8",
                                    "--specialize=none", "--cache-dir=c"])
def test_options_without_effect_are_not_offered(command, option, capsys):
    with pytest.raises(SystemExit):
        main([*command, str(GOLDENS / "hf" / "llama_mha"), option])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--tolerance", "nan"), ("--tolerance", "-1"),
                                     ("--tokens", ""), ("--tokens", "1,x"), ("--tokens", "99999")])
def test_bad_options(options, capsys):
    assert main(["compare", str(GOLDENS / "hf" / "llama_mha"), *options]) == 1
    assert options[0] in capsys.readouterr().err or options[1] == "99999"


def test_graphs_with_nothing_in_common(tmp_path, capsys):
    path = layered_model(tmp_path / "right.onnx", [1e-5], True)
    assert main(["compare", str(GOLDENS / "hf" / "llama_mha"), str(path), "--tokens", "1"]) == 1
    assert "--input" in capsys.readouterr().err


def test_what_counts_as_a_difference():
    a = np.array([[1.0, -4.0, np.nan, np.inf]], np.float32)
    assert not difference(a, a.copy()).exceeds(0)
    b = np.array([1.0, -4.5, np.nan, np.inf], np.float32)
    found = difference(a, b)
    assert found.worst == (0, 1) and found.values == (-4.0, -4.5)
    assert found.relative == 0.125 and found.exceeds(0.1) and not found.exceeds(0.2)
    assert difference(a, np.nan_to_num(b)).not_finite == 2
    assert difference(np.zeros((0, 3)), np.zeros((0, 3))).relative == 0
    with pytest.raises(LlmcError, match="cannot be compared"):
        difference(a, b[:2])
