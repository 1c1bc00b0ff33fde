"""onnx's own node tests of the language-model core and of quantisation, run as compiled code."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.runner import Runner

from llmc import onnx_backend

OPERATORS = frozenset("""
    Attention FlexAttention RMSNormalization LayerNormalization RotaryEmbedding Softmax LogSoftmax
    LpNormalization Gelu SwiGLU TensorScatter Swish MeanVarianceNormalization QuantizeLinear
    DequantizeLinear DynamicQuantizeLinear QLinearMatMul MatMulInteger Cast CastLike BitCast
    LinearAttention CausalConvWithState
""".split())
SAMPLE = 29  # of the tests, every so many are run in the quick suite


@cache
def cases():
    """The operators' tests by name; those that spell an operator out count as its own."""
    from onnx.backend.test.loader import load_model_tests

    tests = {test.name: test for test in load_model_tests(kind="node")}
    found = {}
    for name, test in sorted(tests.items()):
        original = tests.get(re.sub(r"_expanded.*$", "", name), test)
        operators = {node.op_type for node in original.model.graph.node}
        if operators & OPERATORS and "STRING" not in name:
            found[name] = test
    return found


def as_array(value):
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def check(test):
    session = onnx_backend.prepare(test.model, "CPU")
    for inputs, outputs in test.data_sets:
        with np.errstate(all="ignore"):
            found = session.run([as_array(each) for each in inputs])
            Runner.assert_similar_outputs([as_array(each) for each in outputs], list(found),
                                          rtol=test.rtol, atol=test.atol)


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_node_tests():
    for test in list(cases().values())[::SAMPLE]:
        check(test)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_node_tests():
    wrong = {}
    for name, test in cases().items():
        try:
            check(test)
        except Exception as error:  # whatever it was, the others are tried too
            wrong[name] = f"{type(error).__name__}: {error}"[:200]
    assert not wrong
    assert len(cases()) > 550
