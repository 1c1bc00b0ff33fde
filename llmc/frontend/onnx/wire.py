"""Finds weights inside a serialized ONNX model, so that they are mapped and not parsed.

The protobuf wire format: a message is a run of (key, value); the key is a varint of
field number * 8 + wire type; type 0 is a varint, 1 eight bytes, 2 a length and so many bytes,
5 four bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

SMALLEST = 4096  # bytes; less than a page is not worth mapping
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
MAX_VARINT_BYTES = 10


class MalformedError(ValueError):
    """The bytes are not protobuf; the real parser says what is wrong."""


@dataclass(frozen=True)
class Field:
    """One field of a message: it occupies start..end, its payload payload..end."""

    number: int
    wire_type: int
    start: int
    payload: int
    end: int


def without_weights(data: mmap.mmap) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The model with the large raw_data of its initializers left out, and where those are:
    {index of the initializer: (offset in the file, bytes)}. MalformedError."""
    places: dict[int, tuple[int, int]] = {}
    parts: list[bytes] = []
    seen = False
    for field in _fields(data, 0, len(data)):
        if field.number != MODEL_GRAPH or field.wire_type != 2:
            parts.append(data[field.start : field.end])
            continue
        if seen:
            raise MalformedError("two graphs")
        seen = True
        parts.append(_message(MODEL_GRAPH, _graph(data, field, places)))
    return b"".join(parts), places


def _graph(data: mmap.mmap, graph: Field, places: dict[int, tuple[int, int]]) -> bytes:
    parts: list[bytes] = []
    index = 0
    for field in _fields(data, graph.payload, graph.end):
        if field.number != GRAPH_INITIALIZER or field.wire_type != 2:
            parts.append(data[field.start : field.end])
            continue
        parts.append(_message(GRAPH_INITIALIZER, _tensor(data, field, places, index)))
        index += 1
    return b"".join(parts)


def _tensor(
    data: mmap.mmap, tensor: Field, places: dict[int, tuple[int, int]], index: int
) -> bytes:
    if tensor.end - tensor.payload < SMALLEST:
        return data[tensor.payload : tensor.end]
    parts: list[bytes] = []
    for field in _fields(data, tensor.payload, tensor.end):
        large = field.end - field.payload >= SMALLEST
        if field.number != TENSOR_RAW_DATA or field.wire_type != 2 or not large:
            parts.append(data[field.start : field.end])
            continue
        if index in places:
            raise MalformedError("raw_data twice")
        places[index] = (field.payload, field.end - field.payload)
    return b"".join(parts)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[Field]:
    position = start
    while position < end:
        key, payload = _varint(data, position, end)
        wire_type = key & 7
        if wire_type == 2:
            length, payload = _varint(data, payload, end)
            after = payload + length
        elif wire_type == 0:
            _, after = _varint(data, payload, end)
        elif wire_type in (1, 5):
            after = payload + (8 if wire_type == 1 else 4)
        else:
            raise MalformedError(f"wire type {wire_type}")
        if after > end:
            raise MalformedError("a field that is longer than its message")
        yield Field(key >> 3, wire_type, position, payload, after)
        position = after


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """(value, position behind it)."""
    value = 0
    for count in range(MAX_VARINT_BYTES):
        if position + count >= end:
            break
        byte = data[position + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position + count + 1
    raise MalformedError("an endless number")


def _message(number: int, payload: bytes) -> bytes:
    return _encoded(number << 3 | 2) + _encoded(len(payload)) + payload


def _encoded(value: int) -> bytes:
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
