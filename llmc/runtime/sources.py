"""The identity of a model's files, and of this llmc: what they hold, wherever they lie and whenever
they were written.

Hashing gigabytes takes seconds. So what large files held is remembered in the cache by their place,
size and times: those that did not change since are not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from llmc.errors import ModelError

SMALL = 1 << 16  # bytes up to which a file is read every time
PIECE = 16 << 20  # bytes hashed at once, by a thread
MOST_REMEMBERED = 1024

External = Callable[[Path], list[str]]  # names of an .onnx file's other files, relative to it


class Memory:
    """Strings by what they were computed from, in a file that is nobody's loss."""

    def __init__(self, path: Path):
        self.path = path
        self._new: dict[str, str] = {}
        self._known = self._read()

    def _read(self) -> dict[str, str]:
        with suppress(OSError, ValueError):
            found = json.loads(self.path.read_text())
            if isinstance(found, dict) and all(isinstance(each, str) for each in found.values()):
                return found
        return {}

    def get(self, source: str, compute: Callable[[], str]) -> str:
        found = self._known.get(source)
        if found is None:
            found = self._known[source] = self._new[source] = compute()
        return found

    def put(self, source: str, computed: str) -> None:
        """Remember what was computed elsewhere."""
        self._known[source] = self._new[source] = computed

    def save(self) -> None:
        """Add what is new to the file, if it can be written; of very many, the oldest go."""
        if not self._new:
            return
        merged = list((self._read() | self._new).items())[-MOST_REMEMBERED:]
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.",
                                                 dir=self.path.parent)
            with os.fdopen(handle, "w") as stream:
                json.dump(dict(merged), stream)
            os.replace(temporary, self.path)
            self._new.clear()


def source_key(path: Path, options: str, memory: Memory, external: External) -> str:
    """Identity of a model's files, the options and this llmc: 32 hex digits. ModelError where a
    file cannot be read."""
    digest = hashlib.blake2b(options.encode(), digest_size=16)
    try:
        for name, file in _source_files(path, memory, external):
            digest.update(f"\n{name} {_contents(file, memory)}".encode())
    except OSError as error:
        raise ModelError(f"{error.filename or path}: {error.strerror}") from None
    digest.update(own_sources().encode())
    memory.save()
    return digest.hexdigest()


def text_key(text: str) -> str:
    """Identity of what a text describes, and this llmc: 32 hex digits."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    digest.update(own_sources().encode())
    return digest.hexdigest()


def _source_files(path: Path, memory: Memory, external: External) -> Iterator[tuple[str, Path]]:
    """Whatever an artifact may be made of, by a name that does not depend on the place: of a
    directory all files, and the configurations of parts; of an .onnx file those that it names, and
    small ones beside it."""
    if path.is_dir():
        found = [file for file in path.iterdir() if file.is_file()]
        for file in sorted([*found, *path.glob("*/config.json")]):
            yield str(file.relative_to(path)), file
        return
    yield "", path
    if path.suffix != ".onnx":  # no model, as the import will say
        return
    names = json.loads(memory.get(f"external {stamp(path)}", lambda: json.dumps(external(path))))
    beside = [file.name for file in path.parent.glob("*.json*") if file.is_file()]
    beside += [file.name for file in path.parent.glob("*.jinja") if file.is_file()]
    for name in sorted({*names, *beside} - {path.name}):
        if (path.parent / name).is_file():  # what is missing is reported by the import
            yield name, path.parent / name


def stamp(file: Path) -> str:
    """Changes when a file is written, moved or replaced."""
    status = file.stat()
    return (f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "
            f"{status.st_ino}")


def _contents(file: Path, memory: Memory) -> str:
    """SHA-256 of a small file; of the SHA-256s of its pieces, of a large one."""
    if file.stat().st_size <= SMALL:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return memory.get(stamp(file), lambda: _hash_pieces(file))


def _hash_pieces(file: Path) -> str:
    with open(file, "rb") as stream, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        number = stream.fileno()

        def hash_piece(start: int) -> bytes:
            return hashlib.sha256(os.pread(number, PIECE, start)).digest()

        pieces = pool.map(hash_piece, range(0, os.fstat(number).st_size, PIECE))
        return hashlib.sha256(b"".join(pieces)).hexdigest()


@cache
def own_sources() -> str:
    """Changes when the contents of a file of this package do; what this process has loaded does
    not."""
    root = str(Path(__file__).parent.parent)
    folders, files = [root], []
    for folder in folders:
        with os.scandir(folder) as entries:  # every start pays for this: several times Path.rglob
            for entry in entries:
                if entry.name.endswith(".py"):
                    files.append(entry.path)
                elif entry.is_dir() and entry.name != "__pycache__":
                    folders.append(entry.path)
    digest = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as stream:
            contents = stream.read()
        digest.update(f"\n{file[len(root):]} {len(contents)}\n".encode() + contents)
    return digest.hexdigest()
