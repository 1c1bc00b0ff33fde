"""The C ABI: all variants of a model and what C calls, in one object that needs no Python.

The variants' modules are linked into one. Everything in it is local but the functions of the
interface, so that several models link into one program; outside it only libc, libm and pthread
symbols are needed. What C calls is emitted for the plainest CPU of its kind: `create` must be able
to say that a CPU is too old.
"""

from __future__ import annotations

from collections.abc import Mapping

import llvmlite.binding as llvm
import llvmlite.ir as ir

from llmc.codegen.host import driver, team
from llmc.codegen.host.abi_call import Call
from llmc.codegen.host.abi_create import Create
from llmc.codegen.host.abi_interface import Interface, local_name
from llmc.codegen.llvm import optimise
from llmc.codegen.target import Target
from llmc.errors import CompileError

_TEAM = (team.CREATE, team.DESTROY, team.RUN, team.BARRIER)


def generate_abi(interface: Interface, code: Mapping[str, str], target: Target) -> bytes:
    """Position-independent object that exports the interface.

    code: variant -> optimised LLVM text, as `generate` gives it.
    """
    machine = target.machine()
    module = _functions(interface, target, machine)
    exported = [interface.prefix + name for name in interface.functions]
    for variant, text in code.items():
        other = llvm.parse_assembly(text)
        _make_local(other, variant)
        _check_names(other, exported)
        module.link_in(other)
    for function in module.functions:
        if not function.is_declaration and function.name not in exported:
            function.linkage = llvm.Linkage.internal
    module.verify()
    return machine.emit_object(module)


def _functions(interface: Interface, target: Target, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """The module of what C calls; the variants are declared."""
    module = ir.Module(interface.name)
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    Create(module, interface, target).emit()
    Call(module, interface, target).emit()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    optimise(parsed, machine, 2)
    return parsed


def _make_local(module: llvm.ModuleRef, variant: str) -> None:
    """Rename what a variant exports; the team is the same in all, so one copy will stay."""
    step = module.get_function(driver.STEP)
    step.name = local_name(driver.STEP, variant)
    for name in _TEAM:
        function = module.get_function(name)
        function.name = local_name(name)
        function.linkage = llvm.Linkage.linkonce_odr


def _check_names(module: llvm.ModuleRef, exported: list[str]) -> None:
    needed = {function.name for function in module.functions if function.is_declaration}
    if clash := needed & set(exported):
        raise CompileError(f"the prefix makes the name {min(clash)}, which is a function of the C "
                           "library: choose another prefix")
