"""The cache directory: compiled models by what they were made from, and variants of hot shapes.

An entry is an artifact directory named by a key over the source files' identity, the options, and
llmc's own sources. Writers hold a file lock per key and move finished directories into place, so
any number of processes may start together, and what a killed one leaves is not taken for an entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import CacheError, ModelError
from llmc.runtime.artifact import (
    Artifact,
    Manifest,
    VariantInfo,
    hash_file,
    is_artifact,
    read_manifest,
)
from llmc.runtime.locate import MANIFEST, artifact_directory
from llmc.runtime.sources import SMALL, Memory, stamp
from llmc.runtime.targets import short_target

if TYPE_CHECKING:
    from filelock import FileLock

HEADER_BYTES = 1 << 16  # most of a line in a variant's file
VARIANT_CACHE_BYTES = 256 << 20  # most that variants of hot shapes take on disk


@dataclass(frozen=True)
class Entry:
    """What is cached. kind: artifact, variant or profile; model and target: in a few words;
    variant: its name, which says the shape, or those of an artifact; bytes on disk; used: time of
    last use (seconds since 1970)."""

    path: Path
    kind: str
    model: str
    target: str
    variant: str
    bytes: int
    used: float


def describe(manifest: Manifest) -> str:
    """A model in a few words: its name, layers and width, dtype."""
    layers, width = (manifest.config.get(name) for name in ("layers", "hidden_size"))
    size = f" {layers}x{width}" if layers and width else ""
    return f"{manifest.name}{size} {manifest.dtype}"


class Cache:
    """Artifacts under directory/artifacts."""

    def __init__(self, directory: Path):
        self.directory = directory / "artifacts"
        self._memory = Memory(directory / "sources.json")

    def artifact(self, key: str, build: Callable[[Path], object]) -> Artifact:
        """The artifact for a key, built by build(path) when it is missing or damaged."""
        path = artifact_directory(self.directory.parent, key)
        if (found := self._open(path)) is not None:
            return found
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with self._lock(key):
                if (found := self._open(path)) is not None:
                    return found
                if not is_artifact(path):
                    _remove(path)
                build(path)
                artifact = Artifact(path)
                for name, contents in artifact.manifest.hashes.items():
                    if (path / name).stat().st_size > SMALL:
                        self._memory.put(_contents_of(path / name), contents)
                self._memory.save()
                return artifact
        except OSError as error:
            raise CacheError(f"cannot write the cache {self.directory}: {error.strerror or error}; "
                             "set LLMC_CACHE_DIR to a directory with space") from None

    def _open(self, path: Path) -> Artifact | None:
        """The artifact at path, or None when it is missing or damaged (then it is rebuilt)."""
        if not is_artifact(path):
            return None
        try:
            artifact = Artifact(path)
            artifact.verify(self._hash)
        except ModelError:
            return None
        self._memory.save()
        _mark_used(path / MANIFEST)
        return artifact

    def _hash(self, file: Path) -> str:
        """The SHA-256 of a file; of a large one that was not written since, by memory."""
        if file.stat().st_size <= SMALL:
            return hash_file(file)
        return self._memory.get(_contents_of(file), lambda: hash_file(file))

    def _lock(self, key: str, seconds: float = -1) -> FileLock:
        from filelock import FileLock  # a hot start needs no lock

        return FileLock(self.directory / f"{key}.lock", timeout=seconds)

    def _sweep(self) -> None:
        """Remove what killed writers left: half-written directories whose locks nobody holds."""
        for stale in self.directory.glob(".*.llmc.*"):
            with suppress(TimeoutError), self._lock(stale.name.split(".")[1], seconds=0):
                shutil.rmtree(stale, ignore_errors=True)

    def entries(self) -> Iterator[Entry]:
        """What is cached, oldest use first."""
        found = []
        for path in self.directory.glob("*.llmc"):
            if is_artifact(path):
                size = _bytes_of(path)
                used = (path / MANIFEST).stat().st_mtime
                found.append(Entry(path, "artifact", *_facts(path), size, used))
        yield from sorted(found, key=lambda entry: entry.used)

    def clear(self) -> int:
        """Delete what is cached, but for entries that are being built; the number of bytes
        freed."""
        self._sweep()
        freed = 0
        for path in self.directory.glob("*.llmc"):
            with suppress(TimeoutError, OSError), self._lock(path.stem, seconds=0):
                size = _bytes_of(path)
                _remove(path)
                freed += size
        return freed


def _contents_of(file: Path) -> str:
    """What remembered hashes of files are called."""
    return f"contents {stamp(file)}"


def _bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _remove(path: Path) -> None:
    """Delete a directory, or a file that is where one should be, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mark_used(manifest: Path) -> None:
    """The manifest's time of change is that of last use; a read-only cache stays as it is."""
    with suppress(OSError):
        os.utime(manifest)


def _facts(path: Path) -> tuple[str, str, str]:
    """Model, target and variants of an artifact."""
    try:
        manifest = read_manifest(path)
    except ModelError:
        return "(damaged)", "", ""
    names = " ".join(variant.name for variant in manifest.variants)
    return describe(manifest), short_target(manifest.target), names


# ---- variants of hot shapes -----------------------------------------------------------------


@dataclass(frozen=True)
class StoredVariant:
    """A variant that was compiled for a shape: what the runtime must know, and object code (for a
    GPU a cubin or PTX). launches: how a GPU runs it, as JSON ("" for a host); model and target, as
    people know them."""

    info: VariantInfo
    object: bytes
    compile_seconds: float
    launches: str = ""
    model: str = ""
    target: str = ""


class VariantCache:
    """Variants under directory/variants, one file each: its SHA-256, a line of JSON, object code.

    Files are written aside and moved into place. What does not fit its hash is not there.
    """

    def __init__(self, directory: Path, limit: int = VARIANT_CACHE_BYTES):
        self.directory = directory / "variants"
        self.limit = limit

    def path(self, key: str) -> Path:
        return self.directory / f"{key}.variant"

    def get(self, key: str) -> StoredVariant | None:
        """The variant of a key; None when it is missing or damaged. Counts as use."""
        path = self.path(key)
        try:
            stored = _parse_variant(path.read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        _mark_used(path)
        return stored

    def put(self, key: str, variant: StoredVariant) -> None:
        """Keep a variant, and drop those not used for longest over the limit. OSError where the
        directory cannot be written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{key}.", dir=self.directory)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_format_variant(variant))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path(key))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._trim(keep=self.path(key))

    def lock(self, key: str) -> FileLock:
        """Held while a key is compiled, so that other processes wait for the result instead. The
        directory must be writable."""
        from filelock import FileLock

        self.directory.mkdir(parents=True, exist_ok=True)
        return FileLock(self.directory / f"{key}.lock")

    def sweep(self, held: str) -> None:
        """Remove what killed writers left: unfinished files whose locks nobody holds, and those of
        the key whose lock the caller holds."""
        for stale in self.directory.glob(".*"):
            key = stale.name.split(".")[1]
            if key == held:
                stale.unlink(missing_ok=True)
            else:
                with suppress(TimeoutError), self.lock(key).acquire(timeout=0):
                    stale.unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        """What is cached, oldest use first."""
        found = []
        for path in self.directory.glob("*.variant"):
            with suppress(OSError):
                status = path.stat()
                found.append(Entry(path, "variant", *_variant_facts(path), status.st_size,
                                   status.st_mtime))
        yield from sorted(found, key=lambda entry: entry.used)

    def clear(self) -> int:
        """Delete all variants; the number of bytes freed."""
        freed = sum(entry.bytes for entry in self.entries())
        shutil.rmtree(self.directory, ignore_errors=True)
        return freed

    def _trim(self, keep: Path) -> None:
        entries = list(self.entries())
        size = sum(entry.bytes for entry in entries)
        for entry in entries:
            if size <= self.limit:
                return
            if entry.path != keep:
                entry.path.unlink(missing_ok=True)
                size -= entry.bytes


def _format_variant(variant: StoredVariant) -> bytes:
    facts = {"info": asdict(variant.info), "compile_seconds": variant.compile_seconds,
             "launches": variant.launches, "model": variant.model, "target": variant.target}
    contents = json.dumps(facts).encode() + b"\n" + variant.object
    return hashlib.sha256(contents).hexdigest().encode() + b"\n" + contents


def _parse_variant(data: bytes) -> StoredVariant:
    """The inverse of _format_variant; ValueError if anything was changed or is missing."""
    checksum, _, contents = data.partition(b"\n")
    if hashlib.sha256(contents).hexdigest().encode() != checksum:
        raise ValueError("damaged")
    facts, _, code = contents.partition(b"\n")
    parsed = json.loads(facts)
    return StoredVariant(variant_info(parsed["info"]), code, float(parsed["compile_seconds"]),
                         str(parsed["launches"]), str(parsed["model"]), str(parsed["target"]))


def variant_info(data: Mapping) -> VariantInfo:
    """A VariantInfo from its JSON form."""
    key = {name: (int(low), int(high)) for name, (low, high) in data["key"].items()}
    return VariantInfo(**{**data, "key": key})


def _variant_facts(path: Path) -> tuple[str, str, str]:
    """Model, target and name of a variant, without a look at its code."""
    with suppress(OSError, ValueError, KeyError, TypeError), open(path, "rb") as stream:
        stream.readline(HEADER_BYTES)
        facts = json.loads(stream.readline(HEADER_BYTES))
        return str(facts["model"]), str(facts["target"]), str(facts["info"]["name"])
    return "(damaged)", "", ""


# ---- profiles -----------------------------------------------------------------------------------


def profile_entries(directory: Path) -> Iterator[Entry]:
    """The profiles of a cache directory, oldest use first."""
    from llmc.runtime.profile import read_profile

    found = []
    for path in (directory / "profiles").glob("*.json"):
        with suppress(OSError):
            profile, status = read_profile(path), path.stat()
            facts = ("(damaged)", "", "") if profile is None else (
                profile.model, profile.target, f"{len(profile.hottest())} shapes")
            found.append(Entry(path, "profile", *facts, status.st_size, status.st_mtime))
    yield from sorted(found, key=lambda entry: entry.used)
