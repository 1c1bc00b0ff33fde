"""Host code: program -> LLVM module -> object bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir

from llmc.codegen.beside import compile_all
from llmc.codegen.host.driver import Driver
from llmc.codegen.host.kernel import Kernel
from llmc.codegen.llvm import emit_object, uncollected
from llmc.codegen.target import Target
from llmc.ir.dims import Dim
from llmc.ir.program import Program, Stage, unsupported

# Stage kind -> module and name of what is called with (stage, program, target).
KERNELS = {
    "map": ("rows", "map_kernel"),
    "reduce": ("rows", "ReduceKernel"),
    "matmul": ("matmul", "matmul"),
    "coded_rows": ("coded_rows", "CodedRowsKernel"),
    "dense_matmul": ("dense_matmul", "DenseMatmulKernel"),
    "attention": ("attention", "AttentionKernel"),
    "argmax": ("single", "AlongAxisKernel"),
    "argmin": ("single", "AlongAxisKernel"),
    "cumsum": ("single", "AlongAxisKernel"),
    "top_k": ("single", "AlongAxisKernel"),
    "scatter": ("single", "ScatterKernel"),
    "grouped_matmul": ("grouped", "GroupedMatmul"),
    "group_rows": ("grouped", "GroupRows"),
    "scan": ("scan", "scan"),
}


@dataclass(frozen=True)
class Code:
    """What an artifact stores of a program.

    object: ELF object that exports `llmc_step` and the team's functions; llvm: the optimised
    module's text; scratch_bytes: scratch that each worker needs.
    """

    object: bytes
    llvm: str
    scratch_bytes: Dim
    target: Target

    def files(self) -> dict[str, bytes]:
        """File name extension -> contents."""
        return {"o": self.object}

    def asm(self) -> str:
        """Assembly of the same code."""
        return self.target.machine().emit_assembly(llvm.parse_assembly(self.llvm))


def generate(program: Program, target: Target) -> Code:
    """Machine code of a program; CompileError where no kernel can compute a stage."""
    text, scratch_bytes = _module(program, target)
    return Code(*emit_object(text, target.machine()), scratch_bytes, target)


def generate_all(programs: Mapping[str, Program], target: Target,
                 done: Callable[[], None]) -> dict[str, Code]:
    """`generate` of each, side by side. done: called when one is ready to be waited for."""
    scratch_bytes: dict[str, Dim] = {}

    def modules() -> Iterator[tuple[str, Target]]:
        for name, program in programs.items():
            text, scratch_bytes[name] = _module(program, target)
            yield text, target
            done()

    made = compile_all(modules(), len(programs))
    return {name: Code(object, llvm, scratch_bytes[name], target)
            for name, (object, llvm) in zip(programs, made, strict=True)}


@uncollected()
def _module(program: Program, target: Target) -> tuple[str, Dim]:
    """The text of a program's module, and `Code.scratch_bytes`."""
    module = ir.Module(program.name)
    module.triple = target.triple
    module.data_layout = str(target.machine().target_data)
    kernels = {number: make_kernel(stage, program, target)
               for number, stage in enumerate(program.stages())}
    driver = Driver(module, program, kernels)
    driver.emit()
    return str(module), driver.scratch_bytes


def make_kernel(stage: Stage, program: Program, target: Target) -> Kernel:
    """The kernel of a stage, by its kind."""
    if stage.kind not in KERNELS:
        raise unsupported(stage, "there is no host kernel of this kind")
    module, name = KERNELS[stage.kind]
    make: Callable[..., Any] = getattr(import_module(f"llmc.codegen.host.{module}"), name)
    return make(stage, program, target)
