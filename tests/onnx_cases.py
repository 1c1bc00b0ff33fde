"""The onnx package's backend tests: node tests, and the suites simple, pytorch-operator and
pytorch-converted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

SUITES = ("node", "simple", "pytorch-operator", "pytorch-converted")
NOT_PASSING = Path(__file__).parent / "onnx_not_passing.txt"
Arrays = Sequence[Any]


@dataclass(frozen=True)
class Case:
    """One test. operator: what it is about, also for a test of the operator's expanded form."""

    suite: str
    name: str
    operator: str
    rtol: float
    atol: float
    load: Callable[[], tuple[onnx.ModelProto, list[tuple[Arrays, Arrays]]]]

    def run(self) -> None:
        """Compile, run and compare; raises whatever goes wrong."""
        import llmc.onnx_backend as backend

        model, data_sets = self.load()
        compiled = backend.prepare(model)
        for inputs, outputs in data_sets:
            got = compiled.run(list(inputs))
            Runner.assert_similar_outputs(list(outputs), list(got), rtol=self.rtol, atol=self.atol)


@cache
def cases(suite: str) -> list[Case]:
    """All tests of a suite, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases are computed here, and some overflow
        tests = sorted(load_model_tests(kind=suite), key=lambda test: test.name)
    operators = {test.name: _operators(test) for test in tests}
    return [Case(suite, test.name, operators.get(_base(test.name), operators[test.name]),
                 test.rtol, test.atol, lambda test=test: _contents(test)) for test in tests]


def not_passing() -> set[str]:
    """Names of the tests that do not pass, by the list that tools/onnx_table.py writes."""
    return set(NOT_PASSING.read_text().split())


def _base(name: str) -> str:
    """The test whose operator this one spells out as a function."""
    return re.sub(r"_expanded.*$", "", name)


def _operators(test: Any) -> str:
    if test.model is None:
        return str(test.name)
    return "+".join(sorted({node.op_type for node in test.model.graph.node}))


def _contents(test: Any) -> tuple[onnx.ModelProto, list[tuple[Arrays, Arrays]]]:
    if test.model is not None:
        return test.model, [(list(map(_array, inputs)), list(map(_array, outputs)))
                            for inputs, outputs in test.data_sets]
    directory = Path(test.model_dir)
    model = onnx.load(directory / "model.onnx")
    initialized = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initialized]
    return model, [(_stored(folder, "input", inputs), _stored(folder, "output", model.graph.output))
                   for folder in sorted(directory.glob("test_data_set_*"))]


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _stored(folder: Path, kind: str, declared: Sequence[Any]) -> list[Any]:
    """The values in a folder's files, as many as there are."""
    values = []
    for number, value in enumerate(declared):
        path = folder / f"{kind}_{number}.pb"
        if path.exists():
            values.append(_read(path.read_bytes(), value.type.WhichOneof("value")))
    return values


def _read(content: bytes, kind: str) -> Any:
    if kind == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    if kind == "optional_type":
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))
