"""Keys of models: by what their files hold, not by where they lie or when they were written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.errors import ModelError
from llmc.runtime import sources
from llmc.runtime.cache import Cache
from llmc.runtime.jit import _external_names
from llmc.runtime.sources import Memory, own_sources, source_key
from tests.conftest import EMBEDDED

Key = Callable[..., str]


@pytest.fixture
def key(tmp_path: Path) -> Key:
    """Key of a path, with a new process's memory."""
    return lambda path, options="": source_key(
        path, options, Memory(tmp_path / "sources.json"), _external_names)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


def write(path: Path, contents: bytes, keep_times: bool = False) -> None:
    status = path.stat() if path.exists() else None
    path.write_bytes(contents)
    if keep_times and status is not None:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_same_files_elsewhere_and_later_are_the_same_model(key: Key, model: Path,
                                                               tmp_path: Path):
    other = Path(shutil.copytree(model, tmp_path / "deep" / "other"))
    os.utime(other / "model.safetensors", (1, 1))
    assert key(other, "f32") == key(model, "f32") != key(model, "bf16")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("at", [0, -1])
def test_a_changed_byte_is_another_model_whatever_the_times_say(key: Key, model: Path, name: str,
                                                                at: int):
    before = key(model)
    contents = bytearray((model / name).read_bytes())
    contents[at] ^= 1
    write(model / name, bytes(contents), keep_times=True)
    assert key(model) != before


def test_new_and_renamed_files_count_and_those_of_parts(key: Key, model: Path):
    keys = [key(model)]
    write(model / "chat_template.jinja", b"{{ messages }}")
    keys.append(key(model))
    (model / "chat_template.jinja").rename(model / "other.jinja")
    keys.append(key(model))
    (model / "1_Pooling").mkdir()
    write(model / "1_Pooling" / "config.json", b"{}")
    keys.append(key(model))
    assert len(set(keys)) == 4


def test_large_files_are_hashed_once(key: Key, model: Path, monkeypatch: pytest.MonkeyPatch):
    first = key(model)
    monkeypatch.setattr(sources, "_hash_pieces", lambda file: pytest.fail(f"{file} read again"))
    assert key(model) == first


def test_pieces_are_in_order_and_the_last_one_counts(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "PIECE", 1000)
    contents = [bytes(2500), b"1" * 1000 + b"2" * 1500, b"2" * 1500 + b"1" * 1000, bytes(2501)]
    hashes = set()
    for content in contents:
        (tmp_path / "file").write_bytes(content)
        hashes.add(sources._hash_pieces(tmp_path / "file"))
    assert len(hashes) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_memory_is_an_empty_one(key: Key, model: Path, tmp_path: Path, damage: str):
    before = key(model)
    (tmp_path / "sources.json").write_text(damage)
    assert key(model) == before
    assert json.loads((tmp_path / "sources.json").read_text()), "and is written again"


def test_without_a_place_to_remember_the_key_is_the_same(key: Key, model: Path):
    assert source_key(model, "", Memory(Path("/proc/llmc/sources.json")), _external_names) == key(
        model)


def test_the_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MOST_REMEMBERED", 4)
    for number in range(9):
        memory = Memory(tmp_path / "sources.json")
        memory.get(str(number), lambda number=number: f"hash {number}")
        memory.save()
    assert list(json.loads((tmp_path / "sources.json").read_text())) == ["5", "6", "7", "8"]


def test_an_onnx_file_counts_with_its_weights_and_nothing_else_beside_it(key: Key, tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 64]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
                                   [x], [y], [weight])
    path = tmp_path / "m" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(onnx.helper.make_model(graph), path, save_as_external_data=True,
                    location="weights.bin", size_threshold=0)
    before = key(path)
    write(path.parent / "holiday.mp4", bytes(100))
    assert key(path) == before
    moved = Path(shutil.copytree(path.parent, tmp_path / "other")) / "model.onnx"
    assert key(moved) == before
    weights = bytearray((path.parent / "weights.bin").read_bytes())
    weights[-1] ^= 1
    write(path.parent / "weights.bin", bytes(weights), keep_times=True)
    assert key(path) != before == key(moved)


def test_what_is_no_file_is_a_model_error(key: Key, tmp_path: Path):
    with pytest.raises(ModelError, match="nothing"):
        key(tmp_path / "nothing.onnx")


def test_a_model_at_two_places_is_compiled_once(model: Path, tmp_path: Path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    for path in (model, other):
        with llmc.Runtime(path, threads=1, cache_dir=tmp_path / "cache") as runtime:
            assert runtime.run([1]).shape == (1, 512)
    assert len(list(Cache(tmp_path / "cache").entries())) == 1


def test_this_package_counts_by_content():
    own_sources.cache_clear()
    first = own_sources()
    file = Path(sources.__file__)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    own_sources.cache_clear()
    assert own_sources() == first and len(first) == 64
