"""Builds one matmul stage for a GPU, assembles it, and runs it where a GPU is there."""

from __future__ import annotations

import numpy as np

from llmc.codegen.nvptx import generate, make_kernel
from llmc.codegen.nvptx.matmul_rows import MATVEC_ROWS
from llmc.codegen.nvptx.matmul_tiles import FEW_ENDS, STEP
from llmc.codegen.target import Target
from llmc.ir.dims import evaluate, parse_dim, symbol, symbols
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph, TensorType
from llmc.ir.layouts import Columns, Rows, pack
from llmc.ir.ops import make
from llmc.ir.program import Buffer, Program, Stage
from llmc.runtime.cuda_device import Device, Memory, Module, call, launch, upload


def leaf(name, dtype_name, *shape):
    return make("input", name=name, type=TensorType(dtype(dtype_name), shape))


def rows_symbol(high=4096, low=None):
    """The symbol `rows`, by default of such a range as one kernel takes."""
    return symbol("rows", first_rows(high) if low is None else low, high)


def first_rows(high):
    """The least rows that the kernel for `high` rows takes (never 0)."""
    ends = (MATVEC_ROWS, *FEW_ENDS, *range(STEP, high, STEP))
    return max([1, *(end + 1 for end in ends if end < high)])


def product_body(dtype_name, k, n, rows, residual=False, gated=False, result=None):
    """(inputs, outputs) of a @ w, plain or with a residual, or silu(gate) * up."""
    a, w = leaf("a", dtype_name, rows, k), leaf("w", dtype_name, k, n)
    inputs, value = [a, w], make("matmul", a, w)
    if gated:
        gate, up = (make("slice", value, starts=(0, start), stops=(rows, start + n // 2),
                         steps=(1, 1)) for start in (0, n // 2))
        value = make("mul", make("silu", gate), up)
    if residual:
        other = leaf("r", dtype_name, rows, value.shape[-1])
        inputs.append(other)
        value = make("add", value, other)
    if result:
        value = make("cast", value, dtype=dtype(result))
    return inputs, {"result": value}


class MatmulStage:
    """A program of one matmul stage, for one architecture."""

    def __init__(self, inputs, outputs, architecture="sm_90a", rows=(1, 4096)):
        target = Target.parse(f"nvptx:{architecture}")
        buffers = {x["name"]: Buffer(x["name"], x.type, "input",
                                     Columns() if x["name"] == "w" else Rows()) for x in inputs}
        for name, value in outputs.items():
            buffers[name] = Buffer(name, value.type, "output")
        body = Graph("body", tuple(inputs), tuple(outputs.items()))
        stage = Stage("matmul", "matmul", body, tuple(x["name"] for x in inputs), tuple(outputs))
        self.program = Program("test", target.capabilities(), (("rows", *rows),), buffers, {},
                               (stage,), 0)
        self.kernel = make_kernel(stage, self.program, target)
        code = generate(self.program, target)
        assembled = code.assembled[architecture]
        self.ptx, self.cubin, self.warnings = assembled.ptx, assembled.cubin, assembled.warnings
        self.report = assembled.report[0] if assembled.report else None  # not by older nvJitLinks
        self.launches = code.steps[architecture][0].launches


class LoadedMatmul:
    """A stage on the device, for operands that already lie at `addresses`."""

    def __init__(self, device: Device, stage: MatmulStage, rows: int, addresses: dict[str, int]):
        self.device, self.launches = device, stage.launches
        module = Module(stage.cubin, "matmul")
        self.functions = [module.function(each.kernel, each.shared_bytes)
                          for each in stage.launches]
        known = {s.name: s for s in symbols(stage.program.buffers["a"].type.shape[0])}
        self.blocks = [evaluate(parse_dim(each.blocks, known), {"rows": rows})
                       for each in stage.launches]
        tables = [[rows], *([addresses[b.name] for b in stage.program.with_role(role)]
                            for role in ("input", "output"))]
        fields = [place(device, np.array(table, np.int64)) for table in tables]
        arguments = place(device, np.array([field.address for field in fields] + [0] * 6, np.int64))
        self.held = (module, fields, arguments)
        self.arguments = arguments.address

    def run(self) -> None:
        for each, function, blocks in zip(self.launches, self.functions, self.blocks, strict=True):
            if blocks:
                launch(self.device, function, blocks, each.threads, each.shared_bytes,
                       self.arguments, 0)


def place(device: Device, array: np.ndarray) -> Memory:
    """An array in new device memory."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    memory = Memory(device, data.size, "operands")
    upload(device, data, memory.address)
    return memory


def run_once(device: Device, stage: MatmulStage, rows: int, arrays: dict[str, np.ndarray]
             ) -> np.ndarray:
    """The stage's result; the result's buffer starts as NaN."""
    buffer = stage.program.buffers["result"]
    shape = tuple(evaluate(dim, {"rows": rows}) for dim in buffer.type.shape)
    out = np.full(shape, np.nan, np.float32).astype(buffer.type.dtype.numpy)
    held = {name: place(device, pack(array, Columns()) if name == "w" else array)
            for name, array in arrays.items()}
    held["result"] = place(device, out)
    loaded = LoadedMatmul(device, stage, rows,
                          {name: memory.address for name, memory in held.items()})
    loaded.run()
    device.wait()
    call("cuMemcpyDtoH", out.ctypes.data, held["result"].address, out.nbytes)
    for memory in held.values():
        memory.close()
    return out
