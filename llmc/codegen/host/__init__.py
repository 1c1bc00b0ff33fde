"""Host code: program -> LLVM module -> object bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir

from llmc import knobs
from llmc.codegen.host.beside import LEAST, object_beside
from llmc.codegen.host.driver import Driver
from llmc.codegen.host.kernel import Kernel
from llmc.codegen.llvm import emit_object
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
    return Code(*_object_here(text, target), scratch_bytes, target)


def generate_all(programs: Mapping[str, Program], target: Target,
                 done: Callable[[], None]) -> dict[str, Code]:
    """`generate` of each; all but the last in processes of their own, where they are large and
    there are cores for it. done: called when one is ready to be waited for."""
    made: dict[str, tuple[Future[tuple[bytes, str]], Dim]] = {}
    with ThreadPoolExecutor(len(programs)) as pool:
        for left, (name, program) in zip(range(len(programs) - 1, -1, -1), programs.items(),
                                         strict=True):
            text, scratch_bytes = _module(program, target)
            beside = left and len(text) >= LEAST and knobs.cores() > 1
            made[name] = pool.submit(
                object_beside if beside else _object_here, text, target), scratch_bytes
            if not beside:
                made[name][0].result()
            done()
        return {name: Code(*future.result(), scratch_bytes, target)
                for name, (future, scratch_bytes) in made.items()}


def _object_here(text: str, target: Target) -> tuple[bytes, str]:
    return emit_object(text, target.machine())


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
