"""What C calls, as LLVM IR.

    i32 create(packed, i64 bytes, options, handle *out)     void destroy(handle)
    i32 step(handle, batch, logits)                         a language model: packed sequences
    i32 feed(handle, ids, i64 count, i64 position, logits)  one sequence, in the pages 0, 1, 2 ...
    i32 run(handle, shape, inputs, outputs)                 any other model
    ptr error(i32 code)

A handle begins with the step's arguments, which point into the handle itself (see `Handle`), so a
call fills in tables and passes the handle on. All checks come first: a refused call changes nothing.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.host import driver, team
from llmc.codegen.host.abi_checks import NULL, Checks, fail_if, is_null, outside, pass_on
from llmc.codegen.host.abi_cpu import emit_check
from llmc.codegen.host.abi_interface import (
    BATCH,
    BATCH_SIZES,
    CODES,
    DEFAULT_TOKENS,
    MOST_SEQUENCES,
    MOST_THREADS,
    NUMBERS,
    Handle,
    Interface,
    local_name,
)
from llmc.codegen.host.frame import StageFrame
from llmc.codegen.llvm import I1, I8, I32, I64, POINTER, VOID, Emitter, define, i32, i64
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, ceildiv
from llmc.ir.ops import PAGE

_OK = i32(NUMBERS["OK"])
_PLAIN_CPU = {"x86_64": "x86-64", "aarch64": "generic"}


class Functions:
    """Emits the interface into a module in which the variants' functions are only declared."""

    def __init__(self, module: ir.Module, interface: Interface, target: Target):
        self.module = module
        self.interface = interface
        self.target = target
        self.handle = Handle(interface)

    def emit(self) -> None:
        self._define_grow()
        for variant in self.interface.variants():
            self._define_reserve(variant)
        self._define_launch()
        self._define_destroy()
        self._define_states()
        self._define_fill()
        self._define_create()
        if self.interface.has_steps:
            self._define_check()
            self._define_step()
            self._define_feed()
        else:
            self._define_run()
        self._define_error()

    # ---- short forms ------------------------------------------------------------------------

    def _define(self, name: str, result: ir.Type, arguments: list[ir.Type], exported: bool = False
                ) -> tuple[Emitter, tuple[ir.Value, ...]]:
        """A function for the plainest CPU: it runs before the CPU is known to be fit."""
        name = self.interface.prefix + name if exported else local_name(name)
        function, e = define(self.module, name, result, arguments, internal=not exported)
        cpu = _PLAIN_CPU[self.target.processor]
        for attribute in (f'"target-cpu"="{cpu}"', '"target-features"=""'):
            set.add(function.attributes, attribute)  # llvmlite knows no string attributes
        return e, function.args

    def _call(self, e: Emitter, name: str, *arguments: ir.Value) -> ir.Value:
        return e.b.call(self.module.get_global(local_name(name)), arguments)

    def _field(self, e: Emitter, handle: ir.Value, name: str) -> ir.Value:
        return e.offset(handle, self.handle.fields[name])

    def _get(self, e: Emitter, handle: ir.Value, name: str, type_: ir.Type = I64) -> ir.Value:
        return e.load(self._field(e, handle, name), type_)

    def _put(self, e: Emitter, handle: ir.Value, name: str, value: ir.Value) -> None:
        e.store(value, self._field(e, handle, name))

    def _put_symbol(self, e: Emitter, handle: ir.Value, name: str, value: ir.Value) -> None:
        if name in self.handle.symbols:
            e.store(value, e.offset(handle, self.handle.symbols[name]))

    def _framed(self, name: str, variant: str) -> tuple[Emitter, ir.Value, StageFrame]:
        """A function `i32 name(handle)` that may ask for dims of a variant's program."""
        entry, (handle,) = self._define(name, I32, [POINTER])
        body = entry.b.append_basic_block("body")
        entry.b.branch(body)
        e = Emitter(ir.IRBuilder(body))
        return e, handle, StageFrame(self.interface.programs[variant], e, handle, i64(0))

    # ---- memory -----------------------------------------------------------------------------

    def _define_grow(self) -> None:
        """i32 grow(ptr place, ptr capacity, i64 size): at least so many bytes, 64-aligned."""
        e, (place, capacity, size) = self._define("grow", I32, [POINTER, POINTER, I64])
        with e.b.if_then(e.b.icmp_signed("<=", size, e.load(capacity, I64))):
            e.b.ret(_OK)
        fresh = e.stack(POINTER)
        code = e.call("posix_memalign", I32, fresh, i64(64), size)
        fail_if(e, e.b.icmp_signed("!=", code, i32(0)), "NO_MEMORY")
        e.call("free", VOID, e.load(place, POINTER))
        e.store(e.load(fresh, POINTER), place)
        e.store(size, capacity)
        e.b.ret(_OK)

    def _define_reserve(self, variant: str) -> None:
        """i32 reserve_VARIANT(handle): arena and scratch for the shape in the handle's symbols."""
        e, handle, frame = self._framed(f"reserve_{variant}", variant)
        arena = frame.dim(self.interface.programs[variant].arena_bytes)
        scratch = e.b.mul(frame.dim(self.interface.scratch[variant]),
                          self._get(e, handle, "workers"))
        for name, size in (("arena", arena), ("scratch", scratch)):
            pass_on(e, self._call(e, "grow", self._field(e, handle, name),
                                  self._field(e, handle, f"{name}_bytes"), size))
        e.b.ret(_OK)

    def _define_states(self) -> None:
        """i32 states(handle): one allocation for the pools of all states; pool_pages is known."""
        e, handle, frame = self._framed("states", self.interface.variants()[0])
        states = self.interface.program.with_role("state")
        strides: list[Dim] = [ceildiv(state.bytes(), 64) * 64 for state in states]
        total: Dim = 0
        for state, stride in zip(states, strides, strict=True):
            total = total + stride * state.count
        if states:
            code = e.call("posix_memalign", I32, self._field(e, handle, "pool"), i64(64),
                          frame.dim(total))
            fail_if(e, e.b.icmp_signed("!=", code, i32(0)), "NO_MEMORY")
        address, slot = self._get(e, handle, "pool"), 0
        for state, stride in zip(states, strides, strict=True):
            for _ in range(state.count):
                e.store(address, e.offset(handle, self.handle.tables["states"] + 8 * slot))
                address, slot = e.b.add(address, frame.dim(stride)), slot + 1
        e.b.ret(_OK)

    # ---- running ----------------------------------------------------------------------------

    def _define_launch(self) -> None:
        """i32 launch(handle): the narrowest variant that covers the symbols; tables are filled."""
        e, (handle,) = self._define("launch", I32, [POINTER])
        for variant in self.interface.variants():
            with e.b.if_then(self._covers(e, handle, variant)):
                pass_on(e, self._call(e, f"reserve_{variant}", handle))
                e.b.ret(e.call(local_name(driver.STEP, variant), I32, handle))
        e.b.ret(i32(NUMBERS["BAD_SIZE"]))

    def _covers(self, e: Emitter, handle: ir.Value, variant: str) -> ir.Value:
        covered: ir.Value = ir.Constant(I1, 1)
        for name, low, high in self.interface.programs[variant].symbols:
            value = e.load(e.offset(handle, self.handle.symbols[name]), I64)
            above = e.b.icmp_signed(">=", value, i64(low))
            below = e.b.icmp_signed("<=", value, i64(high))
            covered = e.b.and_(covered, e.b.and_(above, below))
        return covered

    # ---- create, destroy --------------------------------------------------------------------

    def _define_create(self) -> None:
        e, (packed, size, options, out) = self._define(
            "create", I32, [POINTER, I64, POINTER, POINTER], exported=True)
        fail_if(e, is_null(e, out), "BAD_ARGUMENT")
        e.store(NULL, out)
        fail_if(e, e.b.not_(emit_check(e, self.target)), "BAD_CPU")
        if self.interface.weight_bytes:
            fail_if(e, is_null(e, packed), "BAD_ARGUMENT")
        unaligned = e.b.and_(e.b.ptrtoint(packed, I64), i64(63))
        wrong = e.b.icmp_signed("!=", size, i64(self.interface.weight_bytes))
        fail_if(e, e.b.or_(wrong, e.b.icmp_signed("!=", unaligned, i64(0))), "BAD_WEIGHTS")
        handle = e.call("calloc", POINTER, i64(1), i64(self.handle.bytes))
        fail_if(e, is_null(e, handle), "NO_MEMORY")
        code = self._call(e, "fill", handle, packed, options)
        with e.b.if_then(e.b.icmp_signed("!=", code, _OK), likely=False):
            e.call(self.interface.prefix + "destroy", VOID, handle)
            e.b.ret(code)
        e.store(handle, out)
        e.b.ret(_OK)

    def _define_fill(self) -> None:
        """i32 fill(handle, packed, options): everything in a zeroed handle."""
        e, (handle, packed, options) = self._define("fill", I32, [POINTER, POINTER, POINTER])
        self._read_options(e, handle, options)
        for name, place in self.handle.tables.items():
            self._put(e, handle, name, e.offset(handle, place))
        self._put(e, handle, "cancel", self._field(e, handle, "cancel_word"))
        self._fill_weights(e, handle, packed)
        pass_on(e, self._call(e, "states", handle))
        workers = self._get(e, handle, "workers")
        with e.b.if_then(e.b.icmp_signed(">", workers, i64(1))):
            crew = e.call(local_name(team.CREATE), POINTER, workers)
            fail_if(e, is_null(e, crew), "NO_MEMORY")
            self._put(e, handle, "team", crew)
        if self.interface.has_steps:
            self._reserve_largest(e, handle)
            self._fill_feed(e, handle)
        e.b.ret(_OK)

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
        self._put(e, handle, "workers", option(0, e.maximum(cpus, i64(1)), MOST_THREADS))
        if self.interface.has_steps:
            limit, most = self.interface.max_context, self.interface.limit("tokens", 1 << 31)
            context = option(1, i64(limit), limit)
            sequences = option(2, i64(1), self.interface.limit("sequences", MOST_SEQUENCES))
            self._put(e, handle, "max_tokens", option(3, i64(min(DEFAULT_TOKENS, most)), most))
            self._size_pools(e, handle, context, sequences)

    def _size_pools(self, e: Emitter, handle: ir.Value, context: ir.Value, sequences: ir.Value
                    ) -> None:
        width = e.ceildiv(context, i64(PAGE))
        pages = e.b.mul(width, sequences)
        too_many = e.b.icmp_signed(">", pages, i64(self.interface.limit("pool_pages", (1 << 31) - 1)))
        fail_if(e, too_many, "BAD_OPTION")
        for name, value in (("max_context", context), ("max_sequences", sequences),
                            ("width", width), ("pages", pages)):
            self._put(e, handle, name, value)
        self._put_symbol(e, handle, "pool_pages", pages)

    def _fill_weights(self, e: Emitter, handle: ir.Value, packed: ir.Value) -> None:
        offsets = self.interface.weight_offsets
        values = ir.Constant(ir.ArrayType(I64, len(offsets)), list(offsets))
        table = ir.GlobalVariable(self.module, values.type, local_name("weight_offsets"))
        table.linkage, table.global_constant, table.initializer = "internal", True, values
        start = e.offset(handle, self.handle.tables["weights"])
        with e.loop(0, len(offsets), name="weight") as index:
            offset = e.load(e.b.gep(table, [i64(0), index]), I64)
            e.store(e.offset(packed, offset), e.offset(start, index, POINTER))

    def _reserve_largest(self, e: Emitter, handle: ir.Value) -> None:
        """Memory for the largest step, so that none is short of it later."""
        tokens = self._get(e, handle, "max_tokens")
        sequences = e.minimum(tokens, self._get(e, handle, "max_sequences"))
        for name, value in (("tokens", tokens), ("sequences", sequences), ("rows", tokens),
                            ("table_width", self._get(e, handle, "width"))):
            self._put_symbol(e, handle, name, value)
        for variant in self.interface.variants():
            with e.b.if_then(self._covers(e, handle, variant)):
                pass_on(e, self._call(e, f"reserve_{variant}", handle))

    def _fill_feed(self, e: Emitter, handle: ir.Value) -> None:
        """What feed hands to step besides the ids: page numbers 0, 1, 2 ... of the one sequence, its
        number 0 for every token, and room for positions."""
        width, tokens = self._get(e, handle, "width"), self._get(e, handle, "max_tokens")
        count = e.b.add(width, e.b.mul(tokens, i64(2)))
        memory = e.call("calloc", POINTER, count, i64(4))
        fail_if(e, is_null(e, memory), "NO_MEMORY")
        self._put(e, handle, "feed", memory)
        with e.loop(0, width, name="page") as page:
            e.store(e.b.trunc(page, I32), e.offset(memory, page, I32))

    def _define_destroy(self) -> None:
        e, (handle,) = self._define("destroy", VOID, [POINTER], exported=True)
        with e.b.if_then(is_null(e, handle)):
            e.b.ret_void()
        crew = self._get(e, handle, "team", POINTER)
        with e.b.if_then(e.b.not_(is_null(e, crew))):
            e.call(local_name(team.DESTROY), VOID, crew)
        for name in ("arena", "scratch", "pool", "feed"):
            e.call("free", VOID, self._get(e, handle, name, POINTER))
        e.call("free", VOID, handle)
        e.b.ret_void()

    # ---- a language model's steps -----------------------------------------------------------

    def _define_check(self) -> None:
        e, (handle, batch, logits) = self._define("check", I32, [POINTER] * 3)
        Checks(e, self.interface, handle, batch).emit(logits)
        e.b.ret(_OK)

    def _define_step(self) -> None:
        e, (handle, batch, logits) = self._define("step", I32, [POINTER] * 3, exported=True)
        fail_if(e, e.b.or_(is_null(e, handle), is_null(e, batch)), "BAD_ARGUMENT")
        pass_on(e, self._call(e, "check", handle, batch, logits))
        for name in BATCH_SIZES:
            self._put_symbol(e, handle, name, e.load(e.offset(batch, BATCH[name]), I64))
        for slot, buffer in enumerate(self.interface.program.with_role("input")):
            name = "wanted_rows" if buffer.name == "rows" else buffer.name
            e.store(e.load(e.offset(batch, BATCH[name]), POINTER),
                    e.offset(handle, self.handle.tables["inputs"] + 8 * slot))
        e.store(logits, e.offset(handle, self.handle.tables["outputs"]))
        e.b.ret(self._call(e, "launch", handle))

    def _define_feed(self) -> None:
        e, (handle, ids, count, position, logits) = self._define(
            "feed", I32, [POINTER, POINTER, I64, I64, POINTER], exported=True)
        missing = e.b.or_(is_null(e, handle), e.b.or_(is_null(e, ids), is_null(e, logits)))
        fail_if(e, missing, "BAD_ARGUMENT")
        context, most = (self._get(e, handle, name) for name in ("max_context", "max_tokens"))
        fail_if(e, outside(e, e.b.sub(count, i64(1)), context), "BAD_SIZE")
        room = e.b.add(e.b.sub(context, count), i64(1))
        fail_if(e, outside(e, position, room), "BAD_POSITION")
        batch = self._one_sequence(e, handle)
        with e.loop(0, count, most, name="chunk") as start:
            tokens = e.minimum(most, e.b.sub(count, start))
            self._fill_chunk(e, batch, tokens, e.b.add(position, start))
            e.store(e.offset(ids, start, I32), e.offset(batch, BATCH["ids"]))
            last = e.b.icmp_signed("==", e.b.add(start, tokens), count)
            e.store(e.b.zext(last, I64), e.offset(batch, BATCH["rows"]))
            pass_on(e, e.call(self.interface.prefix + "step", I32, handle, batch, logits))
        e.b.ret(_OK)

    def _one_sequence(self, e: Emitter, handle: ir.Value) -> ir.Value:
        """A batch on the stack; what stays the same from chunk to chunk is filled in."""
        batch, small = e.stack(I64, len(BATCH)), e.stack(I32, 3)
        width = self._get(e, handle, "width")
        table = self._get(e, handle, "feed", POINTER)
        sequence = e.offset(table, width, I32)
        e.store(i32(0), small)
        values = {"sequences": i64(1), "table_width": width, "page_table": table,
                  "sequence": sequence, "offsets": small, "wanted_rows": e.offset(small, 8),
                  "positions": e.offset(sequence, self._get(e, handle, "max_tokens"), I32)}
        for name, value in values.items():
            e.store(value, e.offset(batch, BATCH[name]))
        return batch

    def _fill_chunk(self, e: Emitter, batch: ir.Value, tokens: ir.Value, position: ir.Value) -> None:
        e.store(tokens, e.offset(batch, BATCH["tokens"]))
        offsets = e.load(e.offset(batch, BATCH["offsets"]), POINTER)
        short = e.b.trunc(tokens, I32)
        e.store(short, e.offset(offsets, 4))
        e.store(e.b.sub(short, i32(1)), e.offset(offsets, 8))  # the wanted row
        positions = e.load(e.offset(batch, BATCH["positions"]), POINTER)
        with e.loop(0, tokens, name="token") as token:
            value = e.b.trunc(e.b.add(position, token), I32)
            e.store(value, e.offset(positions, token, I32))

    # ---- any other model --------------------------------------------------------------------

    def _define_run(self) -> None:
        e, (handle, shape, inputs, outputs) = self._define(
            "run", I32, [POINTER] * 4, exported=True)
        missing = is_null(e, handle)
        needed = [inputs, outputs, shape] if self.interface.symbols else [inputs, outputs]
        for pointer in needed:
            missing = e.b.or_(missing, is_null(e, pointer))
        fail_if(e, missing, "BAD_ARGUMENT")
        multiples = self.interface.multiples()
        for index, name in enumerate(self.interface.symbols):
            value = e.load(e.offset(shape, 8 * index), I64)
            if name in multiples:
                rest = e.b.srem(value, i64(multiples[name]))
                fail_if(e, e.b.icmp_signed("!=", rest, i64(0)), "BAD_SIZE")
            self._put_symbol(e, handle, name, value)
        self._put(e, handle, "inputs", inputs)
        self._put(e, handle, "outputs", outputs)
        e.b.ret(self._call(e, "launch", handle))

    # ---- error texts ------------------------------------------------------------------------

    def _define_error(self) -> None:
        e, (code,) = self._define("error", POINTER, [I32], exported=True)
        unknown = e.b.append_basic_block("unknown")
        switch = e.b.switch(code, unknown)
        for name, text in CODES.items():
            block = e.b.append_basic_block(name)
            switch.add_case(i32(NUMBERS[name]), block)
            e.b.position_at_end(block)
            e.b.ret(self._text(e, name, text))
        e.b.position_at_end(unknown)
        e.b.ret(self._text(e, "UNKNOWN", "unknown code"))

    def _text(self, e: Emitter, name: str, text: str) -> ir.Value:
        data = bytearray(text.encode() + b"\0")
        value = ir.Constant(ir.ArrayType(I8, len(data)), data)
        variable = ir.GlobalVariable(self.module, value.type, local_name(f"text_{name}"))
        variable.linkage, variable.global_constant = "internal", True
        variable.initializer = value
        return e.b.bitcast(variable, POINTER)
