"""Pass tests: a graph's text in, a graph's text out. Line 1 of a file of cases/ names the pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from steps import CAPABILITIES, parameters_of, step_of

from llmc.ir.dims import evaluate
from llmc.ir.graph import Graph
from llmc.ir.interpret import interpret_step
from llmc.ir.text import format_graph, parse_graph
from llmc.ir.verify import verify
from llmc.passes.fuse import fuse
from llmc.passes.legalize import legalize
from llmc.passes.merge_matmuls import merge_matmuls
from llmc.passes.outline import outline
from llmc.passes.prelude import split_prelude
from llmc.passes.raise_patterns import raise_patterns
from llmc.passes.simplify import simplify

CASES = sorted((Path(__file__).parent / "cases").glob("*.txt"))
RULE = "=" * 80
PASSES: dict[str, Callable[[Graph], Graph]] = {
    "simplify": simplify,
    "outline": outline,
    "raise_patterns": lambda graph: simplify(raise_patterns(simplify(graph))),
    "merge_matmuls": merge_matmuls,
    "legalize": lambda graph: legalize(graph, CAPABILITIES),
    "split_prelude": lambda graph: split_prelude(graph, CAPABILITIES),
    "merge, prelude, fuse": lambda graph: fuse(
        split_prelude(merge_matmuls(graph), CAPABILITIES), CAPABILITIES),
    "fuse": lambda graph: fuse(graph, CAPABILITIES),
}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path, bless: bool) -> None:
    head, _, rest = path.read_text().partition("\n")
    source, _, expected = rest.partition(f"{RULE}\n")
    graph = parse_graph(source)
    verify(graph)
    result = PASSES[head.removeprefix("# pass: ")](graph)
    verify(result)
    text = format_graph(result).rstrip() + "\n"
    assert format_graph(parse_graph(text)).rstrip() + "\n" == text
    if bless:
        path.write_text(f"{head}\n{source.rstrip()}\n{RULE}\n{text}")
    else:
        assert text == expected, f"{path.name}: pytest tests/passes --bless accepts the new text"


SIZES = {"tokens": 7, "batch": 3, "seq": 5}


def random_inputs(graph: Graph) -> dict[str, np.ndarray]:
    """Random values for inputs of any type; positive, as some cases take roots."""
    random = np.random.default_rng(3)
    return {
        node["name"]: (random.random([evaluate(dim, SIZES) for dim in node.shape]) * 2.5 + 0.1)
        .astype(node.dtype.numpy)
        for node in graph.inputs
    }


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case_computes_the_same(path: Path) -> None:
    source, _, result = path.read_text().partition("\n")[2].partition(f"{RULE}\n")
    before, after = parse_graph(source), parse_graph(result)
    inputs, states = step_of(before) if before.states() else (random_inputs(before), {})
    parameters = parameters_of(before)
    expected, old_states = interpret_step(before, inputs, parameters, states, exact=True)
    found, new_states = interpret_step(after, inputs, parameters, states, exact=True)
    for name, array in {**expected, **old_states}.items():
        # Raised patterns compute the same to the accuracy of the exporter's rounded constants.
        tolerance = 1e-6 if path.stem.startswith("raise") else 1e-12
        np.testing.assert_allclose({**found, **new_states}[name], array, tolerance, tolerance)
