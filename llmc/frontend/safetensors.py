"""Safetensors files: an 8-byte length, a JSON header, then the tensors' bytes without a gap.

Everything the header says is checked against the file before any of it is believed, so nothing
here maps or allocates by an unchecked number. The format is specified at
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from llmc.errors import ModelError
from llmc.frontend.json_file import parse_json, read_json
from llmc.frontend.model import StoredTensor
from llmc.ir import dtypes

DTYPES = {
    "BOOL": dtypes.bool_,
    "U8": dtypes.u8,
    "I8": dtypes.i8,
    "U16": dtypes.u16,
    "I16": dtypes.i16,
    "U32": dtypes.u32,
    "I32": dtypes.i32,
    "U64": dtypes.u64,
    "I64": dtypes.i64,
    "F8_E4M3": dtypes.f8e4m3fn,
    "F8_E5M2": dtypes.f8e5m2,
    "F8_E4M3FNUZ": dtypes.f8e4m3fnuz,
    "F8_E5M2FNUZ": dtypes.f8e5m2fnuz,
    "F8_E8M0": dtypes.f8e8m0,
    "F16": dtypes.f16,
    "BF16": dtypes.bf16,
    "F32": dtypes.f32,
    "F64": dtypes.f64,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one or more safetensors files by name, and what identifies those files."""

    tensors: dict[str, StoredTensor]
    identities: tuple[str, ...]


def open_checkpoint(directory: Path) -> Checkpoint:
    """The tensors of `model.safetensors`, or of the shards that its index names. ModelError."""
    single = directory / "model.safetensors"
    if single.exists():
        return open_safetensors(single)
    index = directory / INDEX_NAME
    if index.exists():
        return _open_shards(directory, index)
    raise ModelError(
        f"{directory}: neither model.safetensors nor {INDEX_NAME} is there"
        " (pickled weights such as pytorch_model.bin are not read; convert them to safetensors)"
    )


def open_safetensors(path: Path) -> Checkpoint:
    """Read and check the header of one file. ModelError names the file and the tensor."""
    header, data_start, size, identity = _read_header(path)
    tensors = {
        name: _stored_tensor(path, name, entry, data_start, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_coverage(path, tensors, data_start, size)
    return Checkpoint(tensors, (identity,))


def _read_header(path: Path) -> tuple[dict[str, Any], int, int, str]:
    """Header, where the data start, size of the file, and the file's identity."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > status.st_size - 8:
                raise ModelError(f"{path}: truncated: the file has {status.st_size} bytes, too few"
                                 f" for a header of {length} bytes")
            if length > MAX_HEADER_BYTES:
                raise ModelError(f"{path}: a header of {length} bytes; {MAX_HEADER_BYTES} at most")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot read it: {error.strerror}") from error
    header = parse_json(path, text, "the header")
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is not a JSON object")
    digest = hashlib.sha256(text).hexdigest()
    identity = f"{path.name} {status.st_size} {status.st_mtime_ns} {digest}"
    return header, 8 + length, status.st_size, identity


def _stored_tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    def bad(what: str) -> ModelError:
        return ModelError(f"{path}: tensor '{name}': {what}")

    if not isinstance(entry, dict):
        raise bad("its entry in the header is not a JSON object")
    dtype_name, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise bad(f"unknown dtype {dtype_name!r}; known: {', '.join(DTYPES)}")
    if not _is_list_of_sizes(shape):
        raise bad(f"shape {shape!r} is not a list of non-negative integers")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise bad(f"data_offsets {offsets!r} are not two non-negative integers")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise bad(f"data_offsets {offsets} do not lie in the file's {size - start} bytes of data")
    dtype = DTYPES[dtype_name]
    expected = prod(shape) * dtype.bits // 8
    if end - begin != expected:
        raise bad(f"{dtype_name} {shape} takes {expected} bytes, the file has {end - begin}")
    return StoredTensor(name, dtype, tuple(shape), path, start + begin, expected)


def _is_list_of_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """The tensors cover the data exactly: no overlap, no gap, nothing after the last."""
    position = start
    for tensor in sorted(tensors.values(), key=lambda each: (each.offset, each.bytes)):
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "follows a gap"
            raise ModelError(f"{path}: tensor '{tensor.name}' {what}")
        position += tensor.bytes
    if position != size:
        raise ModelError(f"{path}: {size - position} bytes are left over after the last tensor")


def _open_shards(directory: Path, index_path: Path) -> Checkpoint:
    weight_map = _read_weight_map(index_path)
    shards = {name: directory / name for name in sorted(set(weight_map.values()))}
    for name, path in shards.items():
        if not path.is_file():
            raise ModelError(f"{index_path}: its shard '{name}' is missing")
    opened = {name: open_safetensors(path) for name, path in shards.items()}
    for tensor, shard in weight_map.items():
        if tensor not in opened[shard].tensors:
            raise ModelError(f"{shards[shard]}: tensor '{tensor}' is missing, though"
                             f" {index_path.name} says it is there")
    tensors = {tensor: opened[shard].tensors[tensor] for tensor, shard in weight_map.items()}
    return Checkpoint(tensors, tuple(opened[name].identities[0] for name in shards))


def _read_weight_map(path: Path) -> dict[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: no 'weight_map' object from tensor names to files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_file_name(name):
            raise ModelError(f"{path}: tensor '{tensor}': {name!r} is not a plain file name")
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")
