"""What runs a model: step, feed or run; and the texts of codes.

All checks come before anything is written: a call that is refused changes nothing.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.host import driver
from llmc.codegen.host.abi_checks import OK, Checks, fail_if, is_null, outside, pass_on
from llmc.codegen.host.abi_functions import Functions
from llmc.codegen.host.abi_interface import BATCH, BATCH_SIZES, CODES, NUMBERS, local_name
from llmc.codegen.llvm import I8, I32, I64, POINTER, Emitter, i32, i64


class Call(Functions):
    """i32 step(handle, batch, logits)                         packed sequences
    i32 feed(handle, ids, i64 count, i64 position, logits)  one sequence, in the pages 0, 1, 2 ...
    i32 run(handle, shape, inputs, outputs)                 a model that is no language model
    ptr error(i32 code)"""

    def emit(self) -> None:
        self._define_launch()
        if self.interface.has_steps:
            self._define_check()
            self._define_step()
            self._define_feed()
        else:
            self._define_run()
        self._define_error()

    # ---- running ----------------------------------------------------------------------------

    def _define_launch(self) -> None:
        """i32 launch(handle): the narrowest variant that covers the symbols; tables are filled."""
        e, (handle,) = self.define("launch", I32, [POINTER])
        for variant in self.interface.variants():
            with e.b.if_then(self.covers(e, handle, variant)):
                pass_on(e, self.call(e, f"reserve_{variant}", handle))
                e.b.ret(e.call(local_name(driver.STEP, variant), I32, handle))
        e.b.ret(i32(NUMBERS["BAD_SIZE"]))

    # ---- a language model's steps -----------------------------------------------------------

    def _define_check(self) -> None:
        e, (handle, batch, logits) = self.define("check", I32, [POINTER] * 3)
        Checks(e, self.interface, handle, batch).emit(logits)
        e.b.ret(OK)

    def _define_step(self) -> None:
        e, (handle, batch, logits) = self.define("step", I32, [POINTER] * 3, exported=True)
        fail_if(e, e.b.or_(is_null(e, handle), is_null(e, batch)), "BAD_ARGUMENT")
        pass_on(e, self.call(e, "check", handle, batch, logits))
        for name in BATCH_SIZES:
            self.put_symbol(e, handle, name, e.load(e.offset(batch, BATCH[name]), I64))
        for slot, buffer in enumerate(self.interface.program.with_role("input")):
            name = "wanted_rows" if buffer.name == "rows" else buffer.name
            e.store(e.load(e.offset(batch, BATCH[name]), POINTER),
                    e.offset(handle, self.layout.tables["inputs"] + 8 * slot))
        e.store(logits, e.offset(handle, self.layout.tables["outputs"]))
        e.b.ret(self.call(e, "launch", handle))

    def _define_feed(self) -> None:
        e, (handle, ids, count, position, logits) = self.define(
            "feed", I32, [POINTER, POINTER, I64, I64, POINTER], exported=True)
        missing = e.b.or_(is_null(e, handle), e.b.or_(is_null(e, ids), is_null(e, logits)))
        fail_if(e, missing, "BAD_ARGUMENT")
        context, most = (self.get(e, handle, name) for name in ("max_context", "max_tokens"))
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
        e.b.ret(OK)

    def _one_sequence(self, e: Emitter, handle: ir.Value) -> ir.Value:
        """A batch on the stack; what stays the same from chunk to chunk is filled in."""
        batch, small = e.stack(I64, len(BATCH)), e.stack(I32, 3)
        width = self.get(e, handle, "width")
        table = self.get(e, handle, "feed", POINTER)
        sequence = e.offset(table, width, I32)
        e.store(i32(0), small)
        values = {"sequences": i64(1), "table_width": width, "page_table": table,
                  "sequence": sequence, "offsets": small, "wanted_rows": e.offset(small, 8),
                  "positions": e.offset(sequence, self.get(e, handle, "max_tokens"), I32)}
        for name, value in values.items():
            e.store(value, e.offset(batch, BATCH[name]))
        return batch

    def _fill_chunk(self, e: Emitter, batch: ir.Value, tokens: ir.Value, position: ir.Value
                    ) -> None:
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
        e, (handle, shape, inputs, outputs) = self.define(
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
            self.put_symbol(e, handle, name, value)
        self.put(e, handle, "inputs", inputs)
        self.put(e, handle, "outputs", outputs)
        e.b.ret(self.call(e, "launch", handle))

    # ---- error texts ------------------------------------------------------------------------

    def _define_error(self) -> None:
        e, (code,) = self.define("error", POINTER, [I32], exported=True)
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
