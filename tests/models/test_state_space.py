"""Mamba-2 mixers: what is computed in f32 takes its weights as the file has them."""

import pytest

from llmc.frontend.model import load_model
from llmc.ir.dtypes import f32
from tests.models.packed import GOLDENS

IN_F32 = ("A_log", "dt_bias", "D", "mamba.norm.weight", "mixer.norm.weight", "norm_f.weight")


@pytest.mark.parametrize("name", ["mamba2", "zamba2"])
def test_weights_of_f32_arithmetic_are_never_rounded(name):
    graph = load_model(GOLDENS / name, "bf16").graph
    users = graph.users()
    found = [node for node in graph.parameters() if node["name"].endswith(IN_F32)]
    assert len(found) >= 4 * 3
    for node in found:
        assert node.dtype is f32
        assert not any(user.op == "cast" for user in users[node]), node["name"]


@pytest.mark.parametrize("name", ["mamba2", "zamba2"])
def test_gates_and_time_steps_are_never_rounded(name):
    """Nothing of f32 becomes bf16 between the projection and the functions that take it in f32."""
    nodes = load_model(GOLDENS / name, "bf16").graph.nodes()
    found = [node for node in nodes if node.op in ("silu", "softplus")]
    assert len(found) >= 2 * 3
    for node in found:
        sources = list(node.inputs)
        while sources:
            source = sources.pop()
            assert source.dtype is f32, (node, source)
            if source.op != "matmul":
                sources += source.inputs
