"""Compiles one matmul stage without a driver, for this CPU or any other, and runs it here."""

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from llmc.codegen.host.kernel import Worker
from llmc.codegen.host.matmul import matmul
from llmc.codegen.llvm import I64, POINTER, VOID, define, emit_object, i64, optimise
from llmc.codegen.target import Target
from llmc.ir.dims import evaluate, symbol
from llmc.ir.dtypes import dtype, from_numpy
from llmc.ir.graph import Graph, TensorType
from llmc.ir.layouts import Panels, RowBlocks, Rows, pack
from llmc.ir.ops import make
from llmc.ir.program import Buffer, Program, Stage


def _without_dot(target):
    """The CPU that runs this, without bf16 dot products: those take bf16 rows, and have tests of
    their own."""
    features = (f"-{name[1:]}" if name[1:] == "avx512bf16" else name for name in target.features)
    return Target(target.kind, target.triple, target.cpu, tuple(features))


HOST = _without_dot(Target.host())


def leaf(name, dtype_name, *shape):
    return make("input", name=name, type=TensorType(dtype(dtype_name), shape))


def make_stage(inputs, outputs, blocked=False, parts=1, target=HOST):
    """(stage, program) of a body; the input w is packed (scales and zeros as well, if there are
    any), and with `blocked` the input a too."""
    capabilities = target.capabilities()
    layouts = {}
    if blocked:
        a = next(x for x in inputs if x["name"] == "a")
        layouts["a"] = RowBlocks(capabilities.matmul_rows, capabilities.interleave(a.dtype))
    packed = next(x for x in inputs if x["name"] == "w")
    for name, interleave in (("w", capabilities.interleave(packed.dtype)), ("scales", 1),
                             ("zeros", 1)):
        layouts[name] = Panels(capabilities.panel_columns, interleave, parts)
    buffers = {x["name"]: Buffer(x["name"], x.type, "input", layouts.get(x["name"], Rows()))
               for x in inputs}
    for name, value in outputs.items():
        buffers[name] = Buffer(name, value.type, "output")
    body = Graph("body", tuple(inputs), tuple(outputs.items()))
    stage = Stage("matmul", "matmul", body, tuple(x["name"] for x in inputs), tuple(outputs))
    return stage, Program("test", capabilities, (), buffers, {}, (stage,), 0)


class Frame:
    """The symbol `rows` is an argument; buffers come from a table of pointers."""

    layer = None
    alignment = 1

    def __init__(self, program, e, table, rows):
        self.program, self.e, self.table, self.rows = program, e, table, rows
        self.slots = {name: slot for slot, name in enumerate(program.buffers)}

    def dim(self, dim):
        return i64(dim) if isinstance(dim, int) else self.rows

    def pointer(self, buffer):
        return self.e.load(self.e.offset(self.table, self.slots[buffer.name], POINTER), POINTER)


def module_text(stage, program, target):
    """(text of `void run(table, scratch, rows, worker, workers)`, the kernel)."""
    module = ir.Module("matmul")
    module.triple = target.triple
    _, e = define(module, "run", VOID, [POINTER, POINTER, I64, I64, I64], internal=False)
    table, scratch, rows, index, count = e.b.function.args
    kernel = matmul(stage, program, target)
    frame = Frame(program, e, table, rows)
    worker = Worker(index, count, scratch)
    tiles = kernel.tiles(e, frame)
    kernel.setup(e, frame, worker)
    first = e.b.udiv(e.b.mul(tiles, index), count)
    last = e.b.udiv(e.b.mul(tiles, e.b.add(index, i64(1))), count)
    with e.loop(first, last) as tile:
        kernel.tile(e, frame, worker, tile)
    e.b.ret_void()
    return str(module), kernel


def assembly(stage, program, target):
    """Assembly of the stage on any target."""
    machine = target.machine()
    module = llvm.parse_assembly(module_text(stage, program, target)[0])
    optimise(module, machine)
    return machine.emit_assembly(module)


def aligned(size):
    """`size` bytes of 0xFF (NaN), at a multiple of 64."""
    raw = np.full(size + 64, 0xFF, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size]


class Runner:
    """call(rows, **arrays) -> outputs; weights and row blocks are packed on the way in."""

    def __init__(self, stage, program):
        self.stage, self.program = stage, program
        machine = HOST.machine()
        text, kernel = module_text(stage, program, HOST)
        self.code, _ = emit_object(text, machine)
        self.scratch_bytes = kernel.scratch_bytes
        jit = llvm.create_lljit_compiler(machine)
        builder = llvm.JITLibraryBuilder().add_object_img(self.code).add_current_process()
        self.library = builder.export_symbol("run").link(jit, "matmul")
        signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3)
        self.function = signature(self.library["run"])

    def __call__(self, rows, workers=3, **arrays):
        held = self.prepare(rows, **arrays)
        self.run(held, rows, workers)
        return {name: self._read(held[name], self.program.buffers[name], rows)
                for name in self.stage.results}

    def prepare(self, rows, **arrays):
        """Buffer name -> packed bytes, with NaN behind and in what is not written."""
        held = {}
        for name, buffer in self.program.buffers.items():
            size = evaluate(buffer.bytes(), {"rows": rows})
            held[name] = aligned(size + 64)[:size]
            if name in arrays:
                _pack(arrays[name], buffer.layout, held[name])
        return held

    def run(self, held, rows, workers):
        table = (ctypes.c_void_p * len(held))(*[array.ctypes.data for array in held.values()])
        scratch = [aligned(self.scratch_bytes + 64) for _ in range(workers)]
        for worker in range(workers):
            self.function(ctypes.addressof(table), scratch[worker].ctypes.data, rows, worker,
                          workers)

    def _read(self, data, buffer, rows):
        shape = [evaluate(dim, {"rows": rows}) for dim in buffer.type.shape]
        return data.view(buffer.type.dtype.numpy).reshape(shape)


def _pack(array, layout, out):
    typed = out if from_numpy(array.dtype).bits < 8 else out.view(array.dtype)
    if isinstance(layout, RowBlocks):  # rows and k of padding stay NaN
        flat = array.reshape(-1, array.shape[-1])
        typed[layout.address(flat.shape, np.indices(flat.shape, sparse=True))] = flat
    else:
        pack(array, layout, out=typed)


def rows_symbol(high=4096):
    return symbol("rows", 1, high)
