"""Object code on this machine: loading through ORC, and the thread team.

Only LLVM's linker and loader are used here, never its code generator.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm

from llmc.errors import DeviceError

EXPORTS = ("llmc_step", "llmc_team_create", "llmc_team_destroy", "llmc_team_run", "llmc_barrier")
_numbers = itertools.count()
_process = os.getpid()


def _note_process() -> None:
    global _process
    _process = os.getpid()


if hasattr(os, "register_at_fork"):  # asking at every step costs a system call
    os.register_at_fork(after_in_child=_note_process)


@cache
def _linker() -> llvm.orcjit.LLJIT:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    # JITLink lays an object out as one block. RuntimeDyld may put its sections further apart than a
    # 32-bit offset reaches when the process's address space is crowded, and then aborts.
    return llvm.create_lljit_compiler(machine, use_jit_link=True, suppress_errors=False)


class Library:
    """Loaded object code; the code is freed with the object (functions keep it alive)."""

    def __init__(self, tracker: Any):
        self._tracker = tracker

    def address(self, name: str) -> int:
        """Address of an exported symbol; DeviceError if the code does not have it."""
        try:
            return int(self._tracker[name])
        except (KeyError, RuntimeError):
            raise DeviceError(f"the object code does not export {name}") from None

    def function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        """An exported function with its ctypes signature; calls release the GIL."""
        function = ctypes.CFUNCTYPE(result, *arguments)(self.address(name))

        def call(*values: Any) -> Any:
            return function(*values)

        call.library = self  # type: ignore[attr-defined]
        return call


def load_object(code: bytes, exports: tuple[str, ...] = EXPORTS) -> Library:
    """Link object bytes into this process. DeviceError if they are no object code for this machine
    or need a symbol that the process does not have."""
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for name in exports:
        builder.export_symbol(name)
    try:
        return Library(builder.link(_linker(), f"llmc{next(_numbers)}"))
    except RuntimeError as error:
        raise DeviceError(f"object code cannot be loaded: {error}") from None


class Team:
    """Threads that run steps. Freed by `close`; one caller at a time."""

    def __init__(self, library: Library, workers: int):
        self._workers = workers
        self._create = library.function("llmc_team_create", ctypes.c_void_p, ctypes.c_int64)
        self._destroy = library.function("llmc_team_destroy", None, ctypes.c_void_p)
        self._handle: int | None = None
        self._process = 0

    @property
    def handle(self) -> int | None:
        """The pointer that a step takes; None with one worker.

        Threads do not survive a fork: a child process gets a team of its own.
        """
        if self._process != _process and self._workers > 1:
            self._handle = self._create(self._workers)
            self._process = _process
            if not self._handle:
                raise DeviceError(f"no memory for a team of {self._workers} threads")
        return self._handle

    def close(self) -> None:
        """Stop and join the threads, those of this process."""
        handle, self._handle = self._handle, None
        if handle and self._process == _process:
            self._process = 0
            self._destroy(handle)

    def __del__(self) -> None:
        self.close()
