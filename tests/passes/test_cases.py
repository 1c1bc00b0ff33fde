"""Pass tests: a graph's text in, a graph's text out. Line 1 of a file of cases/ names the pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from steps import CAPABILITIES

from llmc.ir.graph import Graph
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
    "split_prelude": split_prelude,
    "fuse": fuse,
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
