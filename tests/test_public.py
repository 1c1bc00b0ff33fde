"""The names that others rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llmc

DOCUMENTED = [
    "CacheError", "CompileError", "Compiled", "DeviceError", "Graph", "GraphError",
    "InferenceSession", "LlmcError", "ModelError", "Quantization", "Runtime", "ShapeError", "Spec",
    "TraceError", "compile", "load", "load_graph", "trace",
]


def test_all_is_sorted_and_exactly_what_is_documented():
    assert llmc.__all__ == sorted(llmc.__all__)
    assert llmc.__all__ == DOCUMENTED


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_name_can_be_imported_and_is_documented(name: str):
    assert getattr(llmc, name).__doc__


def test_errors_are_one_tree():
    errors = [getattr(llmc, name) for name in DOCUMENTED if name.endswith("Error")]
    assert all(issubclass(error, llmc.LlmcError) for error in errors)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = llmc.nonsense


def test_star_import_brings_every_name():
    code = "from llmc import *\nprint(sorted(n for n in dir() if not n.startswith('_')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=llmc.__path__[0] + "/..")
    assert done.stdout.strip() == str(DOCUMENTED)
