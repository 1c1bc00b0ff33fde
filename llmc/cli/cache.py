"""llmc cache: look at and clear what was compiled before."""

from __future__ import annotations

import time

from llmc.cli import add_command


def add(subparsers) -> None:
    parser = add_command(subparsers, "cache", run, "List or clear the cache of compiled models.",
                         "llmc cache clear")
    parser.add_argument("action", nargs="?", choices=("ls", "clear"), default="ls")


def run(arguments) -> int:
    from llmc import knobs
    from llmc.runtime.cache import Cache

    cache = Cache(knobs.cache_directory())
    if arguments.action == "clear":
        print(f"freed {cache.clear() / 1e6:.1f} MB of {cache.directory}")
        return 0
    for entry in cache.entries():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.bytes / 1e6:10.1f} MB  {used}  {entry.name:20} {entry.path.name}")
    return 0
