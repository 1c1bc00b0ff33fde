"""Reads ONNX protobuf: the model without its external data, element types, tensors' values.

Sizes and offsets are checked against the file before anything is mapped or allocated.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from llmc.errors import ModelError
from llmc.frontend.model import StoredTensor
from llmc.frontend.onnx import wire
from llmc.ir import dtypes
from llmc.ir.dtypes import DType

ELEMENT_TYPES: dict[int, DType] = {
    1: dtypes.f32,
    2: dtypes.u8,
    3: dtypes.i8,
    4: dtypes.u16,
    5: dtypes.i16,
    6: dtypes.i32,
    7: dtypes.i64,
    9: dtypes.bool_,
    10: dtypes.f16,
    11: dtypes.f64,
    12: dtypes.u32,
    13: dtypes.u64,
    16: dtypes.bf16,
    17: dtypes.f8e4m3fn,
    18: dtypes.f8e4m3fnuz,
    19: dtypes.f8e5m2,
    20: dtypes.f8e5m2fnuz,
    21: dtypes.u4,
    22: dtypes.i4,
    23: dtypes.f4e2m1,
    24: dtypes.f8e8m0,
    25: dtypes.u2,
    26: dtypes.i2,
}
REFUSED_TYPES = {8: "string", 14: "complex64", 15: "complex128"}
MAX_RANK = 32
MAX_ITEMS = 2**40


def read_model(path: Path) -> ModelProto:
    """Parses the file but for its weights, which become external data in it; other external data
    is not touched. ModelError if it is no ONNX model."""
    model = ModelProto()
    try:
        content, places = _skeleton(path)
        model.ParseFromString(content)
    except OSError as error:
        raise ModelError(f"{path}: cannot read it: {error.strerror}") from error
    except (DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: no ONNX model, or damaged: {error}") from error
    for index, (offset, length) in places.items():
        _refer(model.graph.initializer[index], path.name, offset, length)
    return _checked(model, path)


def parse_model(content: bytes, path: Path) -> ModelProto:
    """A model that is in memory; `path` names it in errors, and its external data are beside it."""
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: no ONNX model, or damaged: {error}") from error
    return _checked(model, path)


def _checked(model: ModelProto, path: Path) -> ModelProto:
    if not model.HasField("graph") or not model.graph.output:
        raise ModelError(f"{path}: no ONNX model, or damaged: it has no graph with outputs")
    _check_text(model, path)
    return model


def _skeleton(path: Path) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The file without its weights, and where those are (see `wire`)."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b"", {}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return wire.without_weights(data)
            except wire.MalformedError:
                return data[:], {}


def _refer(tensor: TensorProto, file: str, offset: int, length: int) -> None:
    """Makes a tensor's raw_data, left in the model's file, external data in that file."""
    if is_external(tensor):
        return
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _check_text(message: Any, path: Path) -> None:
    """ModelError for a string that is not UTF-8, which protobuf hands out as bytes."""
    if isinstance(message, TensorProto):
        strings = [message.name]  # its other fields may be large
    else:
        strings = []
        for descriptor, value in message.ListFields():
            items = (
                [value]
                if isinstance(value, (str, bytes)) or hasattr(value, "ListFields")
                else value
            )
            if descriptor.type == descriptor.TYPE_MESSAGE:
                for item in items:
                    _check_text(item, path)
            elif descriptor.type == descriptor.TYPE_STRING:
                strings += items
    for text in strings:
        if not isinstance(text, str):
            raise ModelError(f"{path}: damaged: the name {text!r} is not UTF-8")


def element_dtype(code: int, location: str) -> DType:
    """The dtype of an ONNX element type number; ModelError for those without one."""
    if code not in ELEMENT_TYPES:
        name = REFUSED_TYPES.get(code, f"number {code}")
        raise ModelError(f"{location}: element type {name} is not supported")
    return ELEMENT_TYPES[code]


def tensor_shape(proto: TensorProto, location: str) -> tuple[int, ...]:
    """The shape of a tensor, checked to be sane."""
    shape = tuple(proto.dims)
    if any(dim < 0 for dim in shape) or len(shape) > MAX_RANK or math.prod(shape) > MAX_ITEMS:
        raise ModelError(f"{location}: impossible shape {list(shape)}")
    return shape


def is_external(proto: TensorProto) -> bool:
    return bool(proto.data_location == TensorProto.EXTERNAL)


def stored_tensor(name: str, proto: TensorProto, model_path: Path) -> StoredTensor:
    """Where an initializer's values are: in its external file, or in the protobuf."""
    location = f"{model_path}: tensor '{name}'"
    dtype = element_dtype(proto.data_type, location)
    shape = tensor_shape(proto, location)
    if not is_external(proto):
        return StoredTensor.from_array(
            name, _embedded_array(proto, dtype, shape, location), model_path
        )
    file, offset = _external_place(proto, _packed_bytes(dtype, shape), model_path, location)
    if dtype.bits >= 8:
        return StoredTensor(name, dtype, shape, file, offset, _packed_bytes(dtype, shape))
    packed = StoredTensor(
        name, dtypes.u8, (_packed_bytes(dtype, shape),), file, offset, _packed_bytes(dtype, shape)
    )
    return StoredTensor.from_array(name, _unpack(packed.read(), dtype, shape), file)


def small_array(proto: Any, location: str) -> tuple[np.ndarray[Any, Any], DType]:
    """The values of a tensor inside the protobuf (a node's attribute), and their dtype."""
    if not isinstance(proto, TensorProto):
        raise ModelError(f"{location}: its attribute 'value' is no tensor")
    dtype = element_dtype(proto.data_type, location)
    if is_external(proto):
        raise ModelError(f"{location}: a node's tensor in external data is not supported")
    return _embedded_array(proto, dtype, tensor_shape(proto, location), location), dtype


def external_files(model: ModelProto, model_path: Path) -> list[Path]:
    """The files besides the model's own that its initializers name, sorted; also those of the
    bodies of loops and branches."""
    found = set()
    graphs = [model.graph]
    for graph in graphs:
        for proto in graph.initializer:
            if is_external(proto):
                location = f"{model_path}: tensor '{proto.name}'"
                found.add(_external_path(_external_entries(proto), model_path, location))
        for attribute in (each for node in graph.node for each in node.attribute):
            graphs += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return sorted(found - {model_path})


def _packed_bytes(dtype: DType, shape: tuple[int, ...]) -> int:
    return (math.prod(shape) * dtype.bits + 7) // 8


def _external_entries(proto: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.external_data}


def _external_path(entries: dict[str, str], model_path: Path, location: str) -> Path:
    """The file of external data: relative, without '..', beside or below the model."""
    name = entries.get("location", "")
    if name == model_path.name:
        return model_path
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ModelError(
            f"{location}: external data location {name!r} is no relative path"
            " inside the model's directory"
        )
    return model_path.parent.joinpath(*parts)


def _external_place(
    proto: TensorProto, wanted: int, model_path: Path, location: str
) -> tuple[Path, int]:
    """(file, offset) of a tensor's `wanted` bytes, which are known to be there."""
    entries = _external_entries(proto)
    file = _external_path(entries, model_path, location)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", wanted))
        size = os.stat(file).st_size
    except ValueError as error:
        raise ModelError(f"{location}: external data offset or length is no number") from error
    except OSError as error:
        raise ModelError(f"{location}: external data {file.name}: {error.strerror}") from error
    if length != wanted:
        raise ModelError(f"{location}: its shape takes {wanted} bytes, its data has {length}")
    if offset < 0 or offset + wanted > size:
        raise ModelError(
            f"{location}: external data is too short: {file.name} has {size} bytes,"
            f" {wanted} at offset {offset} are needed"
        )
    return file, offset


def _embedded_array(
    proto: TensorProto, dtype: DType, shape: tuple[int, ...], location: str
) -> np.ndarray[Any, Any]:
    """Values inside the protobuf: raw bytes (a view of them), or the typed fields."""
    wanted = _packed_bytes(dtype, shape)
    if proto.HasField("raw_data"):
        raw = np.frombuffer(proto.raw_data, np.uint8)
    else:
        raw = _typed_field_bytes(proto, dtype, location)
    if raw.size != wanted:
        raise ModelError(
            f"{location}: shape {list(shape)} of {dtype} takes {wanted} bytes, it has {raw.size}"
        )
    return _unpack(raw, dtype, shape) if dtype.bits < 8 else raw.view(dtype.numpy).reshape(shape)


def _typed_field_bytes(proto: TensorProto, dtype: DType, location: str) -> np.ndarray[Any, Any]:
    """float_data, int64_data ... as little-endian bytes of the dtype; int32_data holds bits."""
    fields = {"f32": "float_data", "f64": "double_data", "i64": "int64_data"}
    fields |= {"u32": "uint64_data", "u64": "uint64_data"}
    values = getattr(proto, fields.get(dtype.name, "int32_data"))
    try:
        if dtype.name in fields or dtype.name == "i32":
            array = np.asarray(values, dtype=dtype.numpy)
        else:
            bits = np.asarray(values, dtype=np.int64)
            array = bits.astype({8: np.uint8, 16: np.uint16}.get(dtype.bits, np.uint8))
    except (OverflowError, ValueError) as error:
        raise ModelError(f"{location}: its values do not fit {dtype}") from error
    return array.view(np.uint8)


def _unpack(
    raw: np.ndarray[Any, Any], dtype: DType, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """2- and 4-bit items, first item in the low bits, as one ml_dtypes item a byte."""
    shifts = np.arange(0, 8, dtype.bits, dtype=np.uint8)
    codes = (raw[:, None] >> shifts) & ((1 << dtype.bits) - 1)
    codes = codes.reshape(-1)[: math.prod(shape)].reshape(shape).astype(np.uint8)
    if dtype.kind == "int":
        signed = codes.astype(np.int8)
        signed[codes >= 1 << (dtype.bits - 1)] -= 1 << dtype.bits
        return signed.astype(dtype.numpy)
    return codes.astype(dtype.numpy) if dtype.kind == "uint" else codes.view(dtype.numpy)
