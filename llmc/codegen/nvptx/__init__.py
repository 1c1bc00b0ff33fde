"""GPU code: program -> LLVM module -> PTX -> cubin, for each architecture of a target.

Each stage is a kernel `void stage_N(arguments*, i64 layer)`; arguments are the host ABI's, in
device memory. A step is a list of launches in order, which the runtime captures into one graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir

from llmc.codegen.beside import compile_all
from llmc.codegen.llvm import I64, POINTER, VOID, uncollected
from llmc.codegen.nvptx import choose
from llmc.codegen.nvptx.assemble import Assembled, assemble
from llmc.codegen.nvptx.attention_instructions import shared_memory
from llmc.codegen.nvptx.kernel import GLOBAL, DeviceEmitter, DeviceFrame, Kernel
from llmc.codegen.nvptx.overlap import await_earlier, may_overlap, release_next
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, format_dim
from llmc.ir.program import Loop, Program, Stage, unsupported

# Stage kind -> module and name of what is called with (stage, program, target).
KERNELS = {
    "map": ("rows", "MapKernel"),
    "reduce": ("rows", "ReduceKernel"),
    "matmul": ("matmul", "matmul"),
    "dense_matmul": ("single", "DenseMatmulKernel"),
    "attention": ("attention", "attention"),
    "argmax": ("extreme", "extreme"),
    "argmin": ("extreme", "extreme"),
    "cumsum": ("single", "AlongAxisKernel"),
    "top_k": ("top_k", "top_k"),
    "scatter": ("single", "ScatterKernel"),
    "scan": ("scan", "scan"),
    "group_rows": ("grouped", "GroupRowsKernel"),
    "grouped_matmul": ("grouped", "grouped_matmul"),
}


@dataclass(frozen=True)
class Launch:
    """blocks: a dim in text form over the program's symbols; threads of a block; bytes of dynamic
    shared memory."""

    kernel: str
    blocks: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Repeat:
    """Launches that run `count` times, with the number of the turn as their layer."""

    count: int
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class DeviceCode:
    """What an artifact stores of a program for GPUs.

    assembled and steps: by architecture (another one may choose other kernels); llvm: the optimised
    module's text for the last of them. Scratch is a host matter.
    """

    target: Target
    assembled: dict[str, Assembled]
    steps: dict[str, tuple[Repeat, ...]]
    llvm: str
    scratch_bytes: Dim = 0

    @property
    def object(self) -> bytes:
        """The last architecture's cubin, or PTX where none was made."""
        last = list(self.assembled.values())[-1]
        return last.cubin or last.ptx.encode()

    def files(self) -> dict[str, bytes]:
        """File name extension -> contents."""
        files = {}
        for name, assembled in self.assembled.items():
            files[f"{name}.ptx"] = assembled.ptx.encode()
            if assembled.cubin is not None:
                files[f"{name}.cubin"] = assembled.cubin
            files[f"{name}.json"] = json.dumps({
                "overlaps": may_overlap(name), "choosers": self._choosers(name),
                "steps": [asdict(step) for step in self.steps[name]],
                "report": [asdict(kernel) for kernel in assembled.report]}, indent=1).encode()
        return files

    def _choosers(self, architecture: str) -> dict[str, dict] | None:
        """Launches of the kernels of choose.py, where the code has them."""
        if choose.ADVANCE not in self.assembled[architecture].ptx:
            return None
        return {"advance": asdict(Launch(choose.ADVANCE, "1", choose.ADVANCE_THREADS, 0)),
                "sample": asdict(Launch(choose.SAMPLE, "sequences", choose.SAMPLE_THREADS,
                                        choose.SAMPLE_SHARED_BYTES))}

    def asm(self) -> str:
        """PTX for the last architecture, with its report as comments."""
        last = list(self.assembled.values())[-1]
        return "".join(f"// {kernel}\n" for kernel in last.report) + last.ptx


def generate(program: Program, target: Target) -> DeviceCode:
    """Code of a program for each architecture; CompileError where no kernel computes a stage."""
    made, steps = [], {}
    for single in target.architectures():
        module, steps[single.cpu] = emit_module(program, single)
        made.append(compile_module(str(module), single))
    return _device_code(target, made, steps)


def generate_all(programs: Mapping[str, Program], target: Target,
                 done: Callable[[], None]) -> dict[str, DeviceCode]:
    """`generate` of each, side by side. done: called when one is ready to be waited for."""
    singles = target.architectures()
    steps: dict[str, dict[str, tuple[Repeat, ...]]] = {name: {} for name in programs}

    def modules() -> Iterator[tuple[str, Target]]:
        for name, program in programs.items():
            for single in singles:
                module, steps[name][single.cpu] = emit_module(program, single)
                yield str(module), single
            done()

    made = iter(compile_all(modules(), len(programs) * len(singles)))
    return {name: _device_code(target, [next(made) for _ in singles], steps[name])
            for name in programs}


def compile_module(text: str, target: Target, threads: int = 1) -> tuple[Assembled, str]:
    """A module's text assembled for one architecture, and the optimised module's text. threads: of
    the assembler."""
    _set_options()
    machine = target.machine()
    module = llvm.parse_assembly(text)
    module.verify()
    _optimise(module, machine)
    return assemble(machine.emit_assembly(module), target.cpu, threads), str(module)


def _device_code(target: Target, made: Sequence[tuple[Assembled, str]],
                 steps: dict[str, tuple[Repeat, ...]]) -> DeviceCode:
    """made: what `compile_module` gives, in the order of steps."""
    assembled = {name: each for name, (each, _) in zip(steps, made, strict=True)}
    return DeviceCode(target, assembled, steps, made[-1][1])


@uncollected()
def emit_module(program: Program, target: Target) -> tuple[ir.Module, tuple[Repeat, ...]]:
    """Every stage's kernel, and the launches of a step. target: of one architecture."""
    module = ir.Module(program.name)
    module.triple = target.triple
    module.data_layout = str(target.machine().target_data)
    launches = {}
    for number, stage in enumerate(program.stages()):
        kernel = make_kernel(stage, program, target)
        name = f"stage_{number}_{_identifier(stage.name)}"
        # A stage may be several launches, in order (see attention_flash.py).
        parts = list(getattr(kernel, "launches", [kernel]))
        names = [name, *(f"{name}_part_{part}" for part in range(1, len(parts)))]
        for part_name, part in zip(names, parts, strict=True):
            define_kernel(module, part_name, program, part, target, stage.kind != "attention")
        launches[id(stage)] = [
            Launch(part_name, format_dim(part.blocks()), part.threads, part.shared_bytes)
            for part_name, part in zip(names, parts, strict=True)]
    steps = tuple(
        Repeat(step.count, tuple(launch for stage in step.stages for launch in launches[id(stage)]))
        if isinstance(step, Loop) else Repeat(1, tuple(launches[id(step)]))
        for step in program.steps)
    if {"logits", "greedy"} <= {buffer.name for buffer in program.with_role("output")}:
        define_choosers(module)
    return module, steps


def make_kernel(stage: Stage, program: Program, target: Target) -> Kernel:
    """The kernel of a stage, by its kind."""
    if stage.kind not in KERNELS:
        raise unsupported(stage, "there is no GPU kernel of this kind")
    module, name = KERNELS[stage.kind]
    make: Callable[..., Any] = getattr(import_module(f"llmc.codegen.nvptx.{module}"), name)
    return make(stage, program, target)


def define_kernel(module: ir.Module, name: str, program: Program, kernel: Kernel,
                  target: Target, releases: bool) -> None:
    """A kernel function. Its entry block is the frame's; the code begins in a block of its own.

    releases: the next kernel may start early. Not beside attention: it waits for memory, and loads
    of weights would stand before its own (measured: 5 us a layer of a 1B model).
    """
    attributes = {"nvvm.reqntid": kernel.threads, **getattr(kernel, "attributes", {})}
    e, arguments, layer = _begin_kernel(module, name, attributes)
    frame = DeviceFrame(program, e, arguments, layer)
    if may_overlap(target.cpu):
        if releases:
            release_next(e)
        if not getattr(kernel, "awaits_earlier", False):  # else it does so itself
            await_earlier(e)
    kernel.emit(e, frame)
    e.b.ret_void()


def define_choosers(module: ir.Module) -> None:
    """The kernels behind a decode step's last stage: see choose.py."""
    e, arguments, _ = _begin_kernel(module, choose.ADVANCE,
                                    {"nvvm.reqntid": choose.ADVANCE_THREADS})
    choose.emit_advance(e, arguments)
    e.b.ret_void()
    e, arguments, _ = _begin_kernel(module, choose.SAMPLE, {"nvvm.reqntid": choose.SAMPLE_THREADS})
    choose.emit_sample(e, arguments, e.b.addrspacecast(shared_memory(e), POINTER))
    e.b.ret_void()


def _begin_kernel(module: ir.Module, name: str, attributes: dict[str, int]
                  ) -> tuple[DeviceEmitter, ir.Value, ir.Value]:
    """A kernel function, at the block where its code begins: (emitter, arguments, layer)."""
    function = ir.Function(module, ir.FunctionType(VOID, [GLOBAL, I64]), name)
    function.calling_convention = "ptx_kernel"
    for key, value in attributes.items():
        # llvmlite knows no string attributes, and prints what it is given.
        set.add(function.attributes, f'"{key}"="{value}"')
    entry = DeviceEmitter(ir.IRBuilder(function.append_basic_block("entry")))
    arguments = entry.b.addrspacecast(function.args[0], POINTER)
    body = function.append_basic_block("body")
    entry.b.branch(body)
    return DeviceEmitter(ir.IRBuilder(body)), arguments, function.args[1]


@cache
def _set_options() -> None:
    """f32 divisions within 2 ulp: exact ones call a function, next to which wgmma is serialised."""
    llvm.set_option("llmc", "--nvptx-prec-divf32=1")


def _optimise(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = False
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)


def _identifier(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
