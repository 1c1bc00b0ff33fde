"""Files for C: which are written where, and that a failure leaves what was there."""

import os

import pytest

from llmc.cli import main
from llmc.codegen.target import Target
from llmc.driver import compile_model
from llmc.emit import emit
from llmc.errors import CompileError
from tests.conftest import GOLDENS

MODEL = GOLDENS / "onnx" / "llama_dynamo" / "model.onnx"


@pytest.fixture(scope="module")
def compiled():
    return compile_model(MODEL, Target.host())


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_files_lie_beside_the_first(compiled, tmp_path):
    paths = emit(compiled, ["obj", "header"], tmp_path / "new" / "model.o")
    assert [path.name for path in paths] == ["model.o", "model.h", "model.weights"]
    assert names(tmp_path / "new") == ["model.h", "model.o", "model.weights"]
    header = (tmp_path / "new" / "model.h").read_text()
    size = (tmp_path / "new" / "model.weights").stat().st_size
    assert f"#define LLMC_PACKED_BYTES {size} " in header


def test_a_header_comes_alone(compiled, tmp_path):
    assert emit(compiled, ["header"], tmp_path / "any.name") == [tmp_path / "any.name"]
    assert names(tmp_path) == ["any.name"]


def test_object_is_reproducible(compiled, tmp_path):
    objects = [emit(compiled, ["obj"], tmp_path / name)[0].read_bytes() for name in ("a.o", "b.o")]
    assert objects[0] == objects[1]


def test_without_cc(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match="emit obj and link it yourself"):
        emit(compiled, ["so"], tmp_path / "model.so")
    assert names(tmp_path) == []


def test_cc_that_fails_leaves_the_old_files(compiled, tmp_path, monkeypatch):
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    (tmp_path / "model.weights").write_text("old")
    with pytest.raises(CompileError, match="no space left"):
        emit(compiled, ["so"], tmp_path / "model.so")
    assert names(tmp_path) == ["bin", "model.weights"]
    assert (tmp_path / "model.weights").read_text() == "old"


def test_output_that_cannot_be_written(compiled, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError, match="cannot write"):
        emit(compiled, ["obj"], tmp_path / "file" / "model.o")
    (tmp_path / "model.o").mkdir()
    with pytest.raises(CompileError, match="cannot write"):
        emit(compiled, ["obj"], tmp_path / "model.o")
    assert names(tmp_path) == ["file", "model.o"]


@pytest.mark.parametrize("output", ["model.h", "model.weights"])
def test_output_named_like_a_file_beside_it(compiled, tmp_path, output):
    with pytest.raises(CompileError, match="its name must differ"):
        emit(compiled, ["obj", "header"], tmp_path / output)


@pytest.mark.parametrize("arguments, message", [
    (["--emit", "exe"], "cannot emit exe"), (["--emit", "obj", "--prefix", "9"], "prefix '9'"),
    (["--prefix", "x_"], "--prefix is for --emit"),
    (["--emit", "obj", "--target", "nvptx:sm_90a"], "does not go with --target nvptx")])
def test_bad_requests_are_refused_before_compiling(tmp_path, capsys, arguments, message):
    """The model does not exist: that would be the error if it were looked at first."""
    command = ["compile", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "x"), *arguments]
    assert main(command) == 1
    assert message in capsys.readouterr().err


def test_command(tmp_path, capsys):
    output = tmp_path / "model.o"
    assert main(["compile", str(MODEL), "--emit", "obj,header", "-o", str(output)]) == 0
    assert "model.weights" in capsys.readouterr().out
    assert names(tmp_path) == ["model.h", "model.o", "model.weights"]
