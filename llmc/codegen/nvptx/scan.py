"""Linear attention on a GPU: the state stays in registers while the tokens go by.

A block takes a sequence, a head and a slice of the state's columns. A thread holds some rows of one
column; the threads of a column are neighbours in a warp, which add up their parts by shuffles. The
operands of a few tokens at a time are widened into shared memory.

Floors: decode is bound by reading and writing the states; prefill by three operations for each
element of the state and token, one token after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir as ir

from llmc.codegen import math
from llmc.codegen.host.recurrent import LinearAttentionStage
from llmc.codegen.host.sequences import Part, recurrent_op, shared_heads
from llmc.codegen.llvm import F32, f32, i64, vector
from llmc.codegen.nvptx.conv import ConvKernel
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter, DeviceFrame
from llmc.ir.dims import Dim, maximum
from llmc.ir.graph import Node
from llmc.ir.ops_recurrent import is_delta
from llmc.ir.program import Program, Stage, unsupported

THREADS = 128
MOST_ROWS = 32  # of the state, in a thread's registers
QUAD = 4  # floats of a 16-byte access
MOST_SHARED = 40 << 10  # bytes

Change = Callable[[ir.Value], ir.Value] | None


def scan(stage: Stage, program: Program, target: object) -> LinearAttentionKernel | ConvKernel:
    """The kernel of a stage of kind "scan"."""
    node, _ = recurrent_op(stage, program)
    if node.op == "slot_conv":
        return ConvKernel(stage, program, target)
    return LinearAttentionKernel(stage, program, target)


class LinearAttentionKernel(LinearAttentionStage):
    """splits: threads of a column; rows: of a thread, some past the end where the keys' size is
    odd; width: columns of a block; tokens: taken at a time."""

    threads = THREADS
    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, lanes=1)
        self.splits = QUAD
        while self.splits < WARP and -(-self.size // self.splits) > MOST_ROWS:
            self.splits *= 2
        self.rows = -(-self.size // (self.splits * QUAD)) * QUAD
        if self.rows > MOST_ROWS:
            raise unsupported(stage, f"keys of {self.size} elements are too large")
        self.width = THREADS // self.splits
        self.slices = -(-self.columns // self.width)
        # Parts of a row that different threads read begin in different banks.
        self.row_stride = self.splits * (self.rows + QUAD)
        floats = self.row_stride * (1 + self.group + self.per_key) + self.width + 2
        self.tokens = max(1, min(16, MOST_SHARED // 4 // floats))

    def blocks(self) -> Dim:
        """Sequences times heads times slices."""
        return maximum(1, self.sequences.count * (self.heads * self.slices))

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """One slice of a head, for all tokens of a sequence."""
        part, head, piece = self.place(self.expression(e, frame), e.block, self.slices)
        exists = e.b.icmp_signed("<", e.block, e.b.mul(
            frame.dim(self.sequences.count), i64(self.heads * self.slices)))
        with e.b.if_then(e.b.and_(exists, e.b.icmp_signed("<", part.start, part.stop))):
            _Slice(self, e, frame, part, head, piece).emit()


class _Slice:
    """Emits the work of one block."""

    def __init__(self, kernel: LinearAttentionKernel, e: DeviceEmitter, frame: DeviceFrame,
                 part: Part, head: ir.Value, piece: ir.Value):
        self.kernel, self.e, self.frame, self.part, self.head = kernel, e, frame, part, head
        per_warp = WARP // kernel.splits
        lane, warp = e.b.and_(e.thread, i64(WARP - 1)), e.b.lshr(e.thread, i64(5))
        self.split = e.b.udiv(lane, i64(per_warp))
        self.own = e.b.add(e.b.mul(warp, i64(per_warp)), e.b.urem(lane, i64(per_warp)))
        self.first_column = e.b.mul(piece, i64(kernel.width))
        column = e.b.add(self.first_column, self.own)
        self.live = e.b.icmp_signed("<", column, i64(kernel.columns))
        self.column = e.minimum(column, i64(kernel.columns - 1))
        tokens, stride = kernel.tokens, kernel.row_stride
        self.keys = e.shared(F32, tokens * stride)
        self.queries = e.shared(F32, tokens * kernel.group * stride)
        self.values = e.shared(F32, tokens * kernel.width)
        self.decays = e.shared(F32, tokens * (stride if kernel.per_key else 1))
        self.betas = e.shared(F32, tokens)

    def emit(self) -> None:
        e, kernel = self.e, self.kernel
        state = self._load_state()
        with e.fold(self.part.start, self.part.stop, state, kernel.tokens, "chunk") as (
                first, state, finish):
            count = e.minimum(e.b.sub(self.part.stop, first), i64(kernel.tokens))
            e.barrier()
            self._load_tokens(first, count)
            e.barrier()
            with e.fold(0, count, state, name="token") as (token, state, finish_token):
                state = self._updated(token, state)
                if 0 in kernel.results:
                    self._store_result(first, token, state)
                finish_token(state)
            finish(finish_token.results)
        if 1 in kernel.results:
            self._store_state(finish.results)

    # ---- state ------------------------------------------------------------------------------

    def _row(self, number: int) -> ir.Value:
        """The row of the state that is this thread's number-th."""
        return self.e.b.add(self.e.b.mul(self.split, i64(self.kernel.rows)), i64(number))

    def _load_state(self) -> list[ir.Value]:
        e, kernel = self.e, self.kernel
        x = kernel.expression(e, self.frame)
        state = []
        for number in range(kernel.rows):
            row = self._row(number)
            place = [self.part.row, self.head, e.minimum(row, i64(kernel.size - 1)), self.column]
            value = x.value(kernel.state, place)
            known = e.b.icmp_signed("<", row, i64(kernel.size))
            if self.part.fresh is not None:
                known = e.b.and_(known, e.b.not_(self.part.fresh))
            state.append(e.b.select(known, value, f32(0.0)))
        return state

    def _store_state(self, state: list[ir.Value]) -> None:
        e, kernel = self.e, self.kernel
        for number, value in enumerate(state):
            row = self._row(number)
            wanted = e.b.and_(self.live, e.b.icmp_signed("<", row, i64(kernel.size)))
            with e.b.if_then(wanted):
                x = kernel.expression(e, self.frame)
                x.store(kernel.results[1],
                        [x.index(each) for each in (self.part.row, self.head, row, self.column)],
                        value)

    # ---- tokens -----------------------------------------------------------------------------

    def _load_tokens(self, first: ir.Value, count: ir.Value) -> None:
        """Operands of `count` tokens into shared memory, in f32."""
        kernel, e = self.kernel, self.e
        own = self._own_head()
        self._load_rows(first, count, kernel.key, self._key_head(), self.keys)
        for member in range(kernel.group):
            head = e.b.add(own, i64(member))
            self._load_rows(first, count, kernel.query, head, self.queries, kernel.group, member,
                            self._scaled)
        self._load_values(first, count)
        if kernel.per_key:
            assert kernel.decay is not None
            self._load_rows(first, count, kernel.decay, self.head, self.decays,
                            change=self._factor)
        elif kernel.decay is not None:
            self._load_numbers(first, count, kernel.decay, self.decays, self._factor)
        if kernel.beta is not None:
            self._load_numbers(first, count, kernel.beta, self.betas)

    def _key_head(self) -> ir.Value:
        x = self.kernel.expression(self.e, self.frame)
        return x.emit_index(shared_heads(self.kernel.heads, self.kernel.key_heads,
                                         x.index(self.head)))

    def _own_head(self) -> ir.Value:
        """The first of the query heads that read this head of the state."""
        kernel, x = self.kernel, self.kernel.expression(self.e, self.frame)
        head = x.index(self.head)
        return x.emit_index(head * kernel.group if kernel.group > 1 else shared_heads(
            kernel.heads, kernel.query_heads, head))

    def _value(self, node: Node, first: ir.Value, token: ir.Value, *rest: ir.Value) -> ir.Value:
        """An element of a token, by its number in the chunk, in f32."""
        kernel, x = self.kernel, self.kernel.expression(self.e, self.frame)
        place = kernel.sequences.token(x, self.part, x.index(self.e.b.add(first, token)))
        return x.value(node, [*place, *rest])

    def _factor(self, decay: ir.Value) -> ir.Value:
        """What the state is multiplied by."""
        return math.exp(self.e, decay)

    def _scaled(self, query: ir.Value) -> ir.Value:
        return self.e.b.fmul(query, f32(self.kernel.node["scale"]))

    def _load_rows(self, first: ir.Value, count: ir.Value, node: Node, head: ir.Value,
                   target: ir.Value, group: int = 1, member: int = 0, change: Change = None
                   ) -> None:
        """Rows of `size` elements in the parts that threads hold; zeros past the end."""
        e, kernel = self.e, self.kernel
        padded = kernel.splits * kernel.rows
        with e.loop(e.thread, e.b.mul(count, i64(padded)), THREADS, "element") as number:
            token, i = e.b.udiv(number, i64(padded)), e.b.urem(number, i64(padded))
            value = self._value(node, first, token, head, e.minimum(i, i64(kernel.size - 1)))
            value = change(value) if change else value
            value = e.b.select(e.b.icmp_signed("<", i, i64(kernel.size)), value, f32(0.0))
            row = e.b.add(e.b.mul(token, i64(group)), i64(member))
            part = e.b.mul(e.b.udiv(i, i64(kernel.rows)), i64(kernel.rows + QUAD))
            place = e.b.add(e.b.mul(row, i64(kernel.row_stride)),
                            e.b.add(part, e.b.urem(i, i64(kernel.rows))))
            e.store(value, e.offset(target, place, F32))

    def _load_values(self, first: ir.Value, count: ir.Value) -> None:
        e, kernel = self.e, self.kernel
        with e.loop(e.thread, e.b.mul(count, i64(kernel.width)), THREADS, "value") as number:
            token, i = e.b.udiv(number, i64(kernel.width)), e.b.urem(number, i64(kernel.width))
            column = e.minimum(e.b.add(self.first_column, i), i64(kernel.columns - 1))
            value = self._value(kernel.value, first, token, self.head, column)
            e.store(value, e.offset(self.values, number, F32))

    def _load_numbers(self, first: ir.Value, count: ir.Value, node: Node, target: ir.Value,
                      change: Change = None) -> None:
        with self.e.loop(self.e.thread, count, THREADS, "number") as token:
            value = self._value(node, first, token, self.head)
            value = change(value) if change else value
            self.e.store(value, self.e.offset(target, token, F32))

    # ---- the recurrence ---------------------------------------------------------------------

    def _part(self, base: ir.Value, row: ir.Value) -> list[ir.Value]:
        """This thread's elements of a row in shared memory."""
        e, kernel = self.e, self.kernel
        start = e.b.add(e.b.mul(row, i64(kernel.row_stride)),
                        e.b.mul(self.split, i64(kernel.rows + QUAD)))
        elements = []
        for number in range(0, kernel.rows, QUAD):
            place = e.offset(base, e.b.add(start, i64(number)), F32)
            quad = e.load(place, vector(F32, QUAD), 16)
            elements += [e.b.extract_element(quad, ir.Constant(ir.IntType(32), lane))
                         for lane in range(QUAD)]
        return elements

    def _number(self, base: ir.Value, index: ir.Value) -> ir.Value:
        return self.e.load(self.e.offset(base, index, F32), F32)

    def _across(self, parts: list[ir.Value]) -> ir.Value:
        """The sum of parts, and of those of all threads of the column."""
        e, kernel = self.e, self.kernel
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [e.b.fadd(a, b) for a, b in zip(parts[:half], parts[half:2 * half],
                                                    strict=True)] + parts[2 * half:]
        total, step = parts[0], WARP // kernel.splits
        while step < WARP:
            total = e.b.fadd(total, e.shuffle(total, step))
            step *= 2
        return total

    def _product(self, a: list[ir.Value], b: list[ir.Value]) -> ir.Value:
        """The sum of products over all rows of the column."""
        e, chains = self.e, QUAD
        sums = [e.b.fmul(a[i], b[i]) for i in range(chains)]
        for i in range(chains, len(a)):
            sums[i % chains] = e.fma(a[i], b[i], sums[i % chains])
        return self._across(sums)

    def _updated(self, token: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        """The state after a token."""
        e, kernel = self.e, self.kernel
        keys = self._part(self.keys, token)
        place = e.b.add(e.b.mul(token, i64(kernel.width)), self.own)
        value = self._number(self.values, place)
        if kernel.per_key:
            factors = self._part(self.decays, token)
            state = [e.b.fmul(each, by) for each, by in zip(state, factors, strict=True)]
        elif kernel.decay is not None:
            factor = self._number(self.decays, token)
            state = [e.b.fmul(each, factor) for each in state]
        if is_delta(kernel.node["rule"]):
            seen = self._product(state, keys)
            value = e.b.fmul(self._number(self.betas, token), e.b.fsub(value, seen))
        return [e.fma(key, value, each) for key, each in zip(keys, state, strict=True)]

    def _store_result(self, first: ir.Value, token: ir.Value, state: list[ir.Value]) -> None:
        e, kernel = self.e, self.kernel
        writes = e.b.and_(self.live, e.b.icmp_signed("==", self.split, i64(0)))
        for member in range(kernel.group):
            row = e.b.add(e.b.mul(token, i64(kernel.group)), i64(member))
            total = self._product(state, self._part(self.queries, row))
            with e.b.if_then(writes):
                x = kernel.expression(e, self.frame)
                place = kernel.sequences.token(x, self.part, x.index(e.b.add(first, token)))
                own = x.index(self.head) * kernel.group + member
                x.store(kernel.results[0], [*place, own, x.index(self.column)], total)
