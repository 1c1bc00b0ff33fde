"""Every golden graph imports and, interpreted, computes what its reference computed."""

import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from llmc.frontend.model import load_model
from llmc.frontend.onnx import import_onnx, wire
from llmc.ir import dims
from llmc.ir.graph import origin_of
from llmc.ir.interpret import interpret
from llmc.ir.text import format_graph, parse_graph
from llmc.ir.verify import verify

GOLDENS = Path(__file__).parents[2] / "goldens" / "onnx"
MODELS = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())


def runs(name):
    count = json.loads((GOLDENS / name / "expected.json").read_text())["runs"]
    for run in range(count):
        given = np.load(GOLDENS / name / f"inputs_{run}.npz")
        expected = np.load(GOLDENS / name / f"outputs_{run}.npz")
        with given, expected:
            yield dict(given), dict(expected)


@pytest.mark.parametrize("name", MODELS)
def test_interpreted_outputs(name):
    model = import_onnx(GOLDENS / name / "model.onnx")
    tolerance = json.loads((GOLDENS / name / "expected.json").read_text())["rtol_of_max_abs"]
    parameters = {key: stored.read() for key, stored in model.parameters.items()}
    for given, expected in runs(name):
        found = interpret(model.graph, given, parameters, {})
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert found[key].shape == value.shape and found[key].dtype == value.dtype
            error = np.abs(found[key] - value).max(initial=0)
            assert error <= tolerance * np.abs(value).max(initial=0), key


@pytest.mark.parametrize("name", MODELS)
def test_graph_is_sound_and_prints(name):
    graph = import_onnx(GOLDENS / name / "model.onnx").graph
    verify(graph)
    text = format_graph(graph)
    assert format_graph(parse_graph(text)) == text


@pytest.mark.parametrize("name", MODELS)
def test_symbols_are_unified(name):
    """What is left are the axes that really vary: batch, sequence, past."""
    graph = import_onnx(GOLDENS / name / "model.onnx").graph
    assert len(graph.symbols()) <= 3
    assert not any(node.op == "gather_nd" and node.shape[-1] == 1 for node in graph.nodes())


def test_import_is_quick():
    started = time.perf_counter()
    import_onnx(GOLDENS / "llama_past_torchscript" / "model.onnx")
    assert time.perf_counter() - started < 1.0  # 0.1 s on an idle machine


def test_mask_and_present_lengths():
    model = import_onnx(GOLDENS / "llama_past_torchscript" / "model.onnx")
    shapes = {node["name"]: node.shape for node in model.graph.inputs}
    past, seq = shapes["past_key_values.0.key"][2], shapes["input_ids"][1]
    assert shapes["attention_mask"][1] == past + seq
    assert dict(model.graph.outputs)["present.0.key"].shape[2] == past + seq
    assert dims.bounds(past)[0] == 0 and dims.bounds(seq)[0] == 0


def test_head_size_comes_from_the_weights():
    model = import_onnx(GOLDENS / "llama_genai_fp32" / "model.onnx")
    assert all(n.shape[3] == 16 for n in model.graph.inputs if n["name"].startswith("past"))


def test_position_table_bounds_the_sequence():
    model = import_onnx(GOLDENS / "bert_torchscript_opset14" / "model.onnx")
    assert dims.bounds(model.graph.inputs[0].shape[1]) == (1, 128)


def test_attention_operator_is_one_node():
    graph = import_onnx(GOLDENS / "opset23_block" / "model.onnx").graph
    [attention] = [node for node in graph.nodes() if node.op == "attention"]
    assert attention["causal"] and attention["softcap"] == 5.0 and len(attention.inputs) == 3


def test_token_interface():
    cached = import_onnx(GOLDENS / "gpt2_past_dynamo" / "model.onnx").token_interface
    assert cached is not None
    assert (cached.ids, cached.logits) == ("input_ids", "logits")
    assert (cached.attention_mask, cached.position_ids) == ("attention_mask", "position_ids")
    assert cached.cache[0] == ("past_key_values.0.key", "present.0.key") and len(cached.cache) == 4
    plain = import_onnx(GOLDENS / "llama_dynamo" / "model.onnx").token_interface
    assert plain is not None and plain.cache == () and plain.position_ids is None
    assert import_onnx(GOLDENS / "bert_dynamo_opset18" / "model.onnx").token_interface is None


def test_external_data_is_mapped():
    model = import_onnx(GOLDENS / "llama_external_data" / "model.onnx")
    weights = [each for each in model.parameters.values() if each.array is None]
    assert weights and {each.file.name for each in weights} == {"model.onnx.data"}
    assert all(not each.read().flags.writeable for each in weights)


def test_load_model_dispatches_on_the_suffix():
    model = load_model(GOLDENS / "llama_dynamo" / "model.onnx")
    assert model.kind == "onnx" and model.config.vocab_size == 200
    assert model.fingerprint == load_model(GOLDENS / "llama_dynamo" / "model.onnx").fingerprint


@pytest.mark.parametrize("name", ["llama_dynamo", "bert_int8_qdq", "llama_genai_int4"])
def test_weights_in_the_model_file_are_mapped(name):
    path = GOLDENS / name / "model.onnx"
    expected = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    parameters = import_onnx(path).parameters
    for key, stored in parameters.items():
        assert (stored.array is None) == (stored.bytes >= wire.SMALLEST)
        assert np.array_equal(stored.read(), expected[key])
    assert any(stored.array is None for stored in parameters.values())


def test_nodes_remember_where_they_came_from():
    graph = import_onnx(GOLDENS / "llama_dynamo" / "model.onnx").graph
    origins = [origin_of(node) for node in graph.nodes() if node.op == "softmax"]
    assert [origin.module for origin in origins] == [
        "model.model.layers.0.self_attn",
        "model.model.layers.1.self_attn",
    ]
    assert origins[0].node.startswith("node_") and origins[0].file.endswith("model.onnx")
