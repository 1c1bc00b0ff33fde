"""`llmc capture` saves what flows into and out of blocks; `llmc compare` reads it back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc.cli import main
from llmc.examine.capture import find_blocks
from llmc.frontend.model import load_model

LLAMA = Path(__file__).parents[1] / "goldens" / "hf" / "llama_mha"
MLP = "model.layers.*.mlp"


@pytest.fixture
def captured(tmp_path) -> Path:
    assert main(["capture", str(LLAMA), "--blocks", MLP, "--tokens", "5,6,7", "--dtype", "f32",
                 "--output", str(tmp_path / "blocks")]) == 0
    return tmp_path / "blocks"


def test_a_block_computed_by_hand(captured):
    """The saved output is what the block's formula makes of the saved input."""
    weights = load_file(LLAMA / "model.safetensors")
    for directory in sorted(captured.glob("*.mlp")):
        facts = json.loads((directory / "block.json").read_text())
        assert facts["config"]["hidden_size"] == facts["inputs"][0]["shape"][1]
        x = load_file(directory / "inputs.safetensors")["input.0"].astype(np.float64)
        gate, up, down = (weights[name].astype(np.float64).T for name in facts["parameters"])
        inner = x @ gate
        expected = (inner / (1 + np.exp(-inner)) * (x @ up)) @ down
        got = load_file(directory / "outputs.safetensors")["output.0"]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_what_was_captured_compares_equal_until_it_is_changed(captured, capsys):
    assert main(["compare", str(LLAMA), str(captured)]) == 0
    file = captured / "model.layers.1.mlp" / "outputs.safetensors"
    arrays = load_file(file)
    arrays["output.0"][1, 2] += np.abs(arrays["output.0"]).max()
    save_file(arrays, file)
    capsys.readouterr()
    assert main(["compare", str(LLAMA), str(captured), "--json"]) == 1
    first = json.loads(capsys.readouterr().out)["first"]
    assert first["module"] == "model.layers.1.mlp.down_proj"
    assert first["difference"]["worst"] == [1, 2]


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "inputs.safetensors").unlink(), "no such file"),
    (lambda d: (d / "capture.json").write_text("{"), "not valid JSON"),
    (lambda d: (d / "model.layers.0.mlp" / "outputs.safetensors").write_bytes(b"12"),
     "outputs.safetensors"),
], ids=["inputs gone", "bad json", "short file"])
def test_damaged_captures_are_refused(captured, capsys, damage, message):
    damage(captured)
    assert main(["compare", str(LLAMA), str(captured)]) == 1
    assert message in capsys.readouterr().err


def test_attention_keeps_its_cache_out_of_the_arrays():
    graph = load_model(LLAMA).graph
    (block,) = find_blocks(graph, "model.layers.0.self_attn")
    assert block.states == ("layers.0.k", "layers.0.v")
    assert all(node.op not in ("state", "cache_append") for node in block.inputs + block.outputs)


def test_a_pattern_that_matches_nothing(capsys, tmp_path):
    assert main(["capture", str(LLAMA), "--blocks", "model.layers.*.mpl", "--output",
                 str(tmp_path / "none")]) == 1
    assert "model.layers.*.mlp" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
