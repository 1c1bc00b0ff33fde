"""onnx's own tests through llmc.onnx_backend: one of each operator, all of them with `slow`."""

from __future__ import annotations

import hashlib

import pytest

from tests.onnx_cases import SUITES, Case, cases, not_passing

NODES = cases("node")
FAILING = not_passing()


def _order(case: Case) -> str:
    return hashlib.sha256(case.name.encode()).hexdigest()


def _sample() -> list[Case]:
    """One passing test of each operator, the same one every time."""
    chosen: dict[str, Case] = {}
    for case in sorted(NODES, key=_order):
        if case.name not in FAILING and len(case.operator.split("+")) == 1:
            chosen.setdefault(case.operator, case)
    return sorted(chosen.values(), key=lambda case: case.name)


SAMPLE = _sample()


@pytest.fixture(autouse=True)
def only_compiled_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMC_NO_INTERPRET", "1")


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_one_of_each_operator(case: Case):
    case.run()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in NODES if case not in SAMPLE],
                         ids=lambda case: case.name)
def test_all(case: Case):
    if case.name in FAILING:
        pytest.xfail("see tests/onnx_not_passing.txt")
    case.run()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for suite in SUITES[1:] for case in cases(suite)],
                         ids=lambda case: case.name)
def test_other_suites(case: Case):
    if case.name in FAILING:
        pytest.xfail("see tests/onnx_not_passing.txt")
    case.run()


def test_the_list_of_what_fails_names_tests():
    assert {case.name for suite in SUITES for case in cases(suite)} >= FAILING
