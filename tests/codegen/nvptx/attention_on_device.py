"""Builds one attention stage for a GPU, assembles it, and runs it where a GPU is there."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from types import SimpleNamespace

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from llmc.codegen.llvm import POINTER, VOID, define, i64
from llmc.codegen.nvptx import _optimise, _set_options
from llmc.codegen.nvptx.attention_flash import FlashAttention
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.codegen.target import Target
from llmc.ir.dims import evaluate
from llmc.ir.graph import Graph
from llmc.ir.layouts import Rows
from llmc.ir.program import Buffer, Capabilities, Program, Stage


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel."""

    registers: int
    spills: int
    text: str


def make_stage(inputs, result, symbols, layouts):
    """(stage, program) of a body made by hand; symbols: name -> (low, high)."""
    buffers = {x["name"]: Buffer(x["name"], x.type, "input", layouts.get(x["name"], Rows()))
               for x in inputs}
    buffers["result"] = Buffer("result", result.type, "output")
    body = Graph("body", tuple(inputs), (("result", result),))
    stage = Stage("attention", "attention", body, tuple(x["name"] for x in inputs), ("result",))
    capabilities = Capabilities("nvptx", 4, 16, 1, 8, True, frozenset())
    key = tuple((name, low, high) for name, (low, high) in symbols.items())
    return stage, Program("test", capabilities, key, buffers, {}, (stage,), 0)


def make_ptx(kernel, program, target):
    """PTX of all launches of a kernel; entry i is launch_i(arguments)."""
    _set_options()
    module = ir.Module("attention")
    module.triple = target.triple
    module.data_layout = str(target.machine().target_data)
    for index, launch in enumerate(kernel.launches):
        function, e = define(module, f"launch_{index}", VOID, [POINTER], internal=False)
        function.calling_convention = "ptx_kernel"
        device = DeviceEmitter(e.b)
        start = function.append_basic_block("start")
        e.b.branch(start)
        e.b.position_at_end(start)
        launch.emit(device, DeviceFrame(program, device, function.args[0], i64(0)))
        e.b.ret_void()
    text = str(module)
    for index, launch in enumerate(kernel.launches):
        named = {"nvvm.reqntid": launch.threads, **getattr(launch, "attributes", {})}
        attribute = " ".join(f'"{key}"="{value}"' for key, value in named.items())
        text = re.sub(rf'(@"?launch_{index}"?\(.*\))', rf"\1 {attribute}", text, count=1)
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    machine = target.machine()
    _optimise(parsed, machine)
    return machine.emit_assembly(parsed)


def assemble(ptx: str, architecture: str):
    """(cubin, {kernel: Report}); the log must not hold warnings of ptxas."""
    from cuda.bindings import nvjitlink

    handle = nvjitlink.create(3, [f"-arch={architecture}", "-verbose", "-O3"])
    data = ptx.encode()
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "attention")
        nvjitlink.complete(handle)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise RuntimeError(log.decode()) from error
    cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
    nvjitlink.get_linked_cubin(handle, cubin)
    log = bytearray(nvjitlink.get_info_log_size(handle))
    nvjitlink.get_info_log(handle, log)
    nvjitlink.destroy(handle)
    return bytes(cubin), reports(log.decode())


def reports(log: str) -> dict[str, Report]:
    found = {}
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = part.split("'")[1]
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill", part))
        stack = re.search(r"(\d+) bytes stack frame", part)
        found[name] = Report(registers, spills + int(stack[1] if stack else 0), part)
    return found


class DeviceStage:
    """One attention stage for one architecture. make: what makes its kernels, `attention` as the
    compiler does."""

    def __init__(self, inputs, result, symbols=None, layouts=None, architecture="sm_90a",
                 make=FlashAttention):
        self.symbols = symbols or {}
        self.result = result
        self.target = Target.parse(f"nvptx:{architecture}")
        stage, self.program = make_stage(inputs, result, self.symbols, layouts or {})
        kernel = make(stage, self.program, self.target)
        self.kernel = kernel if hasattr(kernel, "launches") else SimpleNamespace(
            launches=[kernel])
        self.ptx = make_ptx(self.kernel, self.program, self.target)
        self.cubin, self.reports = assemble(self.ptx, architecture)

    def launches(self, dims):
        """(blocks, threads, shared bytes) of each launch at a shape."""
        return [(evaluate(launch.blocks(), dims), launch.threads, launch.shared_bytes)
                for launch in self.kernel.launches]


def _check(result):
    status, *values = result
    if int(status):
        from cuda.bindings import driver

        raise RuntimeError(driver.cuGetErrorName(status)[1].decode())
    return values[0] if len(values) == 1 else values


class Device:
    """The first GPU, through the driver's own interface."""

    def __init__(self):
        from cuda.bindings import driver

        self.driver = driver
        _check(driver.cuInit(0))
        device = _check(driver.cuDeviceGet(0))
        _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(device))))

    def upload(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        pointer = int(_check(self.driver.cuMemAlloc(max(array.nbytes, 16))))
        _check(self.driver.cuMemcpyHtoD(pointer, array.ctypes.data, array.nbytes))
        return pointer

    def download(self, pointer: int, shape, dtype) -> np.ndarray:
        out = np.empty(shape, dtype)
        _check(self.driver.cuMemcpyDtoH(out.ctypes.data, pointer, out.nbytes))
        return out

    def free(self, *pointers: int) -> None:
        for pointer in pointers:
            _check(self.driver.cuMemFree(pointer))


class LoadedStage:
    """A stage on the device, for operands that already lie there."""

    def __init__(self, device: Device, stage: DeviceStage, dims: dict[str, int],
                 pointers: dict[str, int]):
        driver = device.driver
        self.driver = driver
        self.module = _check(driver.cuModuleLoadData(stage.cubin))
        program = stage.program
        symbols = np.array([dims[name] for name, _, _ in program.symbols] or [0], np.int64)
        tables = [np.array([pointers[b.name] for b in program.with_role(role)] or [0], np.uint64)
                  for role in ("input", "output")]
        scratch = 16
        poison = np.full(max(scratch, 16), 0xFF, np.uint8)
        self.held = [device.upload(x) for x in (symbols, *tables, poison)]
        fields = np.zeros(9, np.uint64)
        fields[:3] = self.held[:3]
        fields[6] = self.held[3]
        self.arguments = device.upload(fields)
        self.plan = []
        for index, (blocks, threads, shared) in enumerate(stage.launches(dims)):
            function = _check(driver.cuModuleGetFunction(self.module, f"launch_{index}".encode()))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(function, attribute, shared))
            if blocks:
                self.plan.append((function, blocks, threads, shared))
        self._pointer = ctypes.c_uint64(self.arguments)
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._pointer))

    def run(self, stream: int = 0) -> None:
        for function, blocks, threads, shared in self.plan:
            _check(self.driver.cuLaunchKernel(
                function, blocks, 1, 1, threads, 1, 1, shared, stream,
                ctypes.addressof(self._parameters), 0))

    def synchronize(self) -> None:
        _check(self.driver.cuCtxSynchronize())


def run_once(device: Device, stage: DeviceStage, arrays: dict[str, np.ndarray],
             dims: dict[str, int] | None = None) -> np.ndarray:
    """The stage's result for these arrays; the result buffer starts as NaN."""
    dims = dims or {}
    shape = tuple(evaluate(dim, dims) for dim in stage.result.shape)
    poison = np.full(shape, np.nan, np.float32).astype(stage.result.dtype.numpy)
    pointers = {name: device.upload(array) for name, array in arrays.items()}
    pointers["result"] = device.upload(poison)
    loaded = LoadedStage(device, stage, dims, pointers)
    loaded.run()
    loaded.synchronize()
    out = device.download(pointers["result"], shape, poison.dtype)
    device.free(*pointers.values(), *loaded.held, loaded.arguments)
    return out
