"""Random graphs: every pass leaves a valid graph that computes the same and survives its text; the
compiled code gives what the interpreter does in f64, at several shapes and thread counts."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from llmc.codegen.target import Target
from llmc.ir.graph import Graph
from llmc.passes.pipeline import optimize
from tests.checked import check_graph
from tests.fuzz.graphs import SHAPES, Case, graphs

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def check_passes(graph: Graph) -> None:
    case = Case(graph)
    check_graph(graph)

    def check(name: str, before: Graph, after: Graph) -> None:
        check_graph(after)
        for number in range(len(SHAPES)):
            case.check_close(case.interpreted(after, number, True), number)

    optimize(graph, Target.host().capabilities(), check)


def check_code(graph: Graph) -> None:
    case = Case(graph)
    for threads in (1, 3):
        for number, outputs in enumerate(case.compiled(threads)):
            case.check_close(outputs, number)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=CHECKS)
@given(graphs())
def test_passes(graph):
    check_passes(graph)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=CHECKS)
@given(graphs())
def test_code(graph):
    check_code(graph)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=CHECKS)
@given(graphs())
def test_many_passes(graph):
    check_passes(graph)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=CHECKS)
@given(graphs())
def test_much_code(graph):
    check_code(graph)
