"""Attention on the GPU, for any shape: flash style, so that the matrix of scores is never stored.

A block takes one query in one head; its warps share out the keys, 32 at a time. A lane scores one
key; then the warp's lanes share out the components of the values and add them up, weighted. At the
end the warps' maxima, totals and sums are joined in shared memory. All sums are in f32.

Faster kernels for a case and architecture are asked first: see `KERNELS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from llmc.codegen import elements
from llmc.codegen import math as codegen_math
from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.attention_queries import Operand
from llmc.codegen.host.attention_views import result_view
from llmc.codegen.integers import Index
from llmc.codegen.llvm import F32, f32, i32, i64, ir
from llmc.codegen.nvptx.attention_flash import FlashAttention, flash_attention
from llmc.codegen.nvptx.attention_sources import Keys, make_keys
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter, DeviceFrame, Kernel
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, bounds, maximum, product
from llmc.ir.dtypes import bool_
from llmc.ir.dtypes import f32 as single
from llmc.ir.graph import Node
from llmc.ir.program import Program, Stage, unsupported

OPS = ("paged_attention", "packed_attention", "attention")
LOG2_E = math.log2(math.e)
AHEAD = 8  # rows of values that are asked for before the first is used


def attention(stage: Stage, program: Program, target: Target) -> Kernel | FlashAttention:
    """The kernel, or kernels, of an attention stage."""
    return next(kernel for make in KERNELS if (kernel := make(stage, program, target)))


class AttentionKernel:
    """paged_attention, packed_attention or attention, with any operands and movement behind it."""

    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: Target):
        self.stage, self.program = stage, program
        found = [node for node in stage.body.nodes() if node.op in OPS]
        if len(found) != 1:
            raise unsupported(stage, f"holds {len(found)} attention ops, not one")
        self.node = node = found[0]
        head_axis = 1
        self.heads, self.size = _fixed(stage, node.inputs[0], head_axis), _fixed(
            stage, node.inputs[0], -1)
        self.value_size = _fixed(stage, node.inputs[2], -1)
        self.group = self.heads // _fixed(
            stage, node.inputs[1], 2 if node.op == "paged_attention" else 1)
        self.result = Operand(program.buffers[stage.results[0]],
                              result_view(stage, stage.body, node))
        self.queries: tuple[Dim, ...] = (node.shape[0],) if node.rank == 3 else (
            node.shape[0], node.shape[2])
        high = bounds(product(self.queries))[1]
        self.warps = 8 if high is not None and high <= program.capabilities.few_rows else 4
        self.threads = self.warps * WARP
        self.width = _vector(self.value_size, WARP)
        self.pieces = -(-self.value_size // (WARP * self.width))  # vectors of a value, for a lane

    def blocks(self) -> Dim:
        return maximum(1, product(self.queries)) * self.heads

    # ---- one query and head -------------------------------------------------------------------

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """Blocks count heads first: those that share keys run side by side."""
        query = e.b.udiv(e.block, i64(self.heads))
        with e.b.if_then(e.b.icmp_signed("<", query, frame.dim(product(self.queries)))):
            sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
            x = Expression(e, frame, sources, 1)
            number = x.index(query)
            head = x.index(e.block) % self.heads
            place = [number] if len(self.queries) == 1 else [
                number // x.dim(self.queries[1]), number % x.dim(self.queries[1])]
            keys = make_keys(self.node, x, place, head // self.group)
            _Query(self, x, keys, place, head).emit()


class _Query:
    """The code of one query in one head."""

    def __init__(self, kernel: AttentionKernel, x: Expression, keys: Keys, place: list[Index],
                 head: Index):
        self.kernel, self.x, self.keys, self.place, self.head = kernel, x, keys, place, head
        assert isinstance(x.e, DeviceEmitter)
        self.e: DeviceEmitter = x.e
        self.warp = self.e.b.lshr(self.e.thread, i64(5))
        self.lane = self.e.b.and_(self.e.thread, i64(WARP - 1))
        self.query = self.e.shared(F32, kernel.size)

    def emit(self) -> None:
        """Keys in chunks of 32 that start at multiples of 32, dealt out to the warps."""
        e, x, kernel = self.e, self.x, self.kernel
        self._load_query()
        low, high = self.keys.range
        start = e.b.add(e.b.and_(low, i64(-WARP)), e.b.mul(self.warp, i64(WARP)))
        zero, lowest = f32(0.0), f32(-math.inf)
        sums = [zero] * (kernel.pieces * kernel.width)
        with x.fold(x.index(start), x.index(high), [lowest, zero, *sums],
                    WARP * kernel.warps) as (chunk, state, finish):
            finish(self._chunk(x.emit_index(chunk), state))
        best, total, *sums = finish.results
        self._join(best, e.across_warp(total, e.b.fadd), sums)

    def _at(self) -> list[Index]:
        """The query's index, without its component."""
        return [*self.place, self.head] if len(self.place) == 1 else [
            self.place[0], self.head, self.place[1]]

    def _load_query(self) -> None:
        """The scaled query, in f32, for the whole block."""
        x, e, node = self.x, self.e, self.kernel.node
        with x.loop(x.index(e.thread), self.kernel.size, self.kernel.threads) as component:
            value = x.value(node.inputs[0], [*self._at(), component])
            value = elements.convert(e, value, node.inputs[0].dtype, single)
            value = e.b.fmul(value, f32(node["scale"]))
            e.store(value, e.offset(self.query, x.emit_index(component), F32))
        e.barrier()

    # ---- 32 keys ------------------------------------------------------------------------------

    def _chunk(self, chunk: ir.Value, state: Sequence[ir.Value]) -> list[ir.Value]:
        """Maximum, total (of this lane) and weighted sums with the keys from `chunk` on."""
        e, (best, total, *sums) = self.e, state
        low, high = self.keys.range
        first = e.maximum(low, chunk)
        last = e.b.sub(e.minimum(high, e.b.add(chunk, i64(WARP))), i64(1))
        own = e.b.add(chunk, self.lane)
        seen = e.b.and_(e.b.icmp_signed(">=", own, first), e.b.icmp_signed("<=", own, last))
        key = e.minimum(e.maximum(own, first), last)
        score = e.b.select(seen, self._score(key), f32(-math.inf))
        new = _greater(e, best, e.across_warp(score, lambda a, b: _greater(e, a, b)))
        known = e.b.select(e.b.fcmp_ordered("==", new, f32(-math.inf)), f32(0.0), new)
        factor = self._exponential(e.b.fsub(best, known))
        weight = self._exponential(e.b.fsub(score, known))
        total = e.fma(total, factor, weight)
        sums = [e.b.fmul(value, factor) for value in sums]
        sums = self._add_values(chunk, first, last, weight, sums)
        return [new, total, *sums]

    def _score(self, key: ir.Value) -> ir.Value:
        """The query times a key, capped and masked."""
        x, e, kernel = self.x, self.e, self.kernel
        node = kernel.node
        place, totals = x.index(key), [f32(0.0)] * 4
        count = _most_at_once(kernel.size, node.inputs[1].dtype.bits)
        if count == kernel.size:
            totals = self._multiply(place, 0, count, totals)
        else:
            stop = x.index(_unknown(e, kernel.size))
            with x.fold(x.index(i64(0)), stop, totals, count) as (start, carried, finish):
                finish(self._multiply(place, start, count, carried))
            totals = finish.results
        score = e.b.fadd(e.b.fadd(totals[0], totals[1]), e.b.fadd(totals[2], totals[3]))
        if node["softcap"]:
            ratio = e.b.fdiv(score, f32(node["softcap"]))
            score = e.b.fmul(codegen_math.tanh(e, ratio), f32(node["softcap"]))
        return self._masked(score, place)

    def _multiply(self, key: Index, start: Index, count: int, totals: Sequence[ir.Value]
                  ) -> list[ir.Value]:
        """`count` components of the query times those of a key, added to four totals in turn."""
        e, totals, width = self.e, list(totals), _vector(count, 1)
        query = e.offset(self.query, self.x.emit_index(start), F32)
        for number, place in enumerate(range(0, count, width)):
            a = e.load(e.offset(query, place, F32), _vector_type(width), min(16, 4 * width))
            b = self.keys.key(key, start + place, width)
            for lane in range(width):
                totals[number % 4] = e.fma(_lane(e, a, lane), _lane(e, b, lane),
                                           totals[number % 4])
        return totals

    def _masked(self, score: ir.Value, key: Index) -> ir.Value:
        x, e, node = self.x, self.e, self.kernel.node
        if node.op != "attention" or len(node.inputs) < 4:
            return score
        mask = node.inputs[3]
        index = [*self._at(), key][4 - mask.rank:]
        index = [0 if size == 1 else i for size, i in zip(mask.shape, index, strict=True)]
        value = x.value(mask, index)
        if mask.dtype is bool_:
            return e.b.select(value, score, f32(-math.inf))
        return e.b.fadd(score, elements.convert(e, value, mask.dtype, single))

    def _exponential(self, difference: ir.Value) -> ir.Value:
        scaled = self.e.b.fmul(difference, f32(LOG2_E))
        return self.e.call("llvm.exp2.f32", F32, scaled)

    def _add_values(self, chunk: ir.Value, first: ir.Value, last: ir.Value, weight: ir.Value,
                    sums: Sequence[ir.Value]) -> list[ir.Value]:
        """The chunk's values, weighted; AHEAD rows are asked for at once. Keys beyond the ends
        stand for the last one again, with weight zero: memory there may hold anything."""
        e, x, kernel = self.e, self.x, self.kernel
        stop = e.b.add(last, i64(1))
        with x.fold(x.index(first), x.index(stop), list(sums), AHEAD) as (index, state, finish):
            sums, start = list(state), x.emit_index(index)
            rows, weights = [], []
            for step in range(AHEAD):
                own = e.b.add(start, i64(step))
                key = x.index(e.minimum(own, last))
                rows.append([self._value(key, piece) for piece in range(kernel.pieces)])
                lane = e.b.trunc(e.b.sub(x.emit_index(key), chunk), i32(0).type)
                share = e.shuffle(weight, lane, "idx")
                weights.append(e.b.select(e.b.icmp_signed("<=", own, last), share, f32(0.0)))
            for row, share in zip(rows, weights, strict=True):
                parts = [_lane(e, vector, lane) for vector in row for lane in range(kernel.width)]
                sums = [e.fma(part, share, total) for part, total in zip(parts, sums, strict=True)]
            finish(sums)
        return finish.results

    def _value(self, key: Index, piece: int) -> ir.Value:
        """This lane's components of a value; lanes beyond the end read the last ones again."""
        return self.keys.value(key, self.x.scopes.integers.leaf(
            self._component(piece, clamp=True), 0, self.kernel.width), self.kernel.width)

    def _component(self, piece: int, clamp: bool = False) -> ir.Value:
        e, kernel = self.e, self.kernel
        own = e.b.add(e.b.mul(self.lane, i64(kernel.width)), i64(piece * WARP * kernel.width))
        return e.minimum(own, i64(kernel.value_size - kernel.width)) if clamp else own

    # ---- all warps ----------------------------------------------------------------------------

    def _join(self, best: ir.Value, total: ir.Value, sums: Sequence[ir.Value]) -> None:
        """Sums of all warps, each scaled to the greatest maximum; zeros if no key was seen."""
        e, kernel = self.e, self.kernel
        maxima, totals = e.shared(F32, kernel.warps), e.shared(F32, kernel.warps)
        rows = e.shared(F32, kernel.warps * kernel.value_size)
        for memory, value in ((maxima, best), (totals, total)):
            e.store(value, e.offset(memory, self.warp, F32))
        line = e.b.mul(self.warp, i64(kernel.value_size))
        for piece in range(kernel.pieces):
            component = self._component(piece)
            with e.b.if_then(e.b.icmp_signed("<", component, i64(kernel.value_size))):
                for lane in range(kernel.width):
                    place = e.b.add(line, e.b.add(component, i64(lane)))
                    e.store(sums[piece * kernel.width + lane], e.offset(rows, place, F32))
        e.barrier()
        factors, inverse = self._factors(maxima, totals)
        with e.loop(e.thread, i64(kernel.value_size), kernel.threads) as component:
            joined: ir.Value = f32(0.0)
            for warp, factor in enumerate(factors):
                place = e.b.add(component, i64(warp * kernel.value_size))
                joined = e.fma(e.load(e.offset(rows, place, F32), F32), factor, joined)
            self._store(component, e.b.fmul(joined, inverse))

    def _factors(self, maxima: ir.Value, totals: ir.Value) -> tuple[list[ir.Value], ir.Value]:
        """(what scales each warp's sums, 1 / the total of all)."""
        e, kernel = self.e, self.kernel
        bests = [e.load(e.offset(maxima, warp, F32), F32) for warp in range(kernel.warps)]
        best = bests[0]
        for other in bests[1:]:
            best = _greater(e, best, other)
        best = e.b.select(e.b.fcmp_ordered("==", best, f32(-math.inf)), f32(0.0), best)
        factors = [self._exponential(e.b.fsub(own, best)) for own in bests]
        total: ir.Value = f32(0.0)
        for warp, factor in enumerate(factors):
            total = e.fma(e.load(e.offset(totals, warp, F32), F32), factor, total)
        nothing = e.b.fcmp_ordered("==", total, f32(0.0))
        return factors, e.b.fdiv(f32(1.0), e.b.select(nothing, f32(1.0), total))

    def _store(self, component: ir.Value, value: ir.Value) -> None:
        e, result = self.e, self.kernel.result
        index = [self.x.emit_index(i) for i in self._at()]
        offset = result.offset(e, self.x.frame, *index, component)
        value = elements.convert(e, value, single, result.dtype)
        elements.store(e, value, self.x.frame.pointer(result.buffer), offset, result.dtype)


def _fixed(stage: Stage, node: Node, axis: int) -> int:
    size = node.shape[axis]
    if not isinstance(size, int):
        raise unsupported(stage, f"an axis of {node.type} is not a fixed number")
    return size


def _vector(size: int, threads: int) -> int:
    """Elements of a vector: a power of two up to 8 that divides size, and leaves no thread idle
    that could have work."""
    width = 8
    while size % width or (width > 1 and width * threads > max(size, threads)):
        width //= 2
    return width


def _most_at_once(size: int, bits: int) -> int:
    """Components of a key that are loaded at once, without a rest: more, and the assembler spills
    (before Hopper; f32 of more than 128, whose values take twice the registers, needs most)."""
    most = 16 if bits == 32 and size > 128 else 64
    return max(count for count in range(1, min(size, most) + 1) if size % count == 0)


def _unknown(e: DeviceEmitter, number: int) -> ir.Value:
    """A number that LLVM does not know: it would unroll a loop of so few turns."""
    code = ir.InlineAsm(ir.FunctionType(i64(0).type, []), f"mov.b64 $0, {number};", "=l", False)
    return e.b.call(code, [])


def _vector_type(width: int) -> ir.Type:
    return F32 if width == 1 else ir.VectorType(F32, width)


def _lane(e: DeviceEmitter, value: ir.Value, lane: int) -> ir.Value:
    return e.b.extract_element(value, i32(lane)) if isinstance(value.type, ir.VectorType) else value


def _greater(e: DeviceEmitter, a: ir.Value, b: ir.Value) -> ir.Value:
    return e.b.select(e.b.fcmp_ordered(">", a, b), a, b)


# Each gives a kernel, or None where it does not fit the stage or the architecture; in order.
KERNELS: list[Callable[[Stage, Program, Target], Kernel | FlashAttention | None]] = [
    flash_attention, AttentionKernel]
