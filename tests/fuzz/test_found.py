"""Minimal cases of what the random graphs and files found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import helper

import llmc
from llmc.errors import ModelError, ShapeError
from llmc.frontend.model import load_model
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph, TensorType
from llmc.ir.ops import constant, make
from tests.conftest import GOLDENS
from tests.fuzz.graphs import Case, M, N


def leaf(name: str, kind: str, *shape):
    return make("input", name=name, type=TensorType(dtype(kind), shape))


def check(*outputs, inputs) -> None:
    case = Case(Graph("found", tuple(inputs), tuple((f"y{n}", y) for n, y in enumerate(outputs))))
    for number, got in enumerate(case.compiled(threads=2)):
        case.check_close(got, number)


def test_a_value_that_is_two_outputs():
    x = leaf("x", "f32", N)
    value = make("sub", x, constant(1, dtype("f32")))
    check(value, value, inputs=[x])


def test_symbols_that_no_input_tells():
    graph = Graph("found", (leaf("x", "f32", 3),),
                  (("y", make("iota", dtype="i32", shape=(N, M), axis=0)),))
    with (llmc.Runtime(llmc.compile(graph), threads=1) as runtime,
          pytest.raises(ShapeError, match="no input's shape tells the value of m, n")):
        runtime.run({"x": np.ones(3, np.float32)})


def test_inputs_that_nothing_reads():
    x, unused = leaf("x", "f32", N), leaf("unused", "i32", M, N)
    check(make("neg", x), inputs=[x, unused])


def test_axes_of_size_zero():
    x = leaf("x", "f32", N, 2, 3)
    empty = make("slice", x, starts=(0, 1, 0), stops=(N, 1, 3), steps=(1, 1, 1))
    check(empty, make("reduce_sum", empty, axes=(1,)), make("transpose", empty,
          permutation=(1, 2, 0)), make("concat", empty, x, axis=1), inputs=[x])


def test_an_onnx_attribute_of_another_type(tmp_path):
    """By a damaged byte the value of a Constant was no tensor any more."""
    node = helper.make_node("Constant", [], ["y"], value=helper.make_tensor("v", 1, [1], [0.5]))
    node.attribute[0].type = onnx.AttributeProto.UNDEFINED
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([node], "graph", [], [result]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="attribute 'value' is no tensor"):
        load_model(tmp_path / "model.onnx")


def test_a_line_end_in_a_file_stays_inside_the_errors_line():
    assert str(ModelError("shard 'a\nb\x1b[2J\ud800 é' is missing")) == (
        r"shard 'a\nb\x1b[2J\ud800 é' is missing")


@pytest.mark.parametrize("name, changes, key", [
    ("mamba2", {"expand": 1e308}, "expand"), ("zamba2", {"mamba_expand": 1e308}, "mamba_expand"),
    ("mamba2", {"time_step_limit": [0, 10**400]}, "time_step_limit"),
    ("mistral", {"rms_norm_eps": 10**400}, "rms_norm_eps")])
def test_numbers_of_a_config_that_no_float_or_size_holds(tmp_path, name, changes, key):
    directory = shutil.copytree(GOLDENS / "hf" / name, tmp_path / name)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=key):
        load_model(directory)
