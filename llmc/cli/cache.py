"""llmc cache: look at and clear what was compiled before."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from llmc.cli import add_command

if TYPE_CHECKING:
    from llmc.runtime.cache import Entry

AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
HEADS = ("kind", "model", "target", "variant", "size", "used", "file")


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "cache", run,
        "List or clear the cache: compiled models, variants of hot shapes, profiles.",
        "llmc cache ls --json")
    parser.add_argument("action", nargs="?", choices=("ls", "clear"), default="ls")
    parser.add_argument("--json", action="store_true",
                        help="print JSON: all entries, or what was freed")


def run(arguments) -> int:
    from llmc import knobs
    from llmc.runtime.cache import Cache, VariantCache, profile_entries

    directory = knobs.cache_directory()
    caches = Cache(directory), VariantCache(directory)
    if arguments.action == "clear":
        freed = sum(cache.clear() for cache in caches)
        for entry in profile_entries(directory):
            entry.path.unlink(missing_ok=True)
        (directory / "sources.json").unlink(missing_ok=True)
        print(json.dumps({"freed_bytes": freed, "directory": str(directory)}) if arguments.json
              else f"freed {freed / 1e6:.1f} MB of {directory}")
        return 0
    entries = [*(entry for cache in caches for entry in cache.entries()),
               *profile_entries(directory)]
    if arguments.json:
        print(json.dumps([asdict(entry) | {"path": str(entry.path)} for entry in entries],
                         indent=1))
    elif entries:
        print(table(entries, time.time()))
    return 0


def table(entries: list[Entry], now: float) -> str:
    """One line for each, aligned."""
    rows = [HEADS, *(row(entry, now) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(
        cell.rjust(width) if head == "size" else cell.ljust(width)
        for head, cell, width in zip(HEADS, cells, widths, strict=True)).rstrip()
        for cells in rows)


def row(entry: Entry, now: float) -> tuple[str, ...]:
    file = f"{entry.path.parent.name}/{entry.path.name}"
    return (entry.kind, entry.model, entry.target, entry.variant, size(entry.bytes),
            f"{age(now - entry.used)} ago", file)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} KB"


def age(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, name in AGES:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
