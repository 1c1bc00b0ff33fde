"""Damage to files: to bytes, to JSON values, and to protobuf messages; and what a parser may do
with it: raise LlmcError, quickly, in bounded memory, having read only what is in the directory."""

from __future__ import annotations

import copy
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError

ODD_VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 0.5, -0.5, 1e308, float("inf"), float("nan"), 2**31,
    2**31 - 1, 2**63, 10**30, "", "x", "../x", "/etc/passwd", "a\nb", "a\0b", "\ud800", [], {}, [1],
    [[]], {"a": 1}, [None], "F32", "sliding_attention", 1e-300,
)
SECONDS = 20.0  # for one file; a damaged one must be refused at once
MEMORY = 4 << 30  # bytes more than now


# ---- bytes --------------------------------------------------------------------------------------


def damage_bytes(content: bytes, r: random.Random) -> bytes:
    """Bytes flipped, cut out, doubled, inserted or cut off."""
    data = bytearray(content)
    for _ in range(r.choice((1, 1, 1, 2, 5))):
        at = r.randrange(1 + (len(data) if r.random() < 0.5 else min(400, len(data))))
        length = r.choice((1, 1, 2, 4, 8, 64))
        match r.randrange(6):
            case 0:
                data[at:at + 1] = bytes([r.randrange(256)])
            case 1:
                del data[at:at + length]
            case 2:
                data[at:at] = data[at:at + length]
            case 3:
                data[at:at] = r.randbytes(length)
            case 4:
                data[at:at + length] = r.choice((b"\xff", b"\0", b"\x7f")) * length
            case 5:
                del data[at:at + 1 if r.random() < 0.8 else None]
    return bytes(data)


# ---- JSON ---------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def damage_json(value: Any, r: random.Random, words: tuple[str, ...] = ()) -> Any:
    """Values replaced, removed, swapped and added. words: keys that may be added."""
    value = copy.deepcopy(value)
    for _ in range(r.choice((1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return r.choice(ODD_VALUES)
        container, key = r.choice(found)
        other, other_key = r.choice(found)
        match r.randrange(6):
            case 0 | 1:
                container[key] = copy.deepcopy(r.choice(ODD_VALUES))
            case 2:
                del container[key]
            case 3:
                container[key] = copy.deepcopy(other[other_key])
            case 4 if type(container[key]) in (int, float):
                container[key] = r.choice((container[key] + 1, container[key] * 2,
                                           container[key] - 1, -container[key]))
            case _:
                if isinstance(container, dict):
                    container[r.choice(words or ("x",))] = copy.deepcopy(r.choice(ODD_VALUES))
    return value


# ---- protobuf -----------------------------------------------------------------------------------


def messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages inside."""
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            for inner in value if hasattr(value, "append") or hasattr(value, "add") else [value]:
                yield from messages(inner)


ODD_STRINGS = ("", "x", "../x", "/etc/passwd", "a\nb", "com.microsoft", "Add", "Loop", "Reshape")
ODD_NUMBERS = (-1, 0, 1, 2, 3, 7, 11, 16, 20, 2**31 - 1)


def damage_message(message: Any, r: random.Random) -> None:
    """Fields of random messages inside changed, cleared, doubled or shuffled, in place."""
    every = [each for each in messages(message) if each.ListFields()]
    for _ in range(r.choice((1, 1, 2, 3))):
        target = r.choice(every)
        fields = target.ListFields()
        if not fields:
            continue
        descriptor, value = r.choice(fields)
        if hasattr(value, "append") or hasattr(value, "add"):
            _damage_repeated(descriptor, value, r)
        elif descriptor.type == descriptor.TYPE_MESSAGE or r.random() < 0.3:
            target.ClearField(descriptor.name)
        elif descriptor.type == descriptor.TYPE_STRING:
            setattr(target, descriptor.name, r.choice((*ODD_STRINGS, value[:-1])))
        elif descriptor.type == descriptor.TYPE_BYTES:
            setattr(target, descriptor.name, damage_bytes(value[:65536], r))
        elif isinstance(value, (int, float)):
            with suppress(ValueError):  # of an enumeration that has no such number
                setattr(target, descriptor.name, type(value)(r.choice(ODD_NUMBERS)))


def _damage_repeated(descriptor: Any, value: Any, r: random.Random) -> None:
    at = r.randrange(len(value))
    match r.randrange(3):
        case 0:
            del value[at]
        case 1 if descriptor.type == descriptor.TYPE_MESSAGE:
            value.add().CopyFrom(value[at])
        case 1:
            value.append(value[at])
        case _ if descriptor.type == descriptor.TYPE_STRING:
            value[at] = r.choice((*ODD_STRINGS, value[r.randrange(len(value))]))
        case _ if descriptor.type in (descriptor.TYPE_INT64, descriptor.TYPE_INT32):
            value[at] = r.choice((*ODD_NUMBERS, value[at] + 1))


# ---- what a parser may do -----------------------------------------------------------------------

_watched: list[tuple[str, str]] | None = None  # (event, path) while a parser is watched
_EVENTS = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
           "subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class"}


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event in _EVENTS:
        path = arguments[0] if arguments else ""
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        _watched.append((f"{event} to write" if writes else event, os.fsdecode(path)
                         if isinstance(path, (str, bytes, os.PathLike)) else str(path)))


_installed: list[bool] = []


@contextmanager
def watched(directory: Path) -> Iterator[None]:
    """Fails if the code inside opens a file that is not below the directory, or opens to write,
    or does anything else to files, processes or the network. Modules may be imported."""
    global _watched
    if not _installed:  # audit hooks cannot be taken back
        sys.addaudithook(_watch)
        _installed.append(True)
    _watched = []
    try:
        yield
        found = _watched
    finally:
        _watched = None
    root = os.path.realpath(directory) + os.sep
    for event, path in found:
        module = path.endswith((".py", ".pyc", ".so")) or ".pyc." in path
        assert (event == "open" and os.path.realpath(path).startswith(root)) or module, (
            event, path)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Makes an allocation of more than MEMORY a MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def check_parser(parse: Callable[[], object], directory: Path, what: str) -> bool:
    """Whether the damaged file was accepted. AssertionError: anything but an LlmcError of one line
    came out, or it took too long, or files outside were touched."""
    started = time.monotonic()
    try:
        with limited_memory(), watched(directory):
            parse()
        accepted = True
    except LlmcError as error:
        assert str(error) and "\n" not in str(error), f"{what}: {str(error)!r}"
        accepted = False
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - started < SECONDS, f"{what} took too long"
    return accepted


def fuzz(one: Callable[[random.Random], bool], seconds: float, first_seed: int = 0) -> None:
    """Runs one(seeded random) with seed after seed for that long; some, not all, are accepted."""
    until, seed = time.monotonic() + seconds, first_seed
    refused = accepted = 0
    while time.monotonic() < until:
        try:
            good = one(random.Random(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        accepted, refused, seed = accepted + good, refused + (not good), seed + 1
    print(f"{accepted} accepted, {refused} refused")
    assert refused > 0
