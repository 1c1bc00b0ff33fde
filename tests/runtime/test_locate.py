"""Where a model's artifact is found before the runtime is imported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import llmc
from llmc.ir.quantization import quantization
from llmc.runtime.locate import find_artifact
from tests.conftest import EMBEDDED
from tests.test_imports import loaded, modules_after


def test_it_is_where_a_runtime_opens_it(cache_dir: Path, embedded_artifact: Path, tmp_path: Path):
    assert find_artifact(EMBEDDED, "host", None, None, cache_dir) == embedded_artifact
    assert find_artifact(EMBEDDED, "host", None, None, None) == embedded_artifact
    assert find_artifact(embedded_artifact, "auto", "f32", None, tmp_path) == embedded_artifact


@pytest.mark.parametrize(("target", "dtype", "weights"), [
    ("host", "bf16", None), ("host", None, "int8"), ("auto", None, None)])
def test_other_options_are_another_artifact(embedded_artifact: Path, tmp_path: Path, target: str,
                                            dtype: str | None, weights: str | None):
    cache = tmp_path / "cache"
    with llmc.Runtime(EMBEDDED, cache_dir=cache, specialize="none"):
        assert find_artifact(EMBEDDED, "host", None, None, cache) is not None
    options = quantization(weights, None)
    assert find_artifact(EMBEDDED, target, dtype, options, cache) is None


def test_what_was_not_compiled_is_not_there(tmp_path: Path):
    model = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    for path in (model, model / "model.safetensors", tmp_path / "nothing"):
        assert find_artifact(path, "host", None, None, tmp_path) is None


def test_looking_imports_little():
    modules = modules_after("import llmc.runtime.locate, pathlib\n"
                            f"llmc.runtime.locate.find_artifact(pathlib.Path({str(EMBEDDED)!r}), "
                            "'host', None, None, None)")
    assert not loaded(modules, {"numpy", "tokenizers", "llmc.runtime.session", "llmc.ir"})
