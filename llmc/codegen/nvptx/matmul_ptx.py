"""PTX instructions of the matmul kernels, as inline assembly: what LLVM has no short form for.

Shared memory is addressed by 32-bit offsets (`shared_base`), as ldmatrix, cp.async and wgmma want
them; plain loads and stores go through pointers of address space 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.ir as ir

from llmc.codegen.elements import collect
from llmc.codegen.llvm import F32, I8, I32, I64, VOID, Emitter, i32

SHARED_MEMORY = "llmc_matmul_shared"  # dynamic shared memory, aligned for swizzles
SHARED_ALIGN = 1024  # the period of the 128-byte swizzle
SHARED_SPACE = 3
WARP = 32


def shared_base(e: Emitter) -> ir.Value:
    """Address of the block's dynamic shared memory, i32; one symbol for all kernels of a module."""
    found = e.module.globals.get(SHARED_MEMORY)
    if found is None:
        found = ir.GlobalVariable(e.module, ir.ArrayType(I8, 0), SHARED_MEMORY,
                                  addrspace=SHARED_SPACE)
        found.linkage = "external"
        found.align = SHARED_ALIGN
    return e.b.ptrtoint(found, I32)


def shared_memory(e: Emitter) -> ir.Value:
    """The same as a pointer."""
    return shared_pointer(e, shared_base(e))


def shared_pointer(e: Emitter, address: ir.Value) -> ir.Value:
    """A 32-bit shared address as a pointer."""
    return e.b.inttoptr(address, ir.PointerType(addrspace=SHARED_SPACE))


def special(e: Emitter, name: str) -> ir.Value:
    """A special register such as tid.x, i32."""
    return e.call(f"llvm.nvvm.read.ptx.sreg.{name}", I32)


def assembly(e: Emitter, text: str, constraints: str, result: ir.Type,
             arguments: Sequence[ir.Value], effect: bool = True) -> ir.Value:
    """One inline assembly; with `effect` it keeps its place among memory accesses."""
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    if effect:
        constraints += ("," if constraints else "") + "~{memory}"
    code = ir.InlineAsm(function, text, constraints, effect)
    return e.b.call(code, list(arguments), attrs=("convergent",) if effect else ())


def barrier(e: Emitter) -> None:
    """All threads of the block, and their shared memory."""
    assembly(e, "bar.sync 0;", "", VOID, [])


def cluster_barrier(e: Emitter) -> None:
    """All threads of all blocks of the cluster, and their shared memory."""
    assembly(e, "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;",
             "", VOID, [])


def load_remote(e: Emitter, address: ir.Value, rank: int, lanes: int) -> ir.Value:
    """f32 values from this shared address in block `rank` of the cluster: one, or a vector of them
    (lanes: 1 or a multiple of 4, 16-byte aligned)."""
    width = min(lanes, 4)
    values = []
    for start in range(0, lanes, width):
        registers = ",".join(f"${number}" for number in range(width))
        target = f"{{{registers}}}" if width > 1 else registers
        vectors = ".v4" if width > 1 else ""
        text = (f"{{ .reg .b32 remote; mapa.shared::cluster.u32 remote, ${width}, {rank}; "
                f"ld.shared::cluster{vectors}.f32 {target}, [remote + {4 * start}]; }}")
        result = _structure(F32, width) if width > 1 else F32
        loaded = assembly(e, text, ",".join(["=f"] * width) + ",r", result, [address])
        values += _parts(e, loaded, width) if width > 1 else [loaded]
    return collect(e, values)


# ---- copies ----------------------------------------------------------------------------------


def copy_async(e: Emitter, shared: ir.Value, source: ir.Value, count: ir.Value | None = None,
               wanted: ir.Value | None = None) -> None:
    """16 bytes from global to shared memory, past L1; count: bytes that exist, the rest zeros;
    wanted (i1): else nothing is read or written."""
    operands, constraints = [shared, source], "r,l"
    size = "16"
    if count is not None:
        operands, constraints, size = [*operands, count], constraints + ",r", "16, $2"
    copy = f"cp.async.cg.shared.global.L2::128B [$0], [$1], {size};"
    if wanted is not None:
        operands, constraints = [*operands, e.b.zext(wanted, I32)], constraints + ",r"
        copy = (f"{{ .reg .pred wanted; setp.ne.b32 wanted, ${len(operands) - 1}, 0; "
                f"@wanted {copy} }}")
    assembly(e, copy, constraints, VOID, operands)


def commit_copies(e: Emitter) -> None:
    """Copies since the last commit are one group."""
    assembly(e, "cp.async.commit_group;", "", VOID, [])


def wait_copies(e: Emitter, pending: int) -> None:
    """Until at most `pending` groups of this thread are under way."""
    assembly(e, f"cp.async.wait_group {pending};", "", VOID, [])


def load_streaming(e: Emitter, source: ir.Value, wanted: ir.Value) -> list[ir.Value]:
    """16 bytes that are read once, as 4 x i32, past L1; zeros where they are not wanted (i1)."""
    text = """{
        .reg .pred wanted;
        setp.ne.b32 wanted, $5, 0;
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        @wanted ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0,$1,$2,$3}, [$4];
        }"""
    loaded = assembly(e, text, "=&r,=&r,=&r,=&r,l,r", _structure(I32, 4),
                      [source, e.b.zext(wanted, I32)])
    return _parts(e, loaded, 4)


def _structure(element: ir.Type, count: int) -> ir.Type:
    return ir.LiteralStructType([element] * count)


def _parts(e: Emitter, value: ir.Value, count: int) -> list[ir.Value]:
    return [e.b.extract_value(value, number) for number in range(count)]


# ---- tensor cores ----------------------------------------------------------------------------


def load_matrices(e: Emitter, address: ir.Value) -> list[ir.Value]:
    """ldmatrix: four 8 x 8 matrices of 16-bit elements, as 4 x i32."""
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];"
    return _parts(e, assembly(e, text, "=r,=r,=r,=r,r", _structure(I32, 4), [address]), 4)


def multiply_fragments(e: Emitter, name: str, a: Sequence[ir.Value], b: Sequence[ir.Value],
                       c: Sequence[ir.Value]) -> list[ir.Value]:
    """mma.m16n8k16 of bf16 or f16 (`name`), sums in f32: a 4, b 2 and c 4 registers."""
    text = (f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};")
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3"
    return _parts(e, assembly(e, text, constraints, _structure(F32, 4), [*a, *b, *c],
                              effect=False), 4)


def multiply_group(e: Emitter, name: str, sums: Sequence[ir.Value], a: ir.Value, b: ir.Value,
                   steps: int) -> list[ir.Value]:
    """wgmma.m64nNk16, `steps` of them along k, started and committed as one group.

    a, b: i64 descriptors of 128-byte swizzled tiles, k contiguous. The sums are in flight until
    `wait_group`.
    """
    count = len(sums)
    registers = ",".join(f"${number}" for number in range(count))
    shape = f"m64n{2 * count}k16.f32.{name}.{name}"
    first = 2 * count
    lines = ["{", ".reg .b64 left, right;", "wgmma.fence.sync.aligned;"]
    for step in range(steps):
        lines += [f"add.s64 left, ${first}, {2 * step};",
                  f"add.s64 right, ${first + 1}, {2 * step};",
                  f"wgmma.mma_async.sync.aligned.{shape} {{{registers}}}, left, right, 1, 1, 1, "
                  "0, 0;"]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    constraints = ",".join(["=f"] * count + [str(number) for number in range(count)] + ["l", "l"])
    return _parts(e, assembly(e, "\n".join(lines), constraints, _structure(F32, count),
                              [*sums, a, b]), count)


def wait_group(e: Emitter, sums: Sequence[ir.Value], pending: int) -> list[ir.Value]:
    """Until at most `pending` groups of wgmma are in flight; carries the sums they write."""
    count = len(sums)
    constraints = ",".join(["=f"] * count + [str(number) for number in range(count)])
    return _parts(e, assembly(e, f"wgmma.wait_group.sync.aligned {pending};", constraints,
                              _structure(F32, count), list(sums)), count)


def fence_proxy(e: Emitter) -> None:
    """Shared memory that this thread wrote may be read by wgmma after the next barrier."""
    assembly(e, "fence.proxy.async.shared::cta;", "", VOID, [])


def swizzled_descriptor(e: Emitter, address: ir.Value) -> ir.Value:
    """wgmma's descriptor of a tile of 128-byte rows, swizzled by 128 bytes, 1024-aligned."""
    low = e.b.zext(e.b.lshr(e.b.and_(address, i32(0x3FFFF)), i32(4)), I64)
    return e.b.or_(low, ir.Constant(I64, 1 << 62 | (1024 >> 4) << 32 | 1 << 16))
