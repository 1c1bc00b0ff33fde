"""Modules compiled side by side, in processes of their own: LLVM does one thing at a time in each.

Also the program that such a process runs: a line with the target's text, then the module's, on
stdin; what was made of them, pickled, on stdout.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmc import knobs
from llmc.codegen.target import Target

LEAST = 1 << 20  # characters of a module: a smaller one is compiled before a process has started
ROOT = Path(__file__).parents[2]


def compile_text(text: str, target: Target) -> Any:
    """A module's text compiled for the one machine of a target, with all cores that this process
    may use. For a host: the object and the optimised module's text; for a GPU: an `Assembled` and
    that text."""
    if target.kind == "nvptx":
        from llmc.codegen.nvptx import compile_module

        return compile_module(text, target, knobs.cores())
    from llmc.codegen.llvm import emit_object

    return emit_object(text, target.machine())


def compile_beside(text: str, target: Target) -> Any:
    """`compile_text` by another process; by this one should that die."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            (sys.executable, "-m", "llmc.codegen.beside"), check=True, capture_output=True,
            input=f"{target.text()}\n{text}".encode(), env=os.environ | {"PYTHONPATH": path})
    except (OSError, subprocess.CalledProcessError):
        return compile_text(text, target)
    return pickle.loads(done.stdout)


def compile_all(modules: Iterable[tuple[str, Target, bool]]) -> list[Any]:
    """`compile_text` of (text, target, whether it is the last): all large ones but the last in
    processes of their own, where there are cores for it. The next module is asked for when this one
    is ready to be waited for."""
    results: list[Future[Any]] = []
    with ThreadPoolExecutor() as pool:
        for text, target, last in modules:
            beside = not last and len(text) >= LEAST and knobs.cores() > 1
            results.append(pool.submit(compile_beside if beside else compile_text, text, target))
            if not beside:
                results[-1].result()
        return [each.result() for each in results]


def main() -> None:
    """Entry of the process."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get into the reply
    target, _, text = sys.stdin.buffer.read().decode().partition("\n")
    with replies:
        pickle.dump(compile_text(text, Target.parse(target)), replies)


if __name__ == "__main__":
    main()
