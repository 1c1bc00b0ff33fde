"""What exported graphs become: as few stages as the checkpoint's form, attention without a matrix
of scores, integers multiplied as integers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from llmc.codegen.target import Target
from llmc.frontend.model import load_model
from llmc.ir.program import Loop, Program, Stage
from llmc.passes.lower import lower
from llmc.passes.pipeline import optimize

GOLDENS = Path(__file__).parents[2] / "goldens"
FORMS = {  # exported graph -> (the checkpoint of its architecture, layers)
    "bert_torchscript_opset14": ("bert", 2),
    "bert_dynamo_opset18": ("bert", 2),
    "gpt2_past_dynamo": ("gpt2", 2),
    "llama_dynamo": ("llama_mha", 2),
    "llama_past_dynamo": ("llama_mha", 2),
    "llama_past_torchscript": ("llama_mha", 2),
    "llama_genai_fp32": ("llama_mha", 2),
}
ENDS = 4  # stages before the first layer and after the last: embedding, masks, final norm, head


@cache
def program(path: Path) -> Program:
    capabilities = Target.host().capabilities()
    return lower(optimize(load_model(path).graph, capabilities), capabilities, {})


def exported(name: str) -> Program:
    return program(GOLDENS / "onnx" / name / "model.onnx")


def stages_of_a_layer(checkpoint: str) -> int:
    [loop] = [s for s in program(GOLDENS / "hf" / checkpoint).steps if isinstance(s, Loop)]
    return len(loop.stages)


@pytest.mark.parametrize("name", FORMS)
def test_layers_have_as_many_stages_as_the_checkpoint(name):
    checkpoint, layers = FORMS[name]
    most, loops = stages_of_a_layer(checkpoint) + 2, []
    for step in exported(name).steps:
        loops += [len(step.stages)] if isinstance(step, Loop) else []
    if loops:
        assert max(loops) <= most
    else:  # caches that are inputs and outputs keep layers apart
        assert len(list(exported(name).stages())) <= layers * most + ENDS


@pytest.mark.parametrize("name", FORMS)
def test_attention_has_no_matrix_of_scores(name):
    ops = [node.op for stage in exported(name).stages() for node in stage.body.nodes()]
    kinds = [stage.kind for stage in exported(name).stages()]
    assert "softmax" not in ops and "dense_matmul" not in kinds and "attention" in kinds


def products(stage: Stage):
    return [node for node in stage.body.nodes() if node.op == "matmul"]


@pytest.mark.parametrize(("name", "least"), [("bert_int8_qdq", 9), ("bert_int8_dynamic", 5)])
def test_quantised_graphs_multiply_integers(name, least):
    """QDQ and dynamic quantisation: no product of floats is left, weights are packed as i8."""
    stages = list(exported(name).stages())
    for stage in stages:
        for product in products(stage):
            assert product.dtype.name == "i32", stage.name
            assert all(each.dtype.is_integer for each in product.inputs), stage.name
    weights = [each for each in stages if each.kind == "matmul"]
    assert len(weights) >= least
    buffers = exported(name).buffers
    packed = [buffers[operand] for stage in weights for operand in stage.operands
              if buffers[operand].role == "weight" and len(buffers[operand].type.shape) == 2]
    assert {each.type.dtype.name for each in packed if each.layout.__class__.__name__ == "Panels"
            } == {"i8"}
