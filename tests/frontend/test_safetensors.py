"""Safetensors: sound files are mapped, every lie in a header is told by name."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy
import pytest
from safetensors.numpy import save_file

from llmc.errors import ModelError
from llmc.frontend.safetensors import DTYPES, INDEX_NAME, open_checkpoint, open_safetensors

GOLDENS = Path(__file__).parents[1] / "goldens" / "hf"


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def mapped_file(array: numpy.ndarray) -> object:
    """The memmap that an array is a view of."""
    base = array
    while isinstance(base, numpy.ndarray) and not isinstance(base, numpy.memmap):
        base = base.base
    return base


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 17), (0, 5)])
def test_every_dtype_reads_back_as_a_view(tmp_path, name, shape):
    dtype = DTYPES[name]
    data = numpy.random.default_rng(0).integers(0, 2, (*shape, dtype.bits // 8), numpy.uint8)
    odd = b"\x01"  # pushes the tensor off any alignment
    header = {"odd": entry("U8", [1], 0, 1), "x": entry(name, list(shape), 1, 1 + data.size)}
    checkpoint = open_safetensors(write(tmp_path / "a.safetensors", header, odd + data.tobytes()))
    stored = checkpoint.tensors["x"]
    values = stored.read()
    assert (stored.dtype, stored.shape, values.dtype) == (dtype, shape, dtype.numpy)
    assert values.shape == shape and values.tobytes() == data.tobytes()
    if data.size:
        assert isinstance(mapped_file(values), numpy.memmap) and not values.flags.writeable


def test_reads_what_the_reference_library_writes(tmp_path):
    random = numpy.random.default_rng(1)
    arrays = {
        "a": random.normal(size=(5, 3)).astype(ml_dtypes.bfloat16),
        "b": random.normal(size=(33,)),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        numpy.testing.assert_array_equal(checkpoint.tensors[name].read(), array)


BAD_HEADERS = {
    "not JSON": (b"nonsense", b"", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", "not valid JSON"),
    "deep": (b"[" * 100_000, b"", "not valid JSON"),
    "a list": ([], b"", "not a JSON object"),
    "twice": (b'{"x": {}, "x": {}}', b"", "'x' stands there more than once"),
    "entry": ({"x": 3}, b"", "tensor 'x': its entry"),
    "dtype": ({"x": entry("F31", [1], 0, 4)}, bytes(4), "unknown dtype 'F31'"),
    "dtype type": ({"x": entry(["F32"], [1], 0, 4)}, bytes(4), "unknown dtype"),
    "shape": ({"x": entry("F32", [-1], 0, 4)}, bytes(4), "non-negative"),
    "float shape": ({"x": entry("F32", [1.0], 0, 4)}, bytes(4), "non-negative"),
    "bool shape": ({"x": entry("F32", [True], 0, 4)}, bytes(4), "non-negative"),
    "huge shape": ({"x": entry("F32", [2**62, 2**62], 0, 4)}, bytes(4), "the file has 4"),
    "digits": (b'{"x": {"shape": [' + b"9" * 5000 + b"]}}", b"", "not valid JSON"),
    "negative": ({"x": entry("F32", [1], -4, 0)}, bytes(4), "non-negative"),
    "one offset": ({"x": entry("F32", [1], 4)}, bytes(4), "two non-negative"),
    "backwards": ({"x": entry("F32", [1], 4, 0)}, bytes(4), "do not lie"),
    "outside": ({"x": entry("F32", [2], 0, 8)}, bytes(4), "do not lie"),
    "size": ({"x": entry("F64", [1], 0, 4)}, bytes(4), "takes 8 bytes, the file has 4"),
    "gap": ({"x": entry("F32", [1], 4, 8)}, bytes(8), "tensor 'x' follows a gap"),
    "overlap": (
        {"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 2, 6)}, bytes(6), "'y' overlaps"),
    "trailing": ({"x": entry("F32", [1], 0, 4)}, bytes(9), "5 bytes are left over"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path, case):
    header, data, message = BAD_HEADERS[case]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ModelError, match=message) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x00" * 7, b"\xff" * 8, b"\x09" + bytes(15)])
def test_truncated_files_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="truncated"):
        open_checkpoint(tmp_path)


def test_a_file_cut_after_it_was_checked(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": entry("F32", [5000], 0, 20000)}, bytes(20000))
    stored = open_safetensors(path).tensors["x"]
    os.truncate(path, 100)
    with pytest.raises(ModelError, match="cannot map tensor 'x'"):
        stored.read()


def sharded(directory: Path, weight_map: object) -> Path:
    write(directory / "one.safetensors", {"x": entry("F32", [1], 0, 4)}, bytes(4))
    write(directory / "two.safetensors", {"y": entry("F32", [2], 0, 8)}, bytes(8))
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_shards(tmp_path):
    checkpoint = open_checkpoint(
        sharded(tmp_path, {"x": "one.safetensors", "y": "two.safetensors"})
    )
    assert {name: t.file.name for name, t in checkpoint.tensors.items()} == {
        "x": "one.safetensors", "y": "two.safetensors"}
    assert len(checkpoint.identities) == 2


BAD_MAPS = {
    "not a map": (["x"], "no 'weight_map'"),
    "empty": ({}, "no 'weight_map'"),
    "parent": ({"x": "../one.safetensors"}, "tensor 'x': '../one.safetensors' is not a plain"),
    "absolute": ({"x": "/etc/passwd"}, "not a plain file name"),
    "folder": ({"x": "a/one.safetensors"}, "not a plain file name"),
    "number": ({"x": 1}, "not a plain file name"),
    "nul": ({"x": "a\0b"}, "not a plain file name"),
    "no shard": ({"x": "three.safetensors"}, "shard 'three.safetensors' is missing"),
    "no tensor": ({"y": "one.safetensors"}, "tensor 'y' is missing"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_indexes_are_refused(tmp_path, case):
    weight_map, message = BAD_MAPS[case]
    with pytest.raises(ModelError, match=message):
        open_checkpoint(sharded(tmp_path, weight_map))


def test_symlinks_as_in_hub_caches_are_followed(tmp_path):
    blob = write(tmp_path / "blob", {"x": entry("F32", [1], 0, 4)}, bytes(4))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert open_checkpoint(tmp_path / "snapshot").tensors["x"].read().tolist() == [0.0]


def test_identity_changes_with_the_file(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": entry("F32", [1], 0, 4)}, bytes(4))
    before = open_safetensors(path).identities
    os.utime(path, ns=(1, 1))
    assert open_safetensors(path).identities != before


def test_no_weights(tmp_path):
    with pytest.raises(ModelError, match="neither model"):
        open_checkpoint(tmp_path)
