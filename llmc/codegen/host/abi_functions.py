"""What the emitters of the C ABI's functions share.

A handle begins with the step's arguments, which point into the handle itself (see `Handle`), so a
call fills in tables and passes the handle on.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.host.abi_interface import Handle, Interface, local_name
from llmc.codegen.host.frame import StageFrame
from llmc.codegen.llvm import I1, I32, I64, POINTER, Emitter, define, i64
from llmc.codegen.target import Target

_PLAIN_CPU = {"x86_64": "x86-64", "aarch64": "generic"}


class Functions:
    """Emits functions into a module in which those of the variants are only declared."""

    def __init__(self, module: ir.Module, interface: Interface, target: Target):
        self.module = module
        self.interface = interface
        self.target = target
        self.layout = Handle(interface)

    def define(self, name: str, result: ir.Type, arguments: list[ir.Type], exported: bool = False
               ) -> tuple[Emitter, tuple[ir.Value, ...]]:
        """A function for the plainest CPU: it runs before the CPU is known to be fit."""
        name = self.interface.prefix + name if exported else local_name(name)
        function, e = define(self.module, name, result, arguments, internal=not exported)
        cpu = _PLAIN_CPU[self.target.processor]
        for attribute in (f'"target-cpu"="{cpu}"', '"target-features"=""'):
            set.add(function.attributes, attribute)  # llvmlite knows no string attributes
        return e, function.args

    def call(self, e: Emitter, name: str, *arguments: ir.Value) -> ir.Value:
        """A call of an internal function that `define` made."""
        return e.b.call(self.module.get_global(local_name(name)), arguments)

    def field(self, e: Emitter, handle: ir.Value, name: str) -> ir.Value:
        """Address of a field of the handle."""
        return e.offset(handle, self.layout.fields[name])

    def get(self, e: Emitter, handle: ir.Value, name: str, type_: ir.Type = I64) -> ir.Value:
        return e.load(self.field(e, handle, name), type_)

    def put(self, e: Emitter, handle: ir.Value, name: str, value: ir.Value) -> None:
        e.store(value, self.field(e, handle, name))

    def put_symbol(self, e: Emitter, handle: ir.Value, name: str, value: ir.Value) -> None:
        """Set the value of a symbol, if the model has it."""
        if name in self.layout.symbols:
            e.store(value, e.offset(handle, self.layout.symbols[name]))

    def framed(self, name: str, variant: str) -> tuple[Emitter, ir.Value, StageFrame]:
        """A function `i32 name(handle)` that may ask for dims of a variant's program."""
        entry, (handle,) = self.define(name, I32, [POINTER])
        body = entry.b.append_basic_block("body")
        entry.b.branch(body)
        e = Emitter(ir.IRBuilder(body))
        return e, handle, StageFrame(self.interface.programs[variant], e, handle, i64(0))

    def covers(self, e: Emitter, handle: ir.Value, variant: str) -> ir.Value:
        """i1: whether the variant may run at the handle's symbols."""
        covered: ir.Value = ir.Constant(I1, 1)
        for name, low, high in self.interface.programs[variant].symbols:
            value = e.load(e.offset(handle, self.layout.symbols[name]), I64)
            above = e.b.icmp_signed(">=", value, i64(low))
            below = e.b.icmp_signed("<=", value, i64(high))
            covered = e.b.and_(covered, e.b.and_(above, below))
        return covered
