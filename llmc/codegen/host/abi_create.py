"""create and destroy: a handle, its tables, and the memory it owns."""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.host import team
from llmc.codegen.host.abi_checks import NULL, OK, fail_if, is_null, outside, pass_on
from llmc.codegen.host.abi_cpu import emit_check
from llmc.codegen.host.abi_functions import Functions
from llmc.codegen.host.abi_interface import (
    DEFAULT_TOKENS,
    FINGERPRINT_FACTOR,
    FINGERPRINT_START,
    MOST_SEQUENCES,
    MOST_THREADS,
    local_name,
    samples,
)
from llmc.codegen.llvm import I32, I64, POINTER, VOID, Emitter, i32, i64
from llmc.ir.dims import Dim, ceildiv
from llmc.ir.ops import PAGE


class Create(Functions):
    """i32 create(packed, i64 bytes, options, handle *out); void destroy(handle)."""

    def emit(self) -> None:
        self._define_grow()
        for variant in self.interface.variants():
            self._define_reserve(variant)
        self._define_states()
        self._define_destroy()
        self._define_fill()
        self._define_create()

    # ---- memory -----------------------------------------------------------------------------

    def _define_grow(self) -> None:
        """i32 grow(ptr place, ptr capacity, i64 size): at least so many bytes, 64-aligned."""
        e, (place, capacity, size) = self.define("grow", I32, [POINTER, POINTER, I64])
        with e.b.if_then(e.b.icmp_signed("<=", size, e.load(capacity, I64))):
            e.b.ret(OK)
        fresh = e.stack(POINTER)
        code = e.call("posix_memalign", I32, fresh, i64(64), size)
        fail_if(e, e.b.icmp_signed("!=", code, i32(0)), "NO_MEMORY")
        e.call("free", VOID, e.load(place, POINTER))
        e.store(e.load(fresh, POINTER), place)
        e.store(size, capacity)
        e.b.ret(OK)

    def _define_reserve(self, variant: str) -> None:
        """i32 reserve_VARIANT(handle): arena and scratch for the shape in the handle's symbols."""
        e, handle, frame = self.framed(f"reserve_{variant}", variant)
        arena = frame.dim(self.interface.programs[variant].arena_bytes)
        scratch = e.b.mul(frame.dim(self.interface.scratch[variant]),
                          self.get(e, handle, "workers"))
        for name, size in (("arena", arena), ("scratch", scratch)):
            pass_on(e, self.call(e, "grow", self.field(e, handle, name),
                                  self.field(e, handle, f"{name}_bytes"), size))
        e.b.ret(OK)

    def _define_states(self) -> None:
        """i32 states(handle): one allocation for the pools of all states; pool_pages is known."""
        e, handle, frame = self.framed("states", self.interface.variants()[0])
        states = self.interface.program.with_role("state")
        strides: list[Dim] = [ceildiv(state.bytes(), 64) * 64 for state in states]
        total: Dim = 0
        for state, stride in zip(states, strides, strict=True):
            total = total + stride * state.count
        if states:
            code = e.call("posix_memalign", I32, self.field(e, handle, "pool"), i64(64),
                          frame.dim(total))
            fail_if(e, e.b.icmp_signed("!=", code, i32(0)), "NO_MEMORY")
        address, slot = self.get(e, handle, "pool"), 0
        for state, stride in zip(states, strides, strict=True):
            for _ in range(state.count):
                e.store(address, e.offset(handle, self.layout.tables["states"] + 8 * slot))
                address, slot = e.b.add(address, frame.dim(stride)), slot + 1
        e.b.ret(OK)

    # ---- create, destroy --------------------------------------------------------------------

    def _define_create(self) -> None:
        e, (packed, size, options, out) = self.define(
            "create", I32, [POINTER, I64, POINTER, POINTER], exported=True)
        fail_if(e, is_null(e, out), "BAD_ARGUMENT")
        e.store(NULL, out)
        fail_if(e, e.b.not_(emit_check(e, self.target)), "BAD_CPU")
        if self.interface.weight_bytes:
            fail_if(e, is_null(e, packed), "BAD_ARGUMENT")
        unaligned = e.b.and_(e.b.ptrtoint(packed, I64), i64(63))
        wrong = e.b.icmp_signed("!=", size, i64(self.interface.weight_bytes))
        fail_if(e, e.b.or_(wrong, e.b.icmp_signed("!=", unaligned, i64(0))), "BAD_WEIGHTS")
        fail_if(e, self._is_foreign(e, packed), "BAD_WEIGHTS")
        handle = e.call("calloc", POINTER, i64(1), i64(self.layout.bytes))
        fail_if(e, is_null(e, handle), "NO_MEMORY")
        code = self.call(e, "fill", handle, packed, options)
        with e.b.if_then(e.b.icmp_signed("!=", code, OK), likely=False):
            e.call(self.interface.prefix + "destroy", VOID, handle)
            e.b.ret(code)
        e.store(handle, out)
        e.b.ret(OK)

    def _is_foreign(self, e: Emitter, packed: ir.Value) -> ir.Value:
        """Whether the packed bytes have another fingerprint."""
        count, stride = samples(self.interface.weight_bytes)
        start = ir.Constant(I64, FINGERPRINT_START)
        with e.fold(0, count, [start], name="sample") as (index, (value,), finish):
            word = e.load(e.offset(packed, e.b.mul(index, i64(stride))), I64)
            finish([e.b.mul(e.b.xor(value, word), i64(FINGERPRINT_FACTOR))])
        expected = ir.Constant(I64, self.interface.fingerprint)
        return e.b.icmp_unsigned("!=", finish.results[0], expected)

    def _define_fill(self) -> None:
        """i32 fill(handle, packed, options): everything in a zeroed handle."""
        e, (handle, packed, options) = self.define("fill", I32, [POINTER, POINTER, POINTER])
        self._read_options(e, handle, options)
        for name, place in self.layout.tables.items():
            self.put(e, handle, name, e.offset(handle, place))
        self.put(e, handle, "cancel", self.field(e, handle, "cancel_word"))
        self._fill_weights(e, handle, packed)
        pass_on(e, self.call(e, "states", handle))
        workers = self.get(e, handle, "workers")
        with e.b.if_then(e.b.icmp_signed(">", workers, i64(1))):
            crew = e.call(local_name(team.CREATE), POINTER, workers)
            fail_if(e, is_null(e, crew), "NO_MEMORY")
            self.put(e, handle, "team", crew)
        if self.interface.has_steps:
            self._reserve_largest(e, handle)
            self._fill_feed(e, handle)
        e.b.ret(OK)

    def _read_options(self, e: Emitter, handle: ir.Value, options: ir.Value) -> None:
        given = e.stack(I64, len(self.interface.options))
        for i in range(len(self.interface.options)):
            e.store(i64(0), e.offset(given, 8 * i))
        with e.b.if_then(e.b.not_(is_null(e, options))):
            for i in range(len(self.interface.options)):
                e.store(e.load(e.offset(options, 8 * i), I64), e.offset(given, 8 * i))

        def option(index: int, default: ir.Value, most: int) -> ir.Value:
            value = e.load(e.offset(given, 8 * index), I64)
            fail_if(e, outside(e, value, i64(most + 1)), "BAD_OPTION")
            return e.b.select(e.b.icmp_signed("==", value, i64(0)), default, value)

        cpus = team.available_cpus(e) if "linux" in self.target.triple else i64(1)
        self.put(e, handle, "workers", option(0, e.maximum(cpus, i64(1)), MOST_THREADS))
        if self.interface.has_steps:
            limit, most = self.interface.max_context, self.interface.limit("tokens", 1 << 31)
            context = option(1, i64(limit), limit)
            sequences = option(2, i64(1), self.interface.limit("sequences", MOST_SEQUENCES))
            self.put(e, handle, "max_tokens", option(3, i64(min(DEFAULT_TOKENS, most)), most))
            self._size_pools(e, handle, context, sequences)

    def _size_pools(self, e: Emitter, handle: ir.Value, context: ir.Value, sequences: ir.Value
                    ) -> None:
        width = e.ceildiv(context, i64(PAGE))
        pages = e.b.mul(width, sequences)
        most = i64(self.interface.limit("pool_pages", (1 << 31) - 1))
        fail_if(e, e.b.icmp_signed(">", pages, most), "BAD_OPTION")
        for name, value in (("max_context", context), ("max_sequences", sequences),
                            ("width", width), ("pages", pages)):
            self.put(e, handle, name, value)
        self.put_symbol(e, handle, "pool_pages", pages)

    def _fill_weights(self, e: Emitter, handle: ir.Value, packed: ir.Value) -> None:
        offsets = self.interface.weight_offsets
        values = ir.Constant(ir.ArrayType(I64, len(offsets)), list(offsets))
        table = ir.GlobalVariable(self.module, values.type, local_name("weight_offsets"))
        table.linkage, table.global_constant, table.initializer = "internal", True, values
        start = e.offset(handle, self.layout.tables["weights"])
        with e.loop(0, len(offsets), name="weight") as index:
            offset = e.load(e.b.gep(table, [i64(0), index]), I64)
            e.store(e.offset(packed, offset), e.offset(start, index, POINTER))

    def _reserve_largest(self, e: Emitter, handle: ir.Value) -> None:
        """Memory for the largest step, so that none is short of it later."""
        tokens = self.get(e, handle, "max_tokens")
        sequences = e.minimum(tokens, self.get(e, handle, "max_sequences"))
        for name, value in (("tokens", tokens), ("sequences", sequences), ("rows", tokens),
                            ("table_width", self.get(e, handle, "width"))):
            self.put_symbol(e, handle, name, value)
        for variant in self.interface.variants():
            with e.b.if_then(self.covers(e, handle, variant)):
                pass_on(e, self.call(e, f"reserve_{variant}", handle))

    def _fill_feed(self, e: Emitter, handle: ir.Value) -> None:
        """What feed hands to step besides the ids: page numbers 0, 1, 2 ..., the sequence of
        every token (0), and room for positions."""
        width, tokens = self.get(e, handle, "width"), self.get(e, handle, "max_tokens")
        count = e.b.add(width, e.b.mul(tokens, i64(2)))
        memory = e.call("calloc", POINTER, count, i64(4))
        fail_if(e, is_null(e, memory), "NO_MEMORY")
        self.put(e, handle, "feed", memory)
        with e.loop(0, width, name="page") as page:
            e.store(e.b.trunc(page, I32), e.offset(memory, page, I32))

    def _define_destroy(self) -> None:
        e, (handle,) = self.define("destroy", VOID, [POINTER], exported=True)
        with e.b.if_then(is_null(e, handle)):
            e.b.ret_void()
        crew = self.get(e, handle, "team", POINTER)
        with e.b.if_then(e.b.not_(is_null(e, crew))):
            e.call(local_name(team.DESTROY), VOID, crew)
        for name in ("arena", "scratch", "pool", "feed"):
            e.call("free", VOID, self.get(e, handle, name, POINTER))
        e.call("free", VOID, handle)
        e.b.ret_void()
