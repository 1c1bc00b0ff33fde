"""PTX to machine code by nvJitLink, a wheel that needs no GPU; and what it says of each kernel.

Without the wheel there is no cubin and no report: the driver assembles when the code is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmc.errors import CompileError

_FUNCTION = re.compile(r"Function properties for (\S+)\n.*?(\d+) bytes stack frame, "
                       r"(\d+) bytes spill stores, (\d+) bytes spill loads"
                       r"(?:\n[^\n]*Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?)?")
_KERNEL = re.compile(r"Compiling entry function '([^']+)'")
# What says that the code is not what was asked for: serialised wgmma, ignored setmaxnreg, calls.
_WARNING = re.compile(r"C7[56]\d\d[^\n]*")


@dataclass(frozen=True)
class KernelReport:
    """What the assembler says of a kernel; bytes of stack and of spilled registers, for a thread,
    and of static shared memory, for a block."""

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int

    def __str__(self) -> str:
        return (f"{self.name}: {self.registers} registers, {self.shared_bytes} bytes shared, "
                f"{self.stack_bytes} bytes stack, {self.spill_bytes} bytes spilled")


@dataclass(frozen=True)
class Assembled:
    """Code for one architecture. cubin: None where nvJitLink is missing; warnings: messages that
    make a kernel slow or wrong."""

    ptx: str
    cubin: bytes | None
    report: tuple[KernelReport, ...] = ()
    warnings: tuple[str, ...] = ()


def assemble(ptx: str, architecture: str, threads: int = 1) -> Assembled:
    """Assemble PTX for an architecture such as sm_90a; CompileError where the assembler refuses.
    threads: kernels that are assembled at the same time, if the assembler knows how."""
    linker = _linker()
    if linker is None:
        return Assembled(ptx, None)
    splits = threads > 1 and _splits()
    cubin, log = _link(linker, ptx, architecture,
                       [f"-Xptxas=--split-compile={threads}"] if splits else [])
    return Assembled(ptx, cubin, parse_report(log), tuple(_WARNING.findall(log)))


def _link(linker: Any, ptx: str, architecture: str, options: Sequence[str]) -> tuple[bytes, str]:
    """The cubin and what was said of it."""
    # nvJitLink's own cache gives the code of a kernel that it knows without the report.
    options = [f"-arch={architecture}", "-verbose", "-O3", "-no-cache", *options]
    handle = linker.create(len(options), options)
    try:
        data = ptx.encode()
        try:
            linker.add_data(handle, linker.InputType.PTX, data, len(data), "program.ptx")
            linker.complete(handle)
        except linker.nvJitLinkError as error:
            log = _text(linker.get_error_log_size, linker.get_error_log, handle)
            raise CompileError(f"the assembler refuses the PTX for {architecture}: {error}; "
                               f"{' '.join(log.split())[:500]}") from None
        cubin = bytearray(linker.get_linked_cubin_size(handle))
        linker.get_linked_cubin(handle, cubin)
        return bytes(cubin), _text(linker.get_info_log_size, linker.get_info_log, handle)
    finally:
        linker.destroy(handle)


def parse_report(log: str) -> tuple[KernelReport, ...]:
    """The kernels of an assembler's verbose log, in order; and functions that kernels call, whose
    registers are counted there."""
    reports, kernels = [], set(_KERNEL.findall(log))
    for match in _FUNCTION.finditer(log):
        if match[5] is None and match[1] in kernels:
            raise CompileError(f"the assembler's report does not say what {match[1]} uses")
        reports.append(KernelReport(match[1], int(match[5] or 0), int(match[6] or 0), int(match[2]),
                                    int(match[3]) + int(match[4])))
    return tuple(reports)


@cache
def _splits() -> bool:
    """Whether the assembler has an option for several kernels at a time; older ones have not."""
    empty = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry empty() { ret; }\n"
    try:
        _link(_linker(), empty, "sm_80", ["-Xptxas=--split-compile=2"])
    except CompileError:
        return False
    return True


@cache
def _linker() -> Any:
    """cuda.bindings.nvjitlink, or None where it or its library is missing."""
    try:
        from cuda.bindings import nvjitlink

        nvjitlink.version()
    except (ImportError, RuntimeError):
        return None
    return nvjitlink


def is_available() -> bool:
    """Whether cubins can be made here."""
    return _linker() is not None


def _text(size: Any, read: Any, handle: Any) -> str:
    buffer = bytearray(size(handle))
    read(handle, buffer)
    return buffer.rstrip(b"\0").decode(errors="replace")
