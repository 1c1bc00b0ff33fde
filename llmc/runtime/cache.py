"""The cache directory: compiled models by what they were made from.

An entry is an artifact directory named by a key over the source files' identity, the options, and
llmc's own sources. Writers hold a file lock per key and move finished directories into place, so
any number of processes may start together, and what a killed one leaves is not taken for an entry.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import CacheError, ModelError
from llmc.runtime.artifact import MANIFEST, Artifact, is_artifact, read_manifest

HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Entry:
    """A cached artifact: name, size on disk in bytes, time of last use (seconds since 1970)."""

    path: Path
    name: str
    bytes: int
    used: float


class Cache:
    """Artifacts under directory/artifacts."""

    def __init__(self, directory: Path):
        self.directory = directory / "artifacts"

    def artifact(self, key: str, build: Callable[[Path], object]) -> Artifact:
        """The artifact for a key, built by build(path) when it is missing or damaged."""
        path = self.directory / f"{key}.llmc"
        if (found := _open(path)) is not None:
            return found
        from filelock import FileLock

        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory / f"{key}.lock"):
                if (found := _open(path)) is not None:
                    return found
                self._sweep(path.name)
                build(path)
        except OSError as error:
            raise CacheError(f"cannot write the cache {self.directory}: {error.strerror or error}; "
                             "set LLMC_CACHE_DIR to a directory with space") from None
        return Artifact(path)

    def _sweep(self, name: str) -> None:
        """Remove what killed writers of an entry left; its lock is held, so nobody is writing."""
        for stale in self.directory.glob(f".{name}.*"):
            shutil.rmtree(stale, ignore_errors=True)

    def entries(self) -> Iterator[Entry]:
        """What is cached, oldest use first."""
        found = []
        for path in self.directory.glob("*.llmc"):
            if is_artifact(path):
                size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                found.append(Entry(path, _name(path), size, (path / MANIFEST).stat().st_mtime))
        yield from sorted(found, key=lambda entry: entry.used)

    def clear(self) -> int:
        """Delete everything cached; the number of bytes freed."""
        freed = sum(entry.bytes for entry in self.entries())
        shutil.rmtree(self.directory, ignore_errors=True)
        return freed


def _open(path: Path) -> Artifact | None:
    """The artifact at path, or None when it is missing or damaged (then it is rebuilt)."""
    if not is_artifact(path):
        return None
    try:
        artifact = Artifact(path)
        artifact.verify_code()
    except ModelError:
        return None
    _mark_used(path / MANIFEST)
    return artifact


def _mark_used(manifest: Path) -> None:
    """The manifest's time of change is that of last use; a read-only cache stays as it is."""
    with suppress(OSError):
        os.utime(manifest)


def _name(path: Path) -> str:
    try:
        return read_manifest(path).name
    except ModelError:
        return "(damaged)"


def source_key(path: Path, options: str) -> str:
    """Identity of a model's files, the options and this llmc: 32 hex digits.

    Files count by name, size, time of change, and the first 64 KiB of their contents.
    """
    digest = hashlib.blake2b(options.encode(), digest_size=16)
    digest.update(str(path.resolve()).encode())
    for file in _source_files(path):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(HEADER_BYTES))
    digest.update(_own_sources().encode())
    return digest.hexdigest()


def text_key(text: str) -> str:
    """Identity of what a text describes, and this llmc: 32 hex digits."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    digest.update(_own_sources().encode())
    return digest.hexdigest()


def _source_files(path: Path) -> list[Path]:
    directory = path if path.is_dir() else path.parent
    try:
        return sorted(f for f in directory.iterdir() if f.is_file() or f == path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


def _own_sources() -> str:
    """Changes when a file of this package does."""
    root = Path(__file__).parent.parent
    stamps = (f"{p.relative_to(root)} {p.stat().st_size} {p.stat().st_mtime_ns}"
              for p in sorted(root.rglob("*.py")))
    return os.linesep.join(stamps)
