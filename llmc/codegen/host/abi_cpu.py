"""Whether the CPU at hand has what code for a target needs: emitted code that asks the CPU itself.

On x86 `cpuid` says what the CPU has and `xgetbv` what the system saves on a task switch. On other
processors nothing is asked: code for AArch64 needs what the named CPU has.
"""

from __future__ import annotations

import platform

import llvmlite.binding as llvm
import llvmlite.ir as ir

from llmc.codegen.llvm import I1, I32, Emitter, i32
from llmc.codegen.target import Target
from llmc.errors import CompileError

# LLVM's name of a feature -> cpuid leaf, subleaf, register (0 eax, 1 ebx, 2 ecx, 3 edx) and bit.
# Only what generated code may use: crypto, memory protection and the like are left out.
BITS = {
    **{name: (1, 0, 2, bit) for name, bit in {
        "sse3": 0, "ssse3": 9, "fma": 12, "cx16": 13, "sse4.1": 19, "sse4.2": 20, "movbe": 22,
        "popcnt": 23, "osxsave": 27, "avx": 28, "f16c": 29}.items()},
    **{name: (7, 0, 1, bit) for name, bit in {
        "bmi": 3, "avx2": 5, "bmi2": 8, "avx512f": 16, "avx512dq": 17, "adx": 19, "avx512ifma": 21,
        "avx512cd": 28, "avx512bw": 30, "avx512vl": 31}.items()},
    **{name: (7, 0, 2, bit) for name, bit in {
        "avx512vbmi": 1, "avx512vbmi2": 6, "gfni": 8, "avx512vnni": 11, "avx512bitalg": 12,
        "avx512vpopcntdq": 14}.items()},
    "avx512fp16": (7, 0, 3, 23),
    **{name: (7, 1, 0, bit) for name, bit in {
        "avxvnni": 4, "avx512bf16": 5, "avxifma": 23}.items()},
    **{name: (7, 1, 3, bit) for name, bit in {
        "avxvnniint8": 4, "avxneconvert": 5, "avxvnniint16": 10}.items()},
    **{name: (0x80000001, 0, 2, bit) for name, bit in {
        "sahf": 0, "lzcnt": 5, "sse4a": 6, "xop": 11, "fma4": 16, "tbm": 21}.items()},
}
_V2 = ("cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_SAVED = {"avx": 0x06, "avx512f": 0xE6}  # registers that the system must save, as bits of XCR0
_REGISTERS = ir.LiteralStructType([I32] * 4)


def required(target: Target) -> frozenset[str]:
    """Features that the CPU must have.

    Those that the target lists, and the level that its vectors show: of a CPU that is named without
    its features, no more is known (x86-64-v3 or -v4, and bf16).
    """
    listed = {name[1:] for name in target.features if name.startswith("+")}
    level = {16: _V4, 8: _V3}.get(target.vector_lanes, ())
    names = {*level, *(listed & BITS.keys())}
    if target.has_bf16:
        names.add("avx512bf16")
    if "avx" in names:
        names.add("osxsave")
    return frozenset(names)


def emit_check(e: Emitter, target: Target) -> ir.Value:
    """i1: whether this CPU can run code for the target. Needs no more than a plain x86-64."""
    names = required(target) if target.processor == "x86_64" else frozenset()
    answer: ir.Value = ir.Constant(I1, 1)
    if not names:
        return answer
    _initialise_assembler(target)
    highest = e.b.extract_value(_cpuid(e, 0, 0), 0)
    for (leaf, subleaf), masks in sorted(_masks(names).items()):
        registers = _cpuid(e, leaf, subleaf)
        if leaf == 7:  # beyond its highest leaf, cpuid answers with another's
            answer = e.b.and_(answer, e.b.icmp_unsigned(">=", highest, i32(7)))
        for register, mask in masks.items():
            answer = e.b.and_(answer, _has(e, e.b.extract_value(registers, register), mask))
    return _and_saved(e, answer, names)


def _masks(names: frozenset[str]) -> dict[tuple[int, int], dict[int, int]]:
    """(leaf, subleaf) -> register -> bits that must be set."""
    masks: dict[tuple[int, int], dict[int, int]] = {}
    for name in sorted(names):
        leaf, subleaf, register, bit = BITS[name]
        registers = masks.setdefault((leaf, subleaf), {})
        registers[register] = registers.get(register, 0) | 1 << bit
    return masks


def _and_saved(e: Emitter, answer: ir.Value, names: frozenset[str]) -> ir.Value:
    """answer, and that the system saves the registers; xgetbv is legal only where osxsave is."""
    mask = 0
    for name, bits in _SAVED.items():
        mask |= bits if name in names else 0
    if not mask:
        return answer
    before = e.b.block
    with e.b.if_then(answer):
        state = e.b.call(_assembler("xgetbv", [I32], "={ax},={dx},{cx}", 2), [i32(0)])
        saved, asked = _has(e, e.b.extract_value(state, 0), mask), e.b.block
    result = e.b.phi(I1)
    result.add_incoming(answer, before)
    result.add_incoming(saved, asked)
    return result


def _has(e: Emitter, value: ir.Value, mask: int) -> ir.Value:
    wanted = ir.Constant(I32, mask)
    return e.b.icmp_unsigned("==", e.b.and_(value, wanted), wanted)


def _cpuid(e: Emitter, leaf: int, subleaf: int) -> ir.Value:
    code = _assembler("cpuid", [I32, I32], "={ax},={bx},={cx},={dx},{ax},{cx}", 4)
    return e.b.call(code, [ir.Constant(I32, leaf), i32(subleaf)])


def _assembler(text: str, arguments: list[ir.Type], constraint: str, results: int) -> ir.InlineAsm:
    registers = ir.LiteralStructType(_REGISTERS.elements[:results])
    return ir.InlineAsm(ir.FunctionType(registers, arguments), text, constraint, True)


def _initialise_assembler(target: Target) -> None:
    """LLVM aborts the process where it cannot parse inline assembly, so that is asked first."""
    if target.processor != platform.machine():
        raise CompileError(f"a C ABI for {target.processor} can only be emitted on such a machine "
                           f"(this one is {platform.machine()})")
    llvm.initialize_native_asmparser()
