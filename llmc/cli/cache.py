"""llmc cache: look at and clear what was compiled before."""

from __future__ import annotations

import time
from pathlib import Path

from llmc.cli import add_command


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "cache", run,
        "List or clear the cache: compiled models, variants of hot shapes, profiles.",
        "llmc cache clear")
    parser.add_argument("action", nargs="?", choices=("ls", "clear"), default="ls")


def run(arguments) -> int:
    from llmc import knobs
    from llmc.runtime.cache import Cache, VariantCache

    directory = knobs.cache_directory()
    caches = Cache(directory), VariantCache(directory)
    profiles = sorted((directory / "profiles").glob("*.json"))
    if arguments.action == "clear":
        freed = sum(cache.clear() for cache in caches)
        for path in profiles:
            path.unlink(missing_ok=True)
        print(f"freed {freed / 1e6:.1f} MB of {directory}")
        return 0
    for cache in caches:
        for entry in cache.entries():
            show(entry.bytes, entry.used, entry.name, entry.path)
    for path in profiles:
        status = path.stat()
        show(status.st_size, status.st_mtime, "(profile)", path)
    return 0


def show(size: int, used: float, name: str, path: Path) -> None:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
    print(f"{size / 1e6:10.1f} MB  {when}  {name:30} {path.parent.name}/{path.name}")
