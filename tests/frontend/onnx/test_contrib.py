"""Operators of com.microsoft, compiled, against what onnxruntime computed: see
make_contrib_cases.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.codegen.target import Target
from llmc.driver import compile_imported
from llmc.frontend.onnx import import_onnx_bytes
from llmc.runtime.artifact import Artifact
from llmc.runtime.executor import Executor

RECORDED = dict(np.load(Path(__file__).with_name("contrib_cases.npz")))
CASES = [key.removesuffix("/model") for key in RECORDED if key.endswith("/model")]
TOLERANCE = 2e-5  # of the largest result; sums in another order than onnxruntime's
COARSE = {"quantised experts": 2e-3, "experts": 1e-4}  # onnxruntime's activations are approximate


def part(name, kind):
    prefix = f"{name}/{kind}/"
    return {key.removeprefix(prefix): array for key, array in RECORDED.items()
            if key.startswith(prefix)}


def compiled(content, given, tmp_path):
    program = compile_imported(import_onnx_bytes(content), Target.host())
    executor = Executor(Artifact(program.write(tmp_path / "case.llmc")), threads=1)
    try:
        return executor.run(given)
    finally:
        executor.close()


@pytest.mark.parametrize("name", CASES)
def test_results_are_onnxruntimes(name, tmp_path):
    given, wanted = part(name, "in"), part(name, "out")
    found = compiled(RECORDED[f"{name}/model"].tobytes(), given, tmp_path)
    relative = next((t for start, t in COARSE.items() if name.startswith(start)), TOLERANCE)
    for key, array in wanted.items():
        got = found[key]
        if name.startswith("grouped") and key != "o0":  # behind the valid keys may be anything
            got = got.copy()
            for sequence, last in enumerate(given["i5"]):
                got[sequence, :, last + 1:] = 0
        assert got.shape == array.shape and got.dtype == array.dtype
        np.testing.assert_allclose(got, array, 0, relative * max(1.0, np.abs(array).max()))
