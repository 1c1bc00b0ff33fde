"""The end of a decode step on the device: which token comes next, and the step that it begins.

`advance` hands the chosen tokens to the next step: its ids and positions, and a ring in the host's
memory that the host reads a step or two behind. `sample`, before it, draws from the logits of the
rows that are not greedy, as `llmc.runtime.sampling` does on the host: the same random number and
the same order of tokens, with weights in steps of 2^-32 of the best one's.

Tokens are never sorted. In their order (by logit, then by index) everything asked for is the first
token at which a running sum exceeds a bound: top-k counts tokens, top-p and the draw add weights.
`Search` finds it digit by digit of the logit's bits, from sums for each digit. All sums are of
integers, so the result does not depend on the order of threads.

Both take the address of a Choice (see llmc/ir/choice.py), and a second argument that they do not
use.
"""

from __future__ import annotations

from collections.abc import Callable

from llmc.codegen.llvm import F32, F64, I32, I64, POINTER, f32, i32, i64, ir
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter
from llmc.ir.choice import FIELDS, SAMPLING

ADVANCE, SAMPLE = "llmc_advance", "llmc_sample"
ADVANCE_THREADS = 128
SAMPLE_THREADS = 512
DIGIT = 4  # bits
BINS = 1 << DIGIT
SAMPLE_SHARED_BYTES = SAMPLE_THREADS * BINS * 8
UNIT = float(1 << 32)  # weight of the best token
LEAST = -40.0  # binary exponent below which a weight is nothing
LOADS = 8  # of a thread, in flight
LOG2_E = 1.4426950408889634

_PHILOX = ((0xD2511F53, 0x9E3779B9), (0xCD9E8D57, 0xBB67AE85))  # multipliers and key steps
_PHILOX_ROUNDS = 10


class Choice:
    """The fields of a Choice, read where they are asked for."""

    def __init__(self, e: DeviceEmitter, arguments: ir.Value):
        self.e, self.arguments = e, arguments

    def number(self, name: str) -> ir.Value:
        return self.e.load(self._at(name), I64)

    def pointer(self, name: str) -> ir.Value:
        return self.e.load(self._at(name), POINTER, 8)

    def element(self, name: str, index: ir.Value, type_: ir.Type) -> ir.Value:
        """Address of an element of the array that a field points to."""
        return self.e.offset(self.pointer(name), index, type_)

    def _at(self, name: str) -> ir.Value:
        return self.e.offset(self.arguments, 8 * FIELDS.index(name))


def emit_advance(e: DeviceEmitter, arguments: ir.Value, threads: int = ADVANCE_THREADS) -> None:
    """One block: the chosen tokens become the next step's ids, and go into the ring."""
    choice = Choice(e, arguments)
    count, steps = choice.number("sequences"), choice.pointer("steps")
    done = e.load(steps, I64)
    first = e.b.mul(e.b.urem(done, choice.number("slots")), count)
    with e.loop(e.thread, count, threads) as row:
        token = e.b.trunc(e.load(choice.element("greedy", row, I64), I64), I32)
        e.store(token, choice.element("ids", row, I32))
        e.store(token, choice.element("ring", e.b.add(first, row), I32))
        position = choice.element("positions", row, I32)
        e.store(e.b.add(e.load(position, I32), i32(1)), position)
    e.barrier()
    with e.b.if_then(e.b.icmp_signed("==", e.thread, i64(0))):
        e.store(e.b.add(done, i64(1)), steps)


def emit_sample(e: DeviceEmitter, arguments: ir.Value, bins: ir.Value,
                threads: int = SAMPLE_THREADS, warp: int = WARP) -> None:
    """A block for each sequence: its token, where temperature is not 0, in place of the greedy one.

    bins: shared memory, 8 * BINS bytes for each thread. threads and warp: 1 to run as one thread.
    """
    choice = Choice(e, arguments)
    row = e.block
    fields = choice.element("sampling", e.b.mul(row, i64(len(SAMPLING))), I64)
    temperature = e.load(fields, F64)
    with e.b.if_then(e.b.fcmp_ordered(">", temperature, f64(0.0))):
        chosen = choice.element("greedy", row, I64)
        logits = choice.element("logits", e.b.mul(row, choice.number("vocabulary")), F32)
        search = Search(e, logits, choice.number("vocabulary"), bins, threads, warp)
        search.best = e.load(e.offset(logits, e.load(chosen, I64), F32), F32)
        search.scale = e.b.fptrunc(e.b.fdiv(f64(LOG2_E), temperature), F32)
        token = _draw(e, search, fields, e.load(choice.element("positions", row, I32), I32))
        with e.b.if_then(e.b.icmp_signed("==", e.thread, i64(0))):
            e.store(token, chosen)


def _field(e: DeviceEmitter, fields: ir.Value, name: str, type_: ir.Type) -> ir.Value:
    return e.load(e.offset(fields, 8 * SAMPLING.index(name)), type_)


def _draw(e: DeviceEmitter, search: Search, fields: ir.Value, position: ir.Value) -> ir.Value:
    """The token at which the running sum of weights exceeds the random share of their total: in the
    order of indices, or of logits where some tokens are left out."""
    b = e.b
    top_k, top_p = _field(e, fields, "top_k", I64), _field(e, fields, "top_p", F64)
    min_p = _field(e, fields, "min_p", F64)
    some = [b.icmp_signed(">", top_k, i64(0)), b.fcmp_ordered(">", min_p, f64(0.0)),
            b.fcmp_ordered("<", top_p, f64(1.0))]
    random = emit_random(e, _field(e, fields, "seed", I64), _field(e, fields, "choice", I64),
                         b.add(b.zext(position, I64), i64(1)))
    token = e.stack(I64)
    with b.if_else(b.or_(b.or_(some[0], some[1]), some[2])) as (then, otherwise):
        with then:
            total = _kept(e, search, top_k, min_p, top_p)
            target = _share(e, total, random)
            order, above = search.run(search.weights, target)
            tie = b.udiv(b.sub(target, above), search.weight_of_order(order))
            place, _ = search.run(lambda value, index: b.zext(
                b.icmp_unsigned("==", search.order(value), order), I64), tie, by_index=True)
            e.store(b.zext(b.not_(place), I64), token)
        with otherwise:
            place, _ = search.run(search.weights, _share(e, search.sum(), random), by_index=True)
            e.store(b.zext(b.not_(place), I64), token)
    return e.load(token, I64)


def _share(e: DeviceEmitter, total: ir.Value, share: ir.Value) -> ir.Value:
    """total * share, rounded down and below total."""
    part = e.b.fptoui(e.b.fmul(e.b.uitofp(total, F64), share), I64)
    return e.minimum(part, e.b.sub(total, i64(1)))


def _kept(e: DeviceEmitter, search: Search, top_k: ir.Value, min_p: ir.Value, top_p: ir.Value
          ) -> ir.Value:
    """Sum of the weights of the tokens that top-k, min-p and top-p leave: those that come first."""
    b = e.b
    total = e.stack(I64)
    least = b.fptoui(b.fmul(min_p, f64(UNIT)), I64)
    e.store(search.sum(lambda value, weight: b.icmp_unsigned(">=", weight, least)), total)
    limited = b.and_(b.icmp_signed(">", top_k, i64(0)), b.icmp_signed("<", top_k, search.count))
    with b.if_then(limited):
        last, more = search.run(lambda value, index: i64(1), b.sub(top_k, i64(1)))
        ties = b.mul(b.sub(top_k, more), search.weight_of_order(last))
        above = search.sum(lambda value, weight: b.icmp_unsigned(">", search.order(value), last))
        e.store(e.minimum(b.add(above, ties), e.load(total, I64)), total)
    with b.if_then(b.fcmp_ordered("<", top_p, f64(1.0))):
        share = b.fmul(b.uitofp(e.load(total, I64), F64), top_p)
        floor = b.fptoui(share, I64)
        # The first sum that reaches the share exceeds the largest integer below it.
        whole = b.fcmp_ordered("==", b.uitofp(floor, F64), share)
        bound = e.maximum(b.select(whole, b.sub(floor, i64(1)), floor), i64(0))
        last, above = search.run(search.weights, bound)
        weight = search.weight_of_order(last)
        ties = b.add(b.udiv(b.sub(bound, above), weight), i64(1))
        e.store(b.add(above, b.mul(ties, weight)), total)
    return e.load(total, I64)


def emit_random(e: DeviceEmitter, seed: ir.Value, choice: ir.Value, position: ir.Value
                ) -> ir.Value:
    """f64 in [0, 1) with 53 random bits: sampling.philox_uniform on i64 values."""
    b = e.b

    def halves(value: ir.Value) -> list[ir.Value]:
        return [b.trunc(value, I32), b.trunc(b.lshr(value, i64(32)), I32)]

    counter, key = [*halves(position), *halves(choice)], halves(seed)
    for _ in range(_PHILOX_ROUNDS):
        (left_low, left), (right_low, right) = (
            halves(b.mul(b.zext(counter[2 * half], I64), i64(_PHILOX[half][0])))
            for half in range(2))
        counter = [b.xor(b.xor(right, counter[1]), key[0]), right_low,
                   b.xor(b.xor(left, counter[3]), key[1]), left_low]
        key = [b.add(word, i32(step)) for word, (_, step) in zip(key, _PHILOX, strict=True)]
    high = b.uitofp(b.lshr(counter[0], i32(5)), F64)
    low = b.uitofp(b.lshr(counter[1], i32(6)), F64)
    return b.fmul(b.fadd(b.fmul(high, f64(2.0 ** 26)), low), f64(2.0 ** -53))


def f64(value: float) -> ir.Constant:
    return ir.Constant(F64, value)


Measure = Callable[[ir.Value, ir.Value], ir.Value]  # of a token, by logit and index: i64


class Search:
    """Running sums over the tokens of a row in falling order.

    An `order` is an i32 that is larger, unsigned, for tokens that come earlier. best and scale: the
    largest logit, and log2(e) / temperature; set before weights are asked for.
    """

    best: ir.Value
    scale: ir.Value

    def __init__(self, e: DeviceEmitter, logits: ir.Value, count: ir.Value, bins: ir.Value,
                 threads: int, warp: int):
        self.e, self.logits, self.count = e, logits, count
        self.bins, self.threads, self.warp = bins, threads, warp
        self.totals = e.shared(I64, BINS)

    # ---- what is summed -----------------------------------------------------------------------

    def weights(self, value: ir.Value, index: ir.Value) -> ir.Value:
        """exp((logit - best) / temperature) in units of 1 / UNIT."""
        b = self.e.b
        below = b.fsub(value, self.best)
        power = b.fmul(below, self.scale)  # 0 * infinity, where the temperature is tiny
        power = b.select(b.fcmp_ordered("==", below, f32(0.0)), f32(0.0), power)
        power = b.select(b.fcmp_ordered(">", power, f32(LEAST)), power, f32(LEAST))
        return b.fptoui(b.fmul(self.e.call("llvm.exp2.f32", F32, power), f32(UNIT)), I64)

    def weight_of_order(self, order: ir.Value) -> ir.Value:
        """The weight of tokens of that order."""
        b = self.e.b
        positive = b.icmp_signed("<", order, i32(0))
        bits = b.xor(order, b.select(positive, i32(-0x80000000), i32(-1)))
        return self.weights(b.bitcast(bits, F32), i64(0))

    def order(self, value: ir.Value) -> ir.Value:
        """Of a logit; zeros of either sign are equal."""
        b = self.e.b
        bits = b.bitcast(b.fadd(value, f32(0.0)), I32)
        return b.xor(bits, b.or_(b.ashr(bits, i32(31)), i32(-0x80000000)))

    # ---- sums ---------------------------------------------------------------------------------

    def run(self, measure: Measure, bound: ir.Value, by_index: bool = False
            ) -> tuple[ir.Value, ir.Value]:
        """The order at which the running sum first exceeds `bound` (which the sum of all does), and
        the sum before it. by_index: tokens in the order of their indices, not of their logits."""
        e, b = self.e, self.e.b
        state = [i32(0), i64(0)]
        with e.fold(0, 32 // DIGIT, state, name="digit") as (turn, (prefix, above), finish):
            shift = b.sub(i32(32 - DIGIT), b.mul(b.trunc(turn, I32), i32(DIGIT)))
            self._fill(measure, prefix, shift, by_index)
            digit, more = self._crossed(bound, above)
            finish([b.or_(b.shl(prefix, i32(DIGIT)), digit), more])
        return finish.results[0], finish.results[1]

    def sum(self, keep: Measure | None = None) -> ir.Value:
        """Sum of the weights of all tokens, or of those with keep(logit, weight)."""
        e, b = self.e, self.e.b
        own = self._bin(i64(0))

        def add(value: ir.Value, index: ir.Value) -> None:
            weight = self.weights(value, index)
            if keep is not None:
                weight = b.select(keep(value, weight), weight, i64(0))
            e.store(b.add(e.load(own, I64), weight), own)

        e.store(i64(0), own)
        self._each(add)
        e.barrier()
        with e.b.if_then(b.icmp_signed("<", e.thread, i64(self.warp))):
            self._store_total(i64(0))
        e.barrier()
        total = e.load(self.totals, I64)
        e.barrier()
        return total

    def _fill(self, measure: Measure, prefix: ir.Value, shift: ir.Value, by_index: bool) -> None:
        """The totals of each digit at `shift`, of the tokens whose digits before are `prefix`."""
        e, b = self.e, self.e.b
        for digit in range(BINS):
            e.store(i64(0), self._bin(i64(digit)))

        def add(value: ir.Value, index: ir.Value) -> None:
            order = b.not_(b.trunc(index, I32)) if by_index else self.order(value)
            digits = b.lshr(order, shift)
            inside = b.icmp_unsigned("==", b.lshr(digits, i32(DIGIT)), prefix)
            with b.if_then(inside):
                own = self._bin(b.zext(b.and_(digits, i32(BINS - 1)), I64))
                e.store(b.add(e.load(own, I64), measure(value, index)), own)

        self._each(add)
        e.barrier()
        warps = self.threads // self.warp
        with e.loop(b.udiv(e.thread, i64(self.warp)), BINS, warps) as digit:
            self._store_total(digit)
        e.barrier()

    def _crossed(self, bound: ir.Value, above: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The digit at which the running sum exceeds the bound, and the sum before it."""
        e, b = self.e, self.e.b
        digit, before, running = i32(0), above, above
        for each in range(BINS - 1, -1, -1):
            after = b.add(running, e.load(e.offset(self.totals, each, I64), I64))
            here = b.and_(b.icmp_unsigned("<=", running, bound),
                          b.icmp_unsigned(">", after, bound))
            digit = b.select(here, i32(each), digit)
            before = b.select(here, running, before)
            running = after
        return digit, before

    def _bin(self, digit: ir.Value) -> ir.Value:
        """This thread's own sum of a digit."""
        place = self.e.b.add(self.e.b.mul(digit, i64(self.threads)), self.e.thread)
        return self.e.offset(self.bins, place, I64)

    def _store_total(self, digit: ir.Value) -> None:
        """The threads' sums of a digit together, by one warp."""
        e, b = self.e, self.e.b
        lane = b.urem(e.thread, i64(self.warp))
        with e.fold(lane, self.threads, [i64(0)], self.warp) as (thread, (total,), finish):
            place = b.add(b.mul(digit, i64(self.threads)), thread)
            finish([b.add(total, e.load(e.offset(self.bins, place, I64), I64))])
        total = finish.results[0]
        if self.warp > 1:
            total = e.across_warp(total, b.add)
        with b.if_then(b.icmp_unsigned("==", lane, i64(0))):
            e.store(total, e.offset(self.totals, digit, I64))

    def _each(self, body: Callable[[ir.Value, ir.Value], None]) -> None:
        """body(logit, index) for each of this thread's tokens; several loads are in flight."""
        e, b = self.e, self.e.b
        last = b.sub(self.count, i64(1))
        with e.loop(e.thread, self.count, self.threads * LOADS) as start:
            places = [b.add(start, i64(self.threads * number)) for number in range(LOADS)]
            values = [e.load(e.offset(self.logits, e.minimum(place, last), F32), F32)
                      for place in places]
            for place, value in zip(places, values, strict=True):
                with b.if_then(b.icmp_signed("<=", place, last)):
                    body(value, place)
