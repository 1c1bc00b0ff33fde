"""Linear attention on the host, with the state in the first-level cache.

A tile is a sequence, a head and a slice of the state's columns (the values' elements), which do not
depend on each other. It takes 16 tokens at a time: their operands are widened to f32 once; then, by
blocks of rows of the state that stay in registers, every token updates the block and adds to its
result. The delta rules need the product of key and whole state first: they go token by token.

Floors: prefill is bound by three operations for each element of the state and token (decay, update,
product), which is a few per cent of the projections round it; decode by reading and writing the
states once.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir as ir

from llmc.codegen import math
from llmc.codegen.expr import Expression
from llmc.codegen.host.conv import ConvKernel
from llmc.codegen.host.kernel import Frame, Kernel, Worker
from llmc.codegen.host.recurrent import LinearAttentionStage
from llmc.codegen.host.sequences import Part, recurrent_op, shared_heads
from llmc.codegen.integers import Index
from llmc.codegen.llvm import F32, Emitter, i64, splat_constant, vector
from llmc.codegen.reductions import usable_lanes
from llmc.ir.dims import Dim
from llmc.ir.ops_recurrent import is_delta
from llmc.ir.program import Program, Stage

TOKENS = 16  # taken at a time
_UNROLL = 4  # rows of a step of the delta rules


def scan(stage: Stage, program: Program, target: object) -> Kernel:
    """The kernel of a stage of kind "scan"."""
    node, _ = recurrent_op(stage, program)
    if node.op == "slot_conv":
        return ConvKernel(stage, program, target)
    return LinearAttentionKernel(stage, program, target)


class LinearAttentionKernel(LinearAttentionStage):
    """vectors: of a row of a slice, `width` columns together; rows: of a block in registers."""

    def __init__(self, stage: Stage, program: Program, target: object):
        lanes = program.capabilities.vector_lanes
        super().__init__(stage, program, lanes)
        self.vectors = 2 if self.columns % (2 * lanes) == 0 else 1
        self.width = self.vectors * lanes
        self.slices = -(-self.columns // self.width)
        self.rows = 4 if lanes == 8 else 8  # AVX2 has 16 registers, others 32
        sizes = [self.size * self.width, TOKENS * self.size, TOKENS * self.group * self.size,
                 TOKENS * self.width, TOKENS * (self.size if self.per_key else 1), TOKENS,
                 TOKENS * self.group * self.width]
        self.places = [0]
        for size in sizes:
            self.places.append(self.places[-1] + -(-size // 16) * 64)
        self.scratch_bytes: int | Dim = self.places[-1]

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Sequences times heads times slices."""
        return e.b.mul(frame.dim(self.sequences.count), i64(self.heads * self.slices))

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing is shared by a worker's tiles."""

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """One slice of a head, for all tokens of a sequence."""
        part, head, piece = self.place(self.expression(e, frame), tile, self.slices)
        with e.b.if_then(e.b.icmp_signed("<", part.start, part.stop)):
            _Tile(self, e, frame, worker, part, head, piece).emit()


class _Tile:
    """Emits one tile. In scratch, all f32: state [size][width], keys [token][size], queries
    [token][group][size], values [token][width], decays [token] or [token][size], betas [token],
    sums [token][group][width]."""

    def __init__(self, kernel: LinearAttentionKernel, e: Emitter, frame: Frame, worker: Worker,
                 part: Part, head: ir.Value, piece: ir.Value):
        self.kernel, self.e, self.frame, self.part = kernel, e, frame, part
        self.head = head
        self.column = e.b.mul(piece, i64(kernel.width))
        (self.state, self.keys, self.queries, self.values, self.decays, self.betas, self.sums) = (
            e.offset(worker.scratch, place) for place in kernel.places[:-1])

    def emit(self) -> None:
        e, kernel = self.e, self.kernel
        self._load_state()
        with e.loop(self.part.start, self.part.stop, TOKENS, "chunk") as first:
            count = e.minimum(e.b.sub(self.part.stop, first), i64(TOKENS))
            self._load_tokens(first, count)
            if is_delta(kernel.node["rule"]):
                self._token_by_token(count)
            else:
                self._block_by_block(count)
            if 0 in kernel.results:
                self._store_results(first, count)
        if 1 in kernel.results:
            self._store_state()

    # ---- memory -----------------------------------------------------------------------------

    def _vector(self, base: ir.Value, index: ir.Value, lanes: int | None = None) -> ir.Value:
        lanes = self.kernel.lanes if lanes is None else lanes
        return self.e.load(self.e.offset(base, index, F32), vector(F32, lanes))

    def _splat(self, base: ir.Value, index: ir.Value) -> ir.Value:
        return self.e.splat(self._vector(base, index, 1), self.kernel.lanes)

    def _row(self, base: ir.Value, row: ir.Value) -> list[ir.Value]:
        """A row of `width` elements, as vectors."""
        start = self._times(row, self.kernel.width)
        return [self._vector(base, self._plus(start, number * self.kernel.lanes))
                for number in range(self.kernel.vectors)]

    def _store_row(self, base: ir.Value, row: ir.Value, vectors: list[ir.Value]) -> None:
        start = self._times(row, self.kernel.width)
        for number, each in enumerate(vectors):
            self.e.store(each, self.e.offset(
                base, self._plus(start, number * self.kernel.lanes), F32))

    def _times(self, a: ir.Value, b: int) -> ir.Value:
        return self.e.b.mul(a, i64(b), flags=["nsw"])

    def _plus(self, a: ir.Value, b: int) -> ir.Value:
        return self.e.b.add(a, i64(b), flags=["nsw"]) if b else a

    def _each(self, x: Expression, size: int, emit: Callable[[Index, int], None]) -> None:
        """emit(i, lanes) for all i below size, whole vectors first."""
        lanes = usable_lanes(self.kernel.lanes, size)
        whole = size // lanes * lanes
        with x.loop(0, whole, lanes) as i:
            emit(i, lanes)
        if whole < size:
            with x.loop(whole, size) as i:
                emit(i, 1)

    def _each_column(self, x: Expression, emit: Callable[[Index, Index, int], None]) -> None:
        """emit(i, column, lanes) for the slice's own columns; i counts from the slice's first."""
        kernel, first = self.kernel, x.index(self.column)
        if kernel.columns % kernel.width == 0:
            with x.loop(0, kernel.width, kernel.lanes) as i:
                emit(i, first + i, kernel.lanes)
            return
        live = x.scopes.integers.minimum(kernel.columns - first, kernel.width)
        with x.loop(0, live) as i:
            emit(i, first + i, 1)

    def _clear(self, base: ir.Value, count: ir.Value | int) -> None:
        zero = splat_constant(vector(F32, self.kernel.lanes), 0.0)
        with self.e.loop(0, count, self.kernel.lanes) as i:
            self.e.store(zero, self.e.offset(base, i, F32))

    def _keep(self, x: Expression, value: ir.Value, base: ir.Value, index: Index) -> None:
        self.e.store(value, self.e.offset(base, x.emit_index(index), F32))

    # ---- state ------------------------------------------------------------------------------

    def _load_state(self) -> None:
        """The slice of the state into scratch; columns past the end are zeros."""
        e, kernel = self.e, self.kernel
        if self.part.fresh is not None or kernel.columns % kernel.width:
            self._clear(self.state, kernel.size * kernel.width)
        if self.part.fresh is None:
            self._copy_state()
            return
        with e.b.if_then(e.b.not_(self.part.fresh)):
            self._copy_state()

    def _copy_state(self) -> None:
        kernel = self.kernel
        x = kernel.expression(self.e, self.frame)
        row, head = x.index(self.part.row), x.index(self.head)
        with x.loop(0, kernel.size) as i:
            self._each_column(x, lambda j, column, lanes: self._keep(
                x, x.value(kernel.state, [row, head, i, column], lanes), self.state,
                i * kernel.width + j))

    def _store_state(self) -> None:
        kernel = self.kernel
        x = kernel.expression(self.e, self.frame)
        row, head = x.index(self.part.row), x.index(self.head)
        with x.loop(0, kernel.size) as i:
            self._each_column(x, lambda j, column, lanes: x.store(
                kernel.results[1], [row, head, i, column],
                self._vector(self.state, x.emit_index(i * kernel.width + j), lanes)))

    # ---- tokens -----------------------------------------------------------------------------

    def _load_tokens(self, first: ir.Value, count: ir.Value) -> None:
        """Operands of `count` tokens, in f32."""
        kernel = self.kernel
        if kernel.columns % kernel.width:
            self._clear(self.values, TOKENS * kernel.width)
        x = kernel.expression(self.e, self.frame)
        head = x.index(self.head)
        key_head = shared_heads(kernel.heads, kernel.key_heads, head)
        with x.loop(0, x.index(count)) as t:
            token = kernel.sequences.token(x, self.part, x.index(first) + t)
            self._each(x, kernel.size, lambda i, lanes: self._keep(
                x, x.value(kernel.key, [*token, key_head, i], lanes), self.keys,
                t * kernel.size + i))
            for member in range(kernel.group):
                self._load_query(x, token, t, head, member)
            self._each_column(x, lambda i, column, lanes: self._keep(
                x, x.value(kernel.value, [*token, head, column], lanes), self.values,
                t * kernel.width + i))
            if kernel.beta is not None:
                self._keep(x, x.value(kernel.beta, [*token, head]), self.betas, t)
            if kernel.per_key:
                self._each(x, kernel.size, lambda i, lanes: self._keep(
                    x, self._factor(x, [*token, head, i], lanes), self.decays,
                    t * kernel.size + i))
            elif kernel.decay is not None:
                self._keep(x, self._factor(x, [*token, head], 1), self.decays, t)

    def _load_query(self, x: Expression, token: list[Index], t: Index, head: Index, member: int
                    ) -> None:
        kernel, e = self.kernel, self.e
        own = head * kernel.group + member if kernel.group > 1 else shared_heads(
            kernel.heads, kernel.query_heads, head)

        def one(i: Index, lanes: int) -> None:
            value = x.value(kernel.query, [*token, own, i], lanes)
            scaled = e.b.fmul(value, splat_constant(value.type, kernel.node["scale"]))
            self._keep(x, scaled, self.queries, (t * kernel.group + member) * kernel.size + i)

        self._each(x, kernel.size, one)

    def _factor(self, x: Expression, index: list[Index], lanes: int) -> ir.Value:
        """exp(decay): what the state is multiplied by."""
        assert self.kernel.decay is not None  # the rule is gated
        return math.exp(self.e, x.value(self.kernel.decay, index, lanes))

    def _store_results(self, first: ir.Value, count: ir.Value) -> None:
        kernel = self.kernel
        x = kernel.expression(self.e, self.frame)
        head = x.index(self.head)
        with x.loop(0, x.index(count)) as t:
            token = kernel.sequences.token(x, self.part, x.index(first) + t)
            for member in range(kernel.group):
                own = head * kernel.group + member
                self._store_output(x, [*token, own], (t * kernel.group + member) * kernel.width)

    def _store_output(self, x: Expression, row: list[Index], place: Index) -> None:
        """The sums from `place` on as a row of the first result."""
        def one(i: Index, column: Index, lanes: int) -> None:
            x.store(self.kernel.results[0], [*row, column],
                    self._vector(self.sums, x.emit_index(place + i), lanes))

        self._each_column(x, one)

    # ---- the recurrence ---------------------------------------------------------------------

    def _decay(self, token: ir.Value, row: ir.Value) -> ir.Value | None:
        """The factor of a row of the state, in all lanes."""
        kernel = self.kernel
        if kernel.decay is None:
            return None
        index = self.e.b.add(self._times(token, kernel.size), row) if kernel.per_key else token
        return self._splat(self.decays, index)

    def _block_by_block(self, count: ir.Value) -> None:
        """S = decay S + k v; y += S q, for blocks of rows."""
        e, kernel = self.e, self.kernel
        self._clear(self.sums, self._times(count, kernel.group * kernel.width))
        whole = kernel.size // kernel.rows * kernel.rows
        with e.loop(0, whole, kernel.rows, "rows") as row:
            self._block(row, kernel.rows, count)
        for row in range(whole, kernel.size):
            self._block(i64(row), 1, count)

    def _block(self, first: ir.Value, height: int, count: ir.Value) -> None:
        e, vectors = self.e, self.kernel.vectors
        rows = [self._plus(first, number) for number in range(height)]
        initial = [each for row in rows for each in self._row(self.state, row)]
        with e.fold(0, count, initial, name="token") as (token, carried, finish):
            values = self._row(self.values, token)
            state = [self._updated(token, row, carried[n * vectors:(n + 1) * vectors], values)
                     for n, row in enumerate(rows)]
            self._add_products(token, rows, state)
            finish([each for row in state for each in row])
        for number, row in enumerate(rows):
            self._store_row(self.state, row,
                            finish.results[number * vectors:(number + 1) * vectors])

    def _updated(self, token: ir.Value, row: ir.Value, old: list[ir.Value],
                 values: list[ir.Value]) -> list[ir.Value]:
        e = self.e
        key = self._splat(self.keys, e.b.add(self._times(token, self.kernel.size), row))
        decay = self._decay(token, row)
        if decay is not None:
            old = [e.b.fmul(each, decay) for each in old]
        return [e.fma(key, value, each) for value, each in zip(values, old, strict=True)]

    def _add_products(self, token: ir.Value, rows: list[ir.Value], state: list[list[ir.Value]]
                      ) -> None:
        """sums += queries times rows of the state."""
        e, kernel = self.e, self.kernel
        for member in range(kernel.group):
            place = self._plus(self._times(token, kernel.group), member)
            sums = self._row(self.sums, place)
            for row, parts in zip(rows, state, strict=True):
                query = self._query(place, row)
                sums = [e.fma(query, each, total)
                        for each, total in zip(parts, sums, strict=True)]
            self._store_row(self.sums, place, sums)

    def _query(self, place: ir.Value, row: ir.Value) -> ir.Value:
        return self._splat(self.queries, self.e.b.add(self._times(place, self.kernel.size), row))

    def _token_by_token(self, count: ir.Value) -> None:
        """S = decay S; u = beta (v - S k); S = S + k u; y = S q."""
        e, kernel = self.e, self.kernel
        zeros = [splat_constant(vector(F32, kernel.lanes), 0.0)] * kernel.vectors
        with e.loop(0, count, name="token") as token:
            seen = self._over_rows(zeros, lambda row, sums: self._decayed(token, row, sums))
            beta = self._splat(self.betas, token)
            values = [e.b.fmul(beta, e.b.fsub(value, each)) for value, each in zip(
                self._row(self.values, token), seen, strict=True)]
            sums = self._over_rows(zeros * kernel.group,
                                   lambda row, sums: self._corrected(token, row, values, sums))
            for member in range(kernel.group):
                place = self._plus(self._times(token, kernel.group), member)
                self._store_row(self.sums, place, sums[member * kernel.vectors:][:kernel.vectors])

    def _over_rows(self, initial: list[ir.Value], turn: Callable) -> list[ir.Value]:
        """turn(row, sums) for all rows of the state."""
        e, size = self.e, self.kernel.size
        step = _UNROLL if size % _UNROLL == 0 else 1
        with e.fold(0, size, initial, step, "row") as (row, sums, finish):
            for number in range(step):
                sums = turn(self._plus(row, number), sums)
            finish(sums)
        return finish.results

    def _decayed(self, token: ir.Value, row: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        e = self.e
        state, decay = self._row(self.state, row), self._decay(token, row)
        if decay is not None:
            state = [e.b.fmul(each, decay) for each in state]
            self._store_row(self.state, row, state)
        key = self._splat(self.keys, e.b.add(self._times(token, self.kernel.size), row))
        return [e.fma(key, each, total) for each, total in zip(state, sums, strict=True)]

    def _corrected(self, token: ir.Value, row: ir.Value, values: list[ir.Value],
                   sums: list[ir.Value]) -> list[ir.Value]:
        e, kernel = self.e, self.kernel
        key = self._splat(self.keys, e.b.add(self._times(token, kernel.size), row))
        state = [e.fma(key, value, each)
                 for value, each in zip(values, self._row(self.state, row), strict=True)]
        self._store_row(self.state, row, state)
        result = []
        for member in range(kernel.group):
            query = self._query(self._plus(self._times(token, kernel.group), member), row)
            own = sums[member * kernel.vectors:][:kernel.vectors]
            result += [e.fma(query, each, total) for each, total in zip(state, own, strict=True)]
        return result
