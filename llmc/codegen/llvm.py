"""What llvmlite leaves out: bfloat, string attributes, and short forms of what kernels say often.

Pointers are opaque; `Emitter` wraps an `ir.IRBuilder` (its `.b`) and adds loops, vectors and
bfloat16. A bfloat16 is held as i16 everywhere in memory and in registers, and only cast to
`bfloat` for an intrinsic that asks for it: LLVM would call a missing `__truncsfbf2` otherwise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llvmlite.binding as llvm
import llvmlite.ir as ir


class BFloatType(ir.types._BaseFloatType):
    """`bfloat`, which llvmlite.ir does not have."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"

    def format_constant(self, value):
        raise TypeError("write bfloat constants as i16 bit patterns")


BFloatType._create_instance()

BF16 = BFloatType()
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
POINTER = ir.PointerType()
VOID = ir.VoidType()


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def i32(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


def f32(value: float) -> ir.Constant:
    return ir.Constant(F32, value)


def vector(element: ir.Type, lanes: int) -> ir.Type:
    """`<lanes x element>`, or the element itself when lanes is 1."""
    return element if lanes == 1 else ir.VectorType(element, lanes)


def lanes_of(value: ir.Value) -> int:
    return value.type.count if isinstance(value.type, ir.VectorType) else 1


def like(value: ir.Value, element: ir.Type) -> ir.Type:
    """The type with value's lanes and another element."""
    return vector(element, lanes_of(value))


def splat_constant(type_: ir.Type, value) -> ir.Constant:
    if isinstance(type_, ir.VectorType):
        return ir.Constant(type_, [value] * type_.count)
    return ir.Constant(type_, value)


class Emitter:
    """An IRBuilder with the short forms that kernels need."""

    def __init__(self, builder: ir.IRBuilder):
        self.b = builder

    @property
    def module(self) -> ir.Module:
        return self.b.module

    # ---- memory ---------------------------------------------------------------------------

    def offset(self, pointer, index, element: ir.Type | None = None):
        """pointer + index elements (bytes when no element type is given)."""
        index = i64(index) if isinstance(index, int) else index
        return self.b.gep(pointer, [index], source_etype=element or I8)

    def load(self, pointer, type_: ir.Type, align: int | None = None):
        """A load; vectors are taken to be aligned to their element only, unless told."""
        return self.b.load(pointer, typ=type_, align=align or _element_bytes(type_))

    def store(self, value, pointer, align: int | None = None):
        return self.b.store(value, pointer, align=align or _element_bytes(value.type))

    def stack(self, type_: ir.Type, count: int = 1, align: int = 64):
        """Stack memory, reserved in the function's entry block (never once per iteration)."""
        with self.b.goto_entry_block():
            slot = self.b.alloca(type_, size=i32(count))
        slot.align = align
        slot.type = POINTER  # llvmlite would give it a typed pointer, which only scalars fit
        return slot

    # ---- control flow ---------------------------------------------------------------------

    @contextmanager
    def loop(self, start, stop, step=1, name="i") -> Iterator[ir.Value]:
        """`for i in range(start, stop, step)`, i64, step > 0; the body may run zero times."""
        with self.fold(start, stop, [], step, name) as (index, _, _):
            yield index

    @contextmanager
    def fold(self, start, stop, initial: list, step=1, name="i"):
        """A counted loop that carries values in registers.

        Yields (index, carried phis, finish); the body must call finish(new_values) exactly once
        when it carries any; after the loop, `finish.results` holds the carried values.
        """
        start, stop, step = (i64(v) if isinstance(v, int) else v for v in (start, stop, step))
        before = self.b.block
        head = self.b.append_basic_block(name + ".head")
        body = self.b.append_basic_block(name + ".body")
        done = self.b.append_basic_block(name + ".done")
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64, name)
        index.add_incoming(start, before)
        phis = []
        for value in initial:
            phi = self.b.phi(value.type)
            phi.add_incoming(value, before)
            phis.append(phi)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), body, done)
        self.b.position_at_end(body)
        finish = _Finish(phis)
        yield index, phis, finish
        if finish.values is None:
            raise AssertionError("the loop's body did not finish its carried values")
        index.add_incoming(self.b.add(index, step, flags=["nsw"]), self.b.block)
        for phi, value in zip(phis, finish.values, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(done)

    # ---- integers -------------------------------------------------------------------------

    def minimum(self, a, b):
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def maximum(self, a, b):
        return self.b.select(self.b.icmp_signed(">", a, b), a, b)

    def ceildiv(self, a, b):
        """ceil(a / b) of non-negative i64 values."""
        return self.b.udiv(self.b.add(a, self.b.sub(b, i64(1))), b)

    # ---- vectors --------------------------------------------------------------------------

    def splat(self, scalar, lanes: int):
        if lanes == 1:
            return scalar
        type_ = ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(type_, ir.Undefined), scalar, i32(0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.b.shuffle_vector(one, ir.Constant(type_, ir.Undefined), zeros)

    def call(self, name: str, result: ir.Type, *arguments):
        """A call of an intrinsic or external function by its full name."""
        function = self.module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(self.module, signature, name)
        return self.b.call(function, arguments)

    def fma(self, a, b, c):
        suffix = _suffix(a.type)
        return self.call(f"llvm.fma.{suffix}", a.type, a, b, c)

    def divide(self, a, b):
        """a / b of floats, correctly rounded wherever the target can afford it."""
        return self.b.fdiv(a, b)

    def multiply_add(self, a, b, c):
        """a * b + c, fused where the CPU has such an instruction: never a call of fmaf."""
        return self.call(f"llvm.fmuladd.{_suffix(a.type)}", a.type, a, b, c)

    def reduce_add(self, value):
        """Horizontal sum of a vector; of floats by a fixed tree, so that results repeat. Integers
        by the intrinsic: LLVM 22 takes a tree over products of bytes for its dot product
        instruction, and then loses the lanes that the tree's last steps would add."""
        if lanes_of(value) > 1 and isinstance(value.type.element, ir.IntType):
            element = value.type.element
            return self.call(f"llvm.vector.reduce.add.v{lanes_of(value)}i{element.width}", element,
                             value)
        while (lanes := lanes_of(value)) > 1:
            if lanes % 2:
                raise ValueError("a horizontal sum needs a power of two lanes")
            half = lanes // 2
            value = self.b.fadd(*self.halves(value)) if half > 1 else self.b.fadd(
                self.b.extract_element(value, i32(0)), self.b.extract_element(value, i32(1)))
        return value

    def halves(self, value):
        half = lanes_of(value) // 2
        index = ir.VectorType(I32, half)
        undefined = ir.Constant(value.type, ir.Undefined)
        low = self.b.shuffle_vector(value, undefined, ir.Constant(index, list(range(half))))
        high = self.b.shuffle_vector(
            value, undefined, ir.Constant(index, list(range(half, 2 * half))))
        return low, high

    # ---- bfloat16 as i16 ------------------------------------------------------------------

    def bf16_to_f32(self, bits):
        wide = self.b.zext(bits, like(bits, I32))
        shifted = self.b.shl(wide, splat_constant(wide.type, 16))
        return self.b.bitcast(shifted, like(bits, F32))

    def f32_to_bf16(self, value):
        """Round to nearest even; NaN stays NaN (quiet)."""
        bits = self.b.bitcast(value, like(value, I32))
        low_bit = self.b.and_(self.b.lshr(bits, splat_constant(bits.type, 16)),
                              splat_constant(bits.type, 1))
        bias = self.b.add(low_bit, splat_constant(bits.type, 0x7FFF))
        rounded = self.b.lshr(self.b.add(bits, bias), splat_constant(bits.type, 16))
        quiet = self.b.or_(self.b.lshr(bits, splat_constant(bits.type, 16)),
                           splat_constant(bits.type, 0x40))
        is_nan = self.b.fcmp_unordered("uno", value, value)
        return self.b.trunc(self.b.select(is_nan, quiet, rounded), like(value, I16))


class _Finish:
    def __init__(self, phis):
        self.results = phis
        self.values: list | None = None if phis else []

    def __call__(self, values):
        self.values = list(values)


def _element_bytes(type_: ir.Type) -> int:
    element = type_.element if isinstance(type_, ir.VectorType) else type_
    if isinstance(element, ir.PointerType):
        return 8
    sizes = {F64: 8, F32: 4, F16: 2, BF16: 2}
    return sizes.get(element) or max(1, element.width // 8)


def _suffix(type_: ir.Type) -> str:
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{_suffix(type_.element)}"
    return f"i{type_.width}" if isinstance(type_, ir.IntType) else type_.intrinsic_name


def define(module: ir.Module, name: str, result: ir.Type, arguments: list[ir.Type],
           internal: bool = True, attributes: tuple[str, ...] = ()) -> tuple[ir.Function, Emitter]:
    """A new function and an emitter at its entry."""
    function = ir.Function(module, ir.FunctionType(result, arguments), name)
    if internal:
        function.linkage = "internal"
    for attribute in attributes:
        function.attributes.add(attribute)
    return function, Emitter(ir.IRBuilder(function.append_basic_block("entry")))


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looking for garbage: a module's many objects live until its text is made, and to look
    through them again and again takes a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def emit_object(text: str, machine: llvm.TargetMachine, level: int = 3) -> tuple[bytes, str]:
    """(object bytes, optimised LLVM text) of a module's text, by the standard -O pipeline."""
    module = llvm.parse_assembly(text)
    module.verify()
    optimise(module, machine, level)
    return machine.emit_object(module), str(module)


def optimise(module, machine: llvm.TargetMachine, level: int = 3) -> None:
    """LLVM's standard -O pipeline over a module, in place; loops are not unrolled further."""
    options = llvm.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = True
    options.slp_vectorization = True
    options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)


Callback = Callable[..., None]
