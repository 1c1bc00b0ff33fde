"""Checks of a batch that C hands in: kernels trust their inputs, so nothing wrong may reach them.

Emitted as `i32 check(handle, batch, logits)`: OK or the code of the first thing that is wrong.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.host.abi_interface import BATCH, BATCH_ARRAYS, NUMBERS, Handle, Interface
from llmc.codegen.llvm import I1, I32, I64, POINTER, Emitter, i32, i64
from llmc.ir.ops import PAGE

NULL = ir.Constant(POINTER, None)
OK = i32(NUMBERS["OK"])


def fail_if(e: Emitter, condition: ir.Value, code: str) -> None:
    """Return the code from the function where the condition holds."""
    with e.b.if_then(condition, likely=False):
        e.b.ret(i32(NUMBERS[code]))


def pass_on(e: Emitter, code: ir.Value) -> None:
    """Return a callee's code unless it is OK."""
    with e.b.if_then(e.b.icmp_signed("!=", code, OK), likely=False):
        e.b.ret(code)


def is_null(e: Emitter, pointer: ir.Value) -> ir.Value:
    return e.b.icmp_unsigned("==", e.b.ptrtoint(pointer, I64), i64(0))


def outside(e: Emitter, value: ir.Value, limit: ir.Value) -> ir.Value:
    """Whether value < 0 or value >= limit."""
    return e.b.icmp_unsigned(">=", value, limit)


class Checks:
    """Emits the checks at the emitter's position, in a function that returns codes."""

    def __init__(self, e: Emitter, interface: Interface, handle: ir.Value, batch: ir.Value):
        self.e = e
        self.interface = interface
        self._handle, self._fields = handle, Handle(interface).fields
        self._batch = batch
        self.tokens, self.sequences, self.rows, self.width = (
            self._size(name) for name in ("tokens", "sequences", "rows", "table_width"))

    def emit(self, logits: ir.Value) -> None:
        self._check_sizes()
        self._check_pointers(logits)
        with self.e.loop(0, self.sequences, name="sequence") as sequence:
            self._check_sequence(sequence)
        with self.e.loop(0, self.tokens, name="token") as token:
            wrong = outside(self.e, self._value("ids", token), i64(self.interface.vocabulary))
            fail_if(self.e, wrong, "BAD_TOKEN")
        with self.e.loop(0, self.rows, name="row") as row:
            wrong = outside(self.e, self._value("wanted_rows", row), self.tokens)
            fail_if(self.e, wrong, "BAD_ROW")

    # ---- parts --------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        e, one = self.e, i64(1)
        for value, limit in ((self.tokens, "max_tokens"), (self.sequences, "max_sequences"),
                             (self.width, "width")):
            fail_if(e, outside(e, e.b.sub(value, one), self._field(limit)), "BAD_SIZE")
        fail_if(e, outside(e, self.rows, e.b.add(self.tokens, one)), "BAD_SIZE")

    def _check_pointers(self, logits: ir.Value) -> None:
        e = self.e
        missing: ir.Value = ir.Constant(I1, 0)
        for name in BATCH_ARRAYS[:-1]:
            missing = e.b.or_(missing, is_null(e, self._array(name)))
        fail_if(e, missing, "BAD_ARGUMENT")
        result = e.b.or_(is_null(e, logits), is_null(e, self._array("wanted_rows")))
        wanted = e.b.icmp_signed(">", self.rows, i64(0))
        fail_if(e, e.b.and_(wanted, result), "BAD_ARGUMENT")
        first = e.b.icmp_signed("!=", self._value("offsets", i64(0)), i64(0))
        last = e.b.icmp_signed("!=", self._value("offsets", self.sequences), self.tokens)
        fail_if(e, e.b.or_(first, last), "BAD_OFFSETS")

    def _check_sequence(self, sequence: ir.Value) -> None:
        e = self.e
        start = self._value("offsets", sequence)
        end = self._value("offsets", e.b.add(sequence, i64(1)))
        wrong = e.b.or_(e.b.icmp_signed(">=", start, end), e.b.icmp_signed(">", end, self.tokens))
        fail_if(e, wrong, "BAD_OFFSETS")
        position = self._value("positions", start)
        context = self._field("max_context")
        length = e.b.add(position, e.b.sub(end, start))
        wrong = e.b.or_(outside(e, position, context), e.b.icmp_signed(">", length, context))
        fail_if(e, wrong, "BAD_POSITION")
        with e.loop(start, end, name="token") as token:
            mine = e.b.icmp_signed("==", self._value("sequence", token), sequence)
            fail_if(e, e.b.not_(mine), "BAD_SEQUENCE")
            expected = e.b.add(position, e.b.sub(token, start))
            found = e.b.icmp_signed("==", self._value("positions", token), expected)
            fail_if(e, e.b.not_(found), "BAD_POSITION")
        self._check_pages(sequence, length)

    def _check_pages(self, sequence: ir.Value, length: ir.Value) -> None:
        """The pages that hold the sequence's tokens, old and new."""
        e = self.e
        pages = e.ceildiv(length, i64(PAGE))
        fail_if(e, e.b.icmp_signed(">", pages, self.width), "BAD_PAGE")
        row = e.b.mul(sequence, self.width)
        with e.loop(0, pages, name="page") as page:
            number = self._value("page_table", e.b.add(row, page))
            fail_if(e, outside(e, number, self._field("pages")), "BAD_PAGE")

    # ---- reading ------------------------------------------------------------------------------

    def _field(self, name: str) -> ir.Value:
        return self.e.load(self.e.offset(self._handle, self._fields[name]), I64)

    def _size(self, name: str) -> ir.Value:
        return self.e.load(self.e.offset(self._batch, BATCH[name]), I64)

    def _array(self, name: str) -> ir.Value:
        return self.e.load(self.e.offset(self._batch, BATCH[name]), POINTER)

    def _value(self, name: str, index: ir.Value) -> ir.Value:
        """An element of one of the arrays, as i64."""
        element = self.e.load(self.e.offset(self._array(name), index, I32), I32)
        return self.e.b.sext(element, I64)
