"""Artifacts: what is written is what is read; anything changed since is refused by one line."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.codegen.target import Target
from llmc.driver import compile_model
from llmc.errors import DeviceError, LlmcError, ModelError
from llmc.ir.program_text import format_program, parse_program
from llmc.runtime.artifact import ALIGNMENT, Artifact, read_manifest, write_manifest
from tests.conftest import EMBEDDED


@pytest.fixture
def copy(embedded_artifact: Path, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(embedded_artifact, tmp_path / "copy.llmc"))


def test_round_trip_generates_what_the_golden_says(tmp_path: Path, embedded_goldens):
    path = llmc.compile(EMBEDDED).save(tmp_path / "stories.llmc")
    golden = embedded_goldens[0]
    with llmc.Runtime(path, threads=2) as runtime:
        ids = runtime.encode(golden["prompt"])
        made = list(runtime.generate(ids, max_new_tokens=64, ignore_eos=True))
    assert ids == golden["prompt_ids"]
    assert made == golden["greedy_ids"]


def test_manifest_round_trip(embedded_artifact: Path, tmp_path: Path):
    manifest = read_manifest(embedded_artifact)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_weights_are_aligned_inside_the_file_and_do_not_overlap(embedded_artifact: Path):
    artifact = Artifact(embedded_artifact)
    spans = sorted((offset, offset + weight.bytes, weight.bytes)
                   for weight in artifact.manifest.weights for offset in weight.offsets)
    assert all(start % (ALIGNMENT if size >= ALIGNMENT else 64) == 0 for start, _, size in spans)
    assert all(end <= start for (_, end, _), (start, _, _) in pairwise(spans))
    assert spans[-1][1] <= artifact.manifest.weight_bytes


def test_every_parameter_of_the_model_is_the_source_of_a_weight(embedded_artifact: Path):
    from llmc.frontend.model import load_model

    sources = {name for weight in Artifact(embedded_artifact).manifest.weights
               for copy in weight.sources for name in copy}
    assert sources == set(load_model(EMBEDDED).parameters)


def test_programs_are_kept_as_text_that_parses_back(embedded_artifact: Path):
    artifact = Artifact(embedded_artifact)
    for variant in artifact.manifest.variants:
        text = artifact.program_text(variant)
        assert format_program(parse_program(text)) == text


def test_verify_accepts_what_was_written(embedded_artifact: Path):
    Artifact(embedded_artifact).verify()


def test_verify_names_the_file_whose_weights_changed(copy: Path):
    with open(copy / "weights.bin", "r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelError, match=r"weights\.bin is not what was written"):
        Artifact(copy).verify()


@pytest.mark.parametrize("size", [0, 1, 4096, -1])
def test_truncated_weights_are_refused(copy: Path, size: int):
    with open(copy / "weights.bin", "r+b") as file:
        file.truncate(size if size >= 0 else (copy / "weights.bin").stat().st_size - 1)
    with pytest.raises(ModelError, match=r"weights\.bin has \d+ bytes, its manifest says"):
        llmc.Runtime(copy)


@pytest.mark.parametrize("name", ["weights.bin", "variants/few.o", "variants/generic.o"])
def test_missing_files_are_refused(copy: Path, name: str):
    (copy / name).unlink()
    with pytest.raises(ModelError, match=Path(name).name):
        llmc.Runtime(copy)


@pytest.mark.parametrize("contents", [b"", b"not an object", b"\x7fELF" + bytes(100)])
def test_changed_code_is_refused_before_it_is_loaded(copy: Path, contents: bytes):
    (copy / "variants" / "few.o").write_bytes(contents)
    with pytest.raises(ModelError, match=r"few\.o was changed after it was written"):
        llmc.Runtime(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_changed_files_of_the_model_are_refused(copy: Path, name: str, change):
    change(copy / "files" / name)
    with llmc.Runtime(copy) as runtime, pytest.raises(ModelError, match=name):
        _ = runtime.tokenizer


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 99}', '{"format": 1}',
                                  "\x00\xff"])
def test_damaged_manifests_are_refused(copy: Path, text: str):
    (copy / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"manifest\.json"):
        llmc.Runtime(copy)


def _edited(data: dict):
    """Every manifest with one value replaced, one level and two levels deep."""
    for key, value in data.items():
        if key == "checksum":
            continue
        yield f"without {key}", {k: v for k, v in data.items() if k != key}
        yield f"another {key}", data | {key: [value]}
        if isinstance(value, list) and value:
            first = value[0]
            for field in first if isinstance(first, dict) else ():
                yield f"{key}.{field}", data | {key: [first | {field: 7}, *value[1:]]}


def test_every_edit_of_the_manifest_is_refused(copy: Path):
    path = copy / "manifest.json"
    data = json.loads(path.read_text())
    edits = list(_edited(data))
    assert len(edits) > 50
    for what, edited in edits:
        path.write_text(json.dumps(edited))
        with pytest.raises(ModelError, match=r"manifest\.json"):
            read_manifest(copy)
            pytest.fail(what)


def test_a_manifest_may_be_laid_out_anew(copy: Path):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    read_manifest(copy)


@pytest.mark.parametrize("target", ["aarch64:neoverse-v2", "x86_64:diamondrapids"])
def test_code_for_another_cpu_is_refused(tmp_path: Path, target: str):
    """No machine that runs these tests has both; nothing of the artifact may run."""
    path = compile_model(EMBEDDED, Target.parse(target)).write(tmp_path / "other.llmc")
    with pytest.raises(DeviceError, match="compile the model"):
        llmc.Runtime(path)


def test_an_artifact_for_another_dtype_is_refused(embedded_artifact: Path):
    with pytest.raises(LlmcError, match="was compiled for f32, not bf16"):
        llmc.Runtime(embedded_artifact, dtype="bf16")


def test_save_does_not_overwrite(embedded_artifact: Path, tmp_path: Path):
    compiled = llmc.load(embedded_artifact)
    with pytest.raises(LlmcError, match="exists"):
        compiled.save(tmp_path)


def test_write_replaces_an_artifact_but_nothing_else(copy: Path, tmp_path: Path):
    compiled = compile_model(EMBEDDED, Target.host())
    compiled.write(copy)
    Artifact(copy).verify()
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(LlmcError, match="is no artifact"):
        compiled.write(other)
    assert (other / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.llmc", "precious"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled = compile_model(EMBEDDED, Target.host())

    def full(self, packed):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmc.driver.WeightFile.append", full)
    with pytest.raises(LlmcError, match="No space left on device"):
        compiled.write(tmp_path / "out.llmc")
    assert not list(tmp_path.iterdir())


def test_weights_are_mapped_not_copied(embedded_artifact: Path):
    artifact = Artifact(embedded_artifact)
    data = artifact.weight_data(artifact.manifest.weights[0])
    assert not data.flags.writeable
    assert not data.flags.owndata
    assert data.ctypes.data == artifact.weight_addresses()[0]
    assert np.any(data)


def test_weights_are_read_as_they_are_mapped(copy: Path):
    artifact = Artifact(copy)
    whole = artifact.packed_weights()
    for start, size in ((0, 1), (17, 1000), (whole.size - 33, 33), (0, whole.size)):
        part = np.empty(size, np.uint8)
        artifact.read_weights(start, part)
        assert np.array_equal(part, whole[start:start + size])
    with pytest.raises(ModelError, match="ends too early"):
        artifact.read_weights(whole.size - 1, np.empty(2, np.uint8))
