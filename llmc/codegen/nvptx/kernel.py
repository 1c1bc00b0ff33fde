"""What a stage's kernel is on the GPU, and what its code is given.

A stage becomes one kernel over a grid of thread blocks. Its grid is a dim of the program's symbols,
an upper bound for the shape that a launch is captured with: a block may find nothing to do. All it
needs it reads from the step's arguments in device memory, so that a captured launch can be replayed
for other values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import llvmlite.ir as ir

from llmc.codegen.host.frame import StageFrame
from llmc.codegen.llvm import (
    BF16,
    F32,
    F64,
    I16,
    I32,
    I64,
    POINTER,
    VOID,
    Emitter,
    i32,
    lanes_of,
    like,
)
from llmc.ir.dims import Dim
from llmc.ir.program import Program

WARP = 32
GLOBAL = ir.PointerType(addrspace=1)


class DeviceEmitter(Emitter):
    """An Emitter that knows threads, warps and shared memory.

    exact_division: f32 quotients of the model's own are correctly rounded, for what rounds them to
    integers (quantisation) sees the last bit. Not beside wgmma: it takes a function call.
    """

    exact_division = False

    def divide(self, a: ir.Value, b: ir.Value) -> ir.Value:
        if not self.exact_division or like(a, F32) != a.type:
            return self.b.fdiv(a, b)
        if lanes_of(a) == 1:
            return self.call("llvm.nvvm.div.rn.f", F32, a, b)
        result = ir.Constant(a.type, ir.Undefined)
        for lane in range(lanes_of(a)):
            quotient = self.divide(self.b.extract_element(a, i32(lane)),
                                   self.b.extract_element(b, i32(lane)))
            result = self.b.insert_element(result, quotient, i32(lane))
        return result

    def f32_to_bf16(self, value: ir.Value) -> ir.Value:
        """Round to nearest even, by the conversion instruction."""
        return self.b.bitcast(self.b.fptrunc(value, like(value, BF16)), like(value, I16))

    def special(self, name: str) -> ir.Value:
        """A special register, such as tid.x, as i64."""
        return self.b.zext(self.call(f"llvm.nvvm.read.ptx.sreg.{name}", I32), I64)

    @property
    def thread(self) -> ir.Value:
        """This thread's number in its block, i64."""
        return self.special("tid.x")

    @property
    def block(self) -> ir.Value:
        """This block's number in the grid, i64."""
        return self.special("ctaid.x")

    def barrier(self) -> None:
        """Wait for every thread of the block; orders accesses to shared and global memory."""
        self.call("llvm.nvvm.barrier.cta.sync.aligned.all", VOID, i32(0))

    def shuffle(self, value: ir.Value, source: ir.Value | int, mode: str = "bfly") -> ir.Value:
        """The value of lane (own lane xor source), or with mode "idx" of lane `source`."""
        lane = i32(source) if isinstance(source, int) else source
        type_ = value.type
        if type_ == F64 or (isinstance(type_, ir.IntType) and type_.width == 64):
            bits = self.b.bitcast(value, I64)
            low = self.shuffle(self.b.trunc(bits, I32), source, mode)
            high = self.shuffle(self.b.trunc(self.b.lshr(bits, ir.Constant(I64, 32)), I32),
                                source, mode)
            wide = self.b.or_(self.b.shl(self.b.zext(high, I64), ir.Constant(I64, 32)),
                              self.b.zext(low, I64))
            return self.b.bitcast(wide, type_)
        if isinstance(type_, ir.IntType) and type_.width < 32:
            return self.b.trunc(self.shuffle(self.b.zext(value, I32), source, mode), type_)
        suffix = "f32" if type_ == F32 else "i32"
        return self.call(f"llvm.nvvm.shfl.sync.{mode}.{suffix}", type_, i32(-1), value, lane,
                         i32(WARP - 1))

    def across_warp(self, value: ir.Value,
                    combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """All lanes' values combined, the same in each lane (a fixed tree: results repeat)."""
        step = WARP // 2
        while step:
            value = combine(value, self.shuffle(value, step))
            step //= 2
        return value

    def shared(self, element: ir.Type, count: int, align: int = 16) -> ir.Value:
        """Shared memory of the block, of a fixed size (48 KiB in all, at most): its address."""
        type_ = ir.ArrayType(element, count)
        memory = ir.GlobalVariable(self.module, type_, self.module.get_unique_name("shared"),
                                   addrspace=3)
        memory.linkage = "internal"
        memory.initializer = ir.Constant(type_, ir.Undefined)
        memory.align = align
        with self.b.goto_entry_block():
            return self.b.addrspacecast(memory, POINTER)


class Warp:
    """A group for expressions: the 32 threads of a warp."""

    count = WARP

    def __init__(self, e: DeviceEmitter):
        self.e = e
        self.index = e.b.and_(e.thread, ir.Constant(I64, WARP - 1))

    def across(self, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]
               ) -> ir.Value:
        return self.e.across_warp(value, combine)


class Block:
    """A group for expressions: all threads of a block (a multiple of 32, at most 1024)."""

    def __init__(self, e: DeviceEmitter, threads: int):
        self.e = e
        self.count = threads
        self.index = e.thread

    def across(self, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]
               ) -> ir.Value:
        """Each warp by shuffles, then the warps' values, which every thread adds up in order."""
        e, type_ = self.e, value.type
        total = e.across_warp(value, combine)
        warps = self.count // WARP
        if warps == 1:
            return total
        held = ir.IntType(8) if type_ == ir.IntType(1) else type_
        memory = e.shared(held, warps)
        own = e.b.zext(total, held) if held is not type_ else total
        e.store(own, e.offset(memory, e.b.lshr(e.thread, ir.Constant(I64, 5)), held))
        e.barrier()
        parts = [e.load(e.offset(memory, warp, held), held) for warp in range(warps)]
        if held is not type_:
            parts = [e.b.trunc(part, type_) for part in parts]
        e.barrier()
        result = parts[0]
        for part in parts[1:]:
            result = combine(result, part)
        return result


class DeviceFrame(StageFrame):
    """Dims and buffers of a kernel whose first argument is the step's arguments, in device memory.

    Buffers are known to lie in global memory, and to be aligned.
    """

    alignment = 64

    def __init__(self, program: Program, e: DeviceEmitter, arguments: ir.Value, layer: ir.Value):
        super().__init__(program, e, arguments, layer)

    def _load_pointer(self, place: ir.Value) -> ir.Value:
        pointer = self._e.load(place, GLOBAL, 8)
        return self._e.b.addrspacecast(pointer, POINTER)


class Kernel(Protocol):
    """A stage's code. Constructed as KIND(stage, program, target), target of one architecture."""

    threads: int  # of a block
    shared_bytes: int  # dynamic shared memory of a block

    def blocks(self) -> Dim:
        """Upper bound of thread blocks at a shape."""
        ...

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """The code of one thread; control must end at the position that is left."""
        ...

