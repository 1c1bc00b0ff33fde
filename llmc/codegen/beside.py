"""Modules compiled side by side, in processes of their own: LLVM does one thing at a time in each.

Also the program that such a process runs: a line with the target's text, then the module's, on
stdin; what was made of them, pickled, on stdout.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from llmc import knobs
from llmc.codegen.target import Target
from llmc.processes import python

LEAST = 1 << 20  # characters of a module: a smaller one is compiled before a process has started


def compile_text(text: str, target: Target) -> Any:
    """A module's text compiled for the one machine of a target, with all cores that this process
    may use. For a host: the object and the optimised module's text; for a GPU: an `Assembled` and
    that text."""
    if target.kind == "nvptx":
        from llmc.codegen.nvptx import compile_module

        return compile_module(text, target, knobs.cores())
    from llmc.codegen.llvm import emit_object

    return emit_object(text, target.machine())


def start() -> subprocess.Popen | None:
    """A process that waits for a module; None where none can be started."""
    try:
        return subprocess.Popen(python("llmc.codegen.beside"), stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError:
        return None


@contextmanager
def pool(threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that are waited for at the end, but not by who is interrupted: LLVM cannot be."""
    executor, wait = ThreadPoolExecutor(threads), True
    try:
        yield executor
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        executor.shutdown(wait, cancel_futures=not wait)


def compile_beside(text: str, target: Target, process: subprocess.Popen | None) -> Any:
    """`compile_text` by a process of `start`; by this one where there is none or it dies."""
    if process is not None:
        reply, _ = process.communicate(f"{target.text()}\n{text}".encode())
        if process.returncode == 0:
            return pickle.loads(reply)
    return compile_text(text, target)


def compile_all(modules: Iterable[tuple[str, Target]], count: int) -> list[Any]:
    """`compile_text` of `count` modules: all large ones but the last in processes of their own,
    where there are cores for it. The next module is asked for when this one is ready to be waited
    for; its process starts while its text is made."""
    results: list[Future[Any]] = []
    last = count - 1
    spare = start() if last > 0 and knobs.cores() > 1 else None  # has got no module yet
    try:
        with pool() as threads:
            for number, (text, target) in enumerate(modules):
                if spare is not None and number < last and len(text) >= LEAST:
                    process, spare = spare, None
                    results.append(threads.submit(compile_beside, text, target, process))
                    spare = start() if number + 1 < last else None
                else:
                    results.append(threads.submit(compile_text, text, target))
                    results[-1].result()
        return [each.result() for each in results]
    finally:
        if spare is not None:
            spare.kill()
            spare.communicate()


def main() -> None:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # interrupted in LLVM, too
    import llmc.codegen.llvm  # noqa: F401  while there is nothing else to do yet

    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get into the reply
    target, _, text = sys.stdin.buffer.read().decode().partition("\n")
    with replies:
        pickle.dump(compile_text(text, Target.parse(target)), replies)
