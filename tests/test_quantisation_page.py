"""The figures of docs/quantisation.md are those of the benchmark's results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quantize-quality.json"
PAGE = ROOT / "docs" / "quantisation.md"
MODELS = {"Llama 260K": "stories260K-hf", "Llama 656K": "tinystories656K-hf", "GPT-2": "gpt2-hf",
          "Qwen2": "qwen2-hf", "Gemma 2": "gemma2-hf", "Mixtral": "mixtral-hf"}
# heading of a column -> the benchmark's mode
DIVERGENCES = {
    "| model | int8 | int8, float activations | int4 |":
        ("int8", "int8+float", "int4", "int4+never", "int4+rtn", "none+kv8"),
    "| model | symmetric | asymmetric |":
        ("int4", "int4+asym", "int4+never", "int4+asym+never", "int4+rtn", "int4+asym+rtn")}


def rows_below(heading: str) -> list[list[str]]:
    """Cells of the table whose heading begins so."""
    _, _, after = PAGE.read_text().partition(heading)
    lines = after.partition("\n\n")[0].splitlines()[2:]
    assert lines, f"no table {heading}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def modes_of(model: str) -> dict[str, dict]:
    (name,) = (name for words, name in MODELS.items() if model.startswith(words))
    return json.loads(RESULTS.read_text())[name]["modes"]


@pytest.mark.parametrize("heading", DIVERGENCES)
def test_divergences(heading: str):
    for model, *cells in rows_below(heading):
        for mode, cell in zip(DIVERGENCES[heading], cells, strict=True):
            digits = len(cell.partition(".")[2])
            assert cell == f"{modes_of(model)[mode]['kl']:.{digits}f}", (model, mode)


def test_shares_of_plain_rounding_over_draws():
    for model, *cells in rows_below("| model | draws | mean | worst |"):
        row = modes_of(model)["int4+float" if "float activations" in model else "int4"]
        assert cells == [str(len(row["draws"])), f"{row['mean_ratio']:.2f}",
                         f"{row['worst_ratio']:.2f}"], model


def test_means_of_zero_points_over_draws():
    found = re.search(r"Over 4 other draws .* are (\S+) and (\S+) \(260K\), "
                      r"(\S+) and (\S+) \(656K\)", PAGE.read_text())
    assert found
    expected = [modes_of(model)[mode] for model in ("Llama 260K", "Llama 656K")
                for mode in ("int4", "int4+asym")]
    assert list(found.groups()) == [f"{row['mean']:.4f}" for row in expected]
    assert all(len(row["draws"]) == 4 for row in expected)
