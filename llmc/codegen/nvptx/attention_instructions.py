"""Instructions that attention is made of on a GPU, as short functions on an Emitter.

Shared memory is addressed by i32 byte offsets from the block's dynamic shared memory; warps are
whole wherever a function says that all lanes must call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import llvmlite.ir as ir

from llmc.codegen.llvm import F32, I32, VOID, Emitter, i32
from llmc.ir.dtypes import DType

WARP = 32
_ALL_LANES = i32(-1)
_GLOBAL, _SHARED = 1, 3
_DYNAMIC = "llmc_shared"


# ---- where a thread is ---------------------------------------------------------------------


def thread_index(e: Emitter) -> ir.Value:
    """Index of the thread in its block, i32."""
    return e.call("llvm.nvvm.read.ptx.sreg.tid.x", I32)


def barrier(e: Emitter) -> None:
    """All threads of the block meet; their shared memory writes are seen by all."""
    _asm(e, VOID, "bar.sync 0;", "~{memory}")


def warp_barrier(e: Emitter) -> None:
    _asm(e, VOID, "bar.warp.sync 0xffffffff;", "~{memory}")


@contextmanager
def short_loop(e: Emitter, start: ir.Value, stop: ir.Value, step: int, initial: list[ir.Value]
               ) -> Iterator[tuple[ir.Value, list[ir.Value], list[ir.Value]]]:
    """`Emitter.fold` with an i32 index, which takes half the registers.

    Yields (index, carried values, results): the body appends the new values to results, which
    holds what the loop leaves afterwards.
    """
    before = e.b.block
    head, body, done = (e.b.append_basic_block(name) for name in ("head", "body", "done"))
    e.b.branch(head)
    e.b.position_at_end(head)
    index = e.b.phi(I32)
    index.add_incoming(start, before)
    phis = [e.b.phi(value.type) for value in initial]
    for phi, value in zip(phis, initial, strict=True):
        phi.add_incoming(value, before)
    e.b.cbranch(e.b.icmp_signed("<", index, stop), body, done)
    e.b.position_at_end(body)
    results: list[ir.Value] = []
    yield index, phis, results
    index.add_incoming(e.b.add(index, i32(step), flags=["nsw"]), e.b.block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, e.b.block)
    e.b.branch(head)
    e.b.position_at_end(done)
    results[:] = phis


# ---- memory --------------------------------------------------------------------------------


def global_memory(e: Emitter, pointer: ir.Value) -> ir.Value:
    """A pointer known to be to global memory."""
    if pointer.type.addrspace == _GLOBAL:
        return pointer
    return e.b.addrspacecast(pointer, ir.PointerType(addrspace=_GLOBAL))


def shared_memory(e: Emitter) -> ir.Value:
    """The block's dynamic shared memory."""
    found = e.module.globals.get(_DYNAMIC)
    if found is None:
        found = ir.GlobalVariable(e.module, ir.ArrayType(ir.IntType(8), 0), _DYNAMIC,
                                  addrspace=_SHARED)
        found.linkage = "external"
        found.align = 1024  # as matmul asks: one symbol for all kernels of a module
        found.type = ir.PointerType(addrspace=_SHARED)  # llvmlite's would fit bytes only
    return found


def shared_address(e: Emitter) -> ir.Value:
    """The i32 address of the dynamic shared memory, for the functions below."""
    return e.b.ptrtoint(shared_memory(e), I32)


def copy_async(e: Emitter, shared: ir.Value, offset: int, source: ir.Value,
               wanted: ir.Value | None = None, exists: ir.Value | None = None,
               at: int = 0) -> None:
    """Starts a copy of 16 bytes from source + at, in global memory, to shared + offset.

    wanted (i1): where false, zeros are written instead. exists (i1): where false, nothing is.
    """
    arguments, constraints = [shared, global_memory(e, source)], "r,l"
    size = ""
    if wanted is not None:
        size = f", ${len(arguments)}"
        arguments.append(e.b.select(wanted, i32(16), i32(0)))
        constraints += ",r"
    text = f"cp.async.cg.shared.global [$0+{offset}], [$1+{at}], 16{size};"
    if exists is not None:
        text = (f"{{ .reg .pred p; setp.ne.b32 p, ${len(arguments)}, 0; @p {text} }}")
        arguments.append(e.b.zext(exists, I32))
        constraints += ",r"
    _asm(e, VOID, text, constraints + ",~{memory}", *arguments)


def commit_copies(e: Emitter) -> None:
    """Closes the group of copies started since the last call."""
    _asm(e, VOID, "cp.async.commit_group;", "~{memory}")


def wait_copies(e: Emitter, pending: int) -> None:
    """Waits until all but the `pending` newest groups of this thread's copies have landed."""
    _asm(e, VOID, f"cp.async.wait_group {pending};", "~{memory}")


def load_matrices(e: Emitter, shared: ir.Value, offset: int, transposed: bool = False
                  ) -> list[ir.Value]:
    """Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix
    i // 8. All lanes must call it."""
    result = ir.LiteralStructType([I32] * 4)
    form = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];"
    loaded = _asm(e, result, text, "=r,=r,=r,=r,r,~{memory}", shared)
    return [e.b.extract_value(loaded, i) for i in range(4)]


# ---- arithmetic ----------------------------------------------------------------------------


def multiply_matrices(e: Emitter, dtype: DType, a: list[ir.Value], b: list[ir.Value],
                      sums: list[ir.Value]) -> list[ir.Value]:
    """sums + a b: 16 x 16 times 16 x 8 in f16 or bf16, summed in f32. All lanes must call it."""
    text = (f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype.name}.{dtype.name}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};")
    signature = ir.FunctionType(ir.LiteralStructType([F32] * 4), [I32] * 6 + [F32] * 4)
    code = ir.InlineAsm(signature, text, "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3", side_effect=False)
    result = e.b.call(code, [*a, *b, *sums], attrs=("convergent", "nounwind"))
    return [e.b.extract_value(result, i) for i in range(4)]


def pack_pair(e: Emitter, dtype: DType, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two f32 rounded to f16 or bf16, as one i32."""
    text = f"cvt.rn.{dtype.name}x2.f32 $0, $1, $2;"
    signature = ir.FunctionType(I32, [F32, F32])
    return e.b.call(ir.InlineAsm(signature, text, "=r,f,f", side_effect=False), [high, low])


def exp2(e: Emitter, x: ir.Value) -> ir.Value:
    """2^x within 2 ulp; denormal results are 0, 2^-inf is 0."""
    signature = ir.FunctionType(F32, [F32])
    text = "ex2.approx.ftz.f32 $0, $1;"
    return e.b.call(ir.InlineAsm(signature, text, "=f,f", side_effect=False), [x])


def reciprocal(e: Emitter, x: ir.Value) -> ir.Value:
    """1 / x within 1 ulp; 1 / inf is 0."""
    signature = ir.FunctionType(F32, [F32])
    text = "rcp.approx.ftz.f32 $0, $1;"
    return e.b.call(ir.InlineAsm(signature, text, "=f,f", side_effect=False), [x])


def maximum(e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    return e.call("llvm.maxnum.f32", F32, a, b)


def exchange(e: Emitter, value: ir.Value, distance: int) -> ir.Value:
    """The value of the lane whose index differs in the bits of distance. All lanes must call it."""
    bits = e.b.bitcast(value, I32)
    moved = e.call("llvm.nvvm.shfl.sync.bfly.i32", I32, _ALL_LANES, bits, i32(distance), i32(31))
    return e.b.bitcast(moved, value.type)


def over_lanes(e: Emitter, value: ir.Value, combine, lanes: int = WARP) -> ir.Value:
    """combine over aligned groups of `lanes` lanes, in a fixed order. All lanes must call it."""
    distance = 1
    while distance < lanes:
        value = combine(e, value, exchange(e, value, distance))
        distance *= 2
    return value


def add_floats(e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    return e.b.fadd(a, b)


def smaller(e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    return e.b.select(e.b.icmp_signed("<", a, b), a, b)


def larger(e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    return e.b.select(e.b.icmp_signed(">", a, b), a, b)


def count_lanes(e: Emitter, condition: ir.Value) -> ir.Value:
    """In how many lanes condition (i1) holds, i32. All lanes must call it."""
    ballot = e.call("llvm.nvvm.vote.ballot.sync", I32, _ALL_LANES, condition)
    return e.call("llvm.ctpop.i32", I32, ballot)


def count_arrival(e: Emitter, thread: ir.Value, counter: ir.Value, shared: ir.Value) -> ir.Value:
    """Adds 1 to a counter in global memory for the block, and tells every thread what it was.

    What the block wrote before is seen by blocks that count later, after the call. shared: four
    bytes for the answer.
    """
    _asm(e, VOID, "fence.acq_rel.gpu;", "~{memory}")
    barrier(e)
    with e.b.if_then(e.b.icmp_signed("==", thread, i32(0))):
        old = _asm(e, I32, "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", "=r,l,~{memory}",
                   counter)
        e.store(old, shared)
    barrier(e)
    _asm(e, VOID, "fence.acq_rel.gpu;", "~{memory}")
    return e.load(shared, I32)


def _asm(e: Emitter, result: ir.Type, text: str, constraints: str, *arguments) -> ir.Value:
    """Code that stays where it is."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    code = ir.InlineAsm(signature, text, constraints, side_effect=True)
    return e.b.call(code, arguments, attrs=("convergent", "nounwind"))
