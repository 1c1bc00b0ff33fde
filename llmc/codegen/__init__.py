"""Code generation: a program and a target in, object code out; no device and no runtime inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.errors import CompileError
from llmc.ir.program import Program

if TYPE_CHECKING:
    from llmc.codegen.host import Code
    from llmc.codegen.target import Target


def generate(program: Program, target: Target) -> Code:
    """Machine code of a program; a pure function of its arguments. CompileError where no kernel
    can compute a stage."""
    if target.kind != "host":
        raise CompileError(f"no code generator for {target.kind} targets yet")
    from llmc.codegen.host import generate as generate_host

    return generate_host(program, target)
