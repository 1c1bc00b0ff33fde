"""Code generation: a program and a target in, object code out; no device and no runtime inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llmc.ir.program import Program

if TYPE_CHECKING:
    from llmc.codegen.host import Code
    from llmc.codegen.nvptx import DeviceCode
    from llmc.codegen.target import Target


def generate(program: Program, target: Target) -> Code | DeviceCode:
    """Machine code of a program; a pure function of its arguments. CompileError where no kernel
    can compute a stage."""
    if target.kind == "nvptx":
        from llmc.codegen.nvptx import generate as generate_device

        return generate_device(program, target)
    from llmc.codegen.host import generate as generate_host

    return generate_host(program, target)


def generate_all(programs: Mapping[str, Program], target: Target,
                 done: Callable[[], None]) -> dict[str, Code] | dict[str, DeviceCode]:
    """`generate` of each, several at a time where that pays. done: called after each."""
    if target.kind == "nvptx":
        from llmc.codegen.nvptx import generate_all as generate_all_device

        return generate_all_device(programs, target, done)
    from llmc.codegen.host import generate_all as generate_all_host

    return generate_all_host(programs, target, done)
