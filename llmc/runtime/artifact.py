"""What `llmc compile` writes and `Runtime` loads: a directory `NAME.llmc`.

    manifest.json     everything the runtime needs to know (this module's dataclasses)
    weights.bin       packed weights, page-aligned, mapped at load
    variants/NAME.o   object code      variants/NAME.txt   the program it was made from
    variants/NAME.ARCH.{cubin,ptx,json}   for GPUs, in place of object code: machine code, what
                      later GPUs assemble, launches of a step with the assembler's report
    graph.txt         the optimised graph: code for hot shapes is made from it
    files/...         tokenizer and configuration files of the model

Loading an artifact runs the code in it: load only what you would run. The manifest carries its own
checksum, and the code's: code and manifest must fit each other, so an edited one is refused. Sizes
and offsets are checked against the files before anything is mapped; weights are hashed by `verify`,
which the cache calls (it remembers what did not change since).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import LlmcError, ModelError
from llmc.ir.quantization import Quantization
from llmc.runtime.locate import MANIFEST

FORMAT = 1
ALIGNMENT = 4096
WEIGHTS = "weights.bin"
GRAPH = "graph.txt"


@dataclass(frozen=True)
class TensorInfo:
    """An input, output or state. shape: dims in text form over the symbols. limit: an input's
    integers pick rows of a table with so many (0: they do not). ranges: the axes that its items
    pick from, as `ir.index_ranges` has them, as dims in text form."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    count: int = 1
    limit: int = 0
    ranges: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class WeightInfo:
    """A packed weight: `count` copies of `bytes` bytes each, at `offsets` of weights.bin.

    sources: for each copy, the names of the parameters that it was made of.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    bytes: int
    offsets: tuple[int, ...]
    sources: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class QuantizedInfo:
    """A matrix [n, k] of the model's files as it was quantised. error: root of the mean squared
    error over the root mean square; source_bytes: before, bytes: codes, scales and zeros;
    calibrated: codes were chosen for the errors of products, not of the matrix."""

    name: str
    dtype: str
    group: int
    shape: tuple[int, int]
    error: float
    source_bytes: int
    bytes: int
    calibrated: bool = False

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class QuantizationInfo:
    """What `quantize` was asked for (its options by name), and what became of it: the matrices that
    were quantised, and (name, reason) of those that were not. calibration: seconds that it took;
    uncalibrated: why some or all were not, where one might expect it."""

    options: dict[str, Any]
    quantized: tuple[QuantizedInfo, ...]
    kept: tuple[tuple[str, str], ...]
    calibration: float = 0.0
    uncalibrated: str = ""


@dataclass(frozen=True)
class VariantInfo:
    """One program's code. key: symbol -> (low, high); arena, and scratch of each worker: bytes, as
    dims over the symbols."""

    name: str
    key: Mapping[str, tuple[int, int]]
    arena: str
    scratch: str
    stages: int


@dataclass(frozen=True)
class SymbolInfo:
    name: str
    low: int
    high: int
    multiple: int = 1


@dataclass(frozen=True)
class Manifest:
    """kind: causal_lm, encoder or onnx. config: the model's facts (vocabulary, limits, end ids).
    fingerprint: identity of the source files; dtype: compute dtype; target: CPU and features.
    quantization: None where weights are as the model has them.
    hashes: SHA-256 of every other file, by its name relative to the artifact."""

    kind: str
    name: str
    target: str
    dtype: str
    fingerprint: str
    config: dict[str, Any]
    symbols: tuple[SymbolInfo, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    states: tuple[TensorInfo, ...]
    weights: tuple[WeightInfo, ...]
    variants: tuple[VariantInfo, ...]
    weight_bytes: int
    token_interface: dict[str, Any] | None = None
    quantization: QuantizationInfo | None = None
    timings: dict[str, float] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


_LISTS = {"symbols": SymbolInfo, "inputs": TensorInfo, "outputs": TensorInfo, "states": TensorInfo,
          "weights": WeightInfo, "variants": VariantInfo}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    data = asdict(manifest)
    (directory / MANIFEST).write_text(json.dumps(data | {"checksum": _checksum(data)}, indent=1))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artifact directory; ModelError if it is missing, damaged or too new."""
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}: not an artifact directory") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): compile the model again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ModelError(f"{path} is not an artifact of format {FORMAT}: compile the model again")
    if data.pop("checksum", None) != _checksum(data):
        raise ModelError(f"{path} was changed after it was written: compile the model again")
    try:
        for name, kind in _LISTS.items():
            data[name] = tuple(kind(**_tuples(item)) for item in data[name])
        if data.get("quantization") is not None:
            data["quantization"] = _quantization(data["quantization"])
        return Manifest(**data)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}): compile the model again") from None


def _quantization(data: dict[str, Any]) -> QuantizationInfo:
    quantized = tuple(QuantizedInfo(**_tuples(item)) for item in data["quantized"])
    return QuantizationInfo(**_tuples(data) | {"quantized": quantized})


def _checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's contents, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _tuples(item: Any) -> Any:
    """JSON lists back to tuples, all the way down (dicts keep their keys)."""
    if isinstance(item, list):
        return tuple(_tuples(value) for value in item)
    if isinstance(item, dict):
        return {key: _tuples(value) for key, value in item.items()}
    return item


def check_quantization(manifest: Manifest, wanted: Quantization | None) -> None:
    """LlmcError if an artifact's weights are not what is asked for (None: whatever they are)."""
    found = manifest.quantization.options if manifest.quantization is not None else None
    if wanted is not None and found != asdict(wanted):
        has = Quantization(**found).text() if found is not None else "none"
        raise LlmcError(f"{manifest.name} was compiled with the quantisation {has}, not "
                        f"{wanted.text()}: compile the model again")


class Artifact:
    """An artifact directory, opened: its manifest, code and mapped weights."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self._check_weights()
        self._mapping = self._map_weights()

    def object_code(self, variant: VariantInfo) -> bytes:
        return self._read(f"{variant.name}.o")

    def variant_file(self, variant: VariantInfo, extension: str) -> bytes:
        """Contents of variants/NAME.EXTENSION."""
        return self._read(f"{variant.name}.{extension}")

    def program_text(self, variant: VariantInfo) -> str:
        return self._read(f"{variant.name}.txt").decode()

    @cached_property
    def files(self) -> Path:
        """Directory of the model's own small files (tokenizer.json, ...), which are what was
        written: ModelError names one that is not."""
        for name in self.manifest.hashes:
            if name.startswith("files/"):
                self._read_file(name)
        return self.directory / "files"

    def weight_addresses(self) -> list[int]:
        """Base address of every copy of every weight, in ABI order."""
        base = self._mapping.ctypes.data if self._mapping.size else 0
        return [base + offset for weight in self.manifest.weights for offset in weight.offsets]

    def packed_weights(self) -> np.ndarray:
        """All of weights.bin, as bytes."""
        return self._mapping

    def read_weights(self, start: int, target: np.ndarray) -> None:
        """Fill an array of bytes with those of weights.bin from `start` on; ModelError if they are
        not there. For what is read once: the mapping's pages come one by one, which is slower."""
        rest = target.data
        try:
            with open(self.directory / WEIGHTS, "rb", buffering=0) as file:
                file.seek(start)
                while rest and (count := file.readinto(rest)):
                    rest = rest[count:]
        except OSError as error:
            raise ModelError(f"{self.directory / WEIGHTS}: {error.strerror or error}") from None
        if rest:
            raise ModelError(f"{self.directory / WEIGHTS} ends too early: compile the model again")

    def weight_data(self, weight: WeightInfo, copy: int = 0) -> np.ndarray:
        """The packed bytes of one copy."""
        start = weight.offsets[copy]
        return self._mapping[start:start + weight.bytes]

    def verify(self, hash_of: Callable[[Path], str] | None = None) -> None:
        """Compare every file with its hash; ModelError names the first that differs. hash_of: the
        SHA-256 of a file, where it may be known without reading it."""
        for name, expected in self.manifest.hashes.items():
            path = self.directory / name
            try:
                found = (hash_of or hash_file)(path)
            except OSError as error:
                raise ModelError(f"{path}: {error.strerror}") from None
            if found != expected:
                raise ModelError(f"{path} is not what was written: its SHA-256 is {found}, the "
                                 f"manifest says {expected}; compile the model again")

    def graph_text(self) -> str | None:
        """The optimised graph; None in artifacts that were written without it."""
        return self._read_file(GRAPH).decode() if GRAPH in self.manifest.hashes else None

    def _read(self, name: str) -> bytes:
        return self._read_file(f"variants/{name}")

    def _read_file(self, name: str) -> bytes:
        path = self.directory / name
        try:
            contents = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}: compile the model again") from None
        if hashlib.sha256(contents).hexdigest() != self.manifest.hashes.get(name):
            raise ModelError(f"{path} was changed after it was written: compile the model again")
        return contents

    def _check_weights(self) -> None:
        path = self.directory / WEIGHTS
        size = path.stat().st_size if path.is_file() else -1
        if size != self.manifest.weight_bytes:
            raise ModelError(f"{path} has {max(size, 0)} bytes, its manifest says "
                             f"{self.manifest.weight_bytes}: compile the model again")
        for weight in self.manifest.weights:
            for offset in weight.offsets:
                if offset % 64 or not 0 <= offset <= size - weight.bytes or weight.bytes < 0:
                    raise ModelError(f"{path}: weight {weight.name} lies outside the file")

    def _map_weights(self) -> np.ndarray:
        if not self.manifest.weight_bytes:
            return np.empty(0, np.uint8)
        with open(self.directory / WEIGHTS, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapping.madvise(mmap.MADV_WILLNEED)
        return np.frombuffer(mapping, np.uint8)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(directory: Path) -> dict[str, str]:
    """Hashes of a folder's files, by `folder/name`."""
    return {f"{directory.name}/{path.name}": hash_file(path)
            for path in sorted(directory.iterdir())}


def is_artifact(path: str | os.PathLike[str]) -> bool:
    return (Path(path) / MANIFEST).is_file()
