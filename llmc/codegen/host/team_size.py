"""How many workers of a team run: fewer than there are while other processes take CPUs from them.

A worker that lost its CPU keeps all others waiting at the next barrier, for milliseconds each time:
four workers beside one busy process were slower than one alone. Three of them lose a quarter.

What counts is the CPU time that the workers together get for a second of their runs. Where they
were parked at barriers so long that one worker less might be faster, that is tried; after a while,
one more is. What a try did not improve by half of what it might have is taken back, and the next
such try waits twice as long. CPU time is asked for, which costs a run two system calls a worker,
while somebody is away or waits too long.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.llvm import I8, I32, I64, POINTER, VOID, Emitter, define, i32, i64

RESIZE = "llmc_team_resize"

# The part of the team's memory (see team.py) that this module shares.
BLOCK = 128
WORKERS = 0
ACTIVE, ACTIVE_SLEEPERS = 7 * BLOCK, 7 * BLOCK + 4
LOST, WORKED = 8 * BLOCK, 8 * BLOCK + 8
# Wall time of the runs since the last judgement. The try that is under way: 1 for a worker more, -1
# for one less, 0: none is; and what was judged before it. When the number changed. Whether workers
# count what they work.
_SPENT, _TRY, _BEFORE, _CHANGED, COUNTING = (8 * BLOCK + each for each in (16, 24, 32, 40, 48))
THREADS = 9 * BLOCK
TURN, TAKEN = 24, 32  # in a worker's block: see shares.py
_PATIENCE_MORE, _PATIENCE_LESS = 48, 56  # there: how long tries to add it, or do without, wait

_JUDGED = 32_000_000  # nanoseconds of runs that are judged together
_PATIENCE_LEAST, _PATIENCE_MOST = 32_000_000, 2_048_000_000  # nanoseconds
_NOW, _CPU_TIME = "llmc_team_now", "llmc_team_cpu_time"
_CLOCK_MONOTONIC, _CLOCK_THREAD = 1, 3  # of Linux


def is_null(e: Emitter, pointer: ir.Value) -> ir.Value:
    return e.b.icmp_unsigned("==", e.b.ptrtoint(pointer, I64), i64(0))


def worker_block(e: Emitter, team: ir.Value, worker: ir.Value) -> ir.Value:
    """A worker's own block of the team."""
    offset = e.b.add(e.b.mul(worker, i64(BLOCK)), i64(THREADS))
    return e.b.gep(team, [offset], source_etype=I8)


class TeamSize:
    """Emits what decides the size. Elsewhere than on Linux all workers always run."""

    def __init__(self, module: ir.Module, is_linux: bool):
        self.module = module
        self.is_linux = is_linux

    def emit_clocks(self) -> None:
        """i64 now(), i64 cpu_time() of this thread: nanoseconds."""
        for name, clock in ((_NOW, _CLOCK_MONOTONIC), (_CPU_TIME, _CLOCK_THREAD)):
            _, e = define(self.module, name, I64, [])
            if not self.is_linux:
                e.b.ret(i64(0))
                continue
            time = e.stack(I64, 2)
            e.call("clock_gettime", I32, i32(clock), time)
            seconds = e.b.mul(e.load(time, I64), i64(1_000_000_000))
            e.b.ret(e.b.add(seconds, e.load(e.offset(time, 8), I64)))

    def now(self, e: Emitter) -> ir.Value:
        return e.call(_NOW, I64)

    def cpu_time(self, e: Emitter) -> ir.Value:
        return e.call(_CPU_TIME, I64)

    def emit(self) -> None:
        """void resize(team, i64 began): after a run, while nobody works."""
        function, e = define(self.module, RESIZE, VOID, [POINTER, I64], attributes=("noinline",))
        team, began = function.args
        now = self.now(e)
        spent = e.b.add(e.load(e.offset(team, _SPENT), I64), e.b.sub(now, began))
        e.store(spent, e.offset(team, _SPENT))
        with e.b.if_then(e.b.icmp_signed("<", spent, i64(_JUDGED)), likely=True):
            e.b.ret_void()
        lost, worked = (e.load(e.offset(team, place), I64) for place in (LOST, WORKED))
        for place in (_SPENT, LOST, WORKED):
            e.store(i64(0), e.offset(team, place))
        # Thousandths of a CPU that the runs had.
        share = e.b.udiv(worked, e.b.udiv(spent, i64(1000)))
        workers = e.load(e.offset(team, WORKERS), I64)
        active = e.b.zext(e.load(e.offset(team, ACTIVE), I32), I64)
        # One worker less takes active / (active - 1) of the time, if nobody waits then.
        waited = e.b.icmp_signed(">", e.b.mul(lost, active),
                                 e.b.mul(spent, e.b.sub(active, i64(1))))
        counted = e.b.icmp_signed("!=", e.load(e.offset(team, COUNTING), I64), i64(0))
        away = e.b.icmp_signed("<", active, workers)
        e.store(e.b.zext(e.b.or_(waited, away), I64), e.offset(team, COUNTING))
        with e.b.if_then(e.b.not_(counted)):
            e.b.ret_void()
        self._judge_try(e, team, active, share, now)
        since = e.b.sub(now, e.load(e.offset(team, _CHANGED), I64))
        last = worker_block(e, team, e.b.sub(active, i64(1)))
        with e.b.if_then(e.b.and_(waited, self._is_time(e, since, last, _PATIENCE_LESS))):
            self._start_try(e, team, active, -1, share, now)
            e.b.ret_void()
        with e.b.if_then(away):
            following = worker_block(e, team, active)
            with e.b.if_then(self._is_time(e, since, following, _PATIENCE_MORE)):
                self._start_try(e, team, active, 1, share, now)
        e.b.ret_void()

    def _judge_try(self, e: Emitter, team: ir.Value, active: ir.Value, share: ir.Value,
                   now: ir.Value) -> None:
        """Keep the try that is under way, or take it back (and return)."""
        direction = e.load(e.offset(team, _TRY), I64)
        before = e.load(e.offset(team, _BEFORE), I64)
        e.store(i64(0), e.offset(team, _TRY))
        for change, patience in ((1, _PATIENCE_MORE), (-1, _PATIENCE_LESS)):
            with e.b.if_then(e.b.icmp_signed("==", direction, i64(change))):
                old = e.b.sub(active, i64(change))
                tried = worker_block(e, team, e.minimum(old, active))
                place = e.offset(tried, patience)
                least = e.b.add(e.b.mul(old, i64(2)), i64(change))
                good = e.b.icmp_signed(">=", e.b.mul(share, e.b.mul(old, i64(2))),
                                       e.b.mul(before, least))
                with e.b.if_else(good) as (kept, failed):
                    with kept:
                        e.store(i64(0), place)
                    with failed:
                        twice = e.b.mul(e.load(place, I64), i64(2))
                        longer = e.maximum(i64(_PATIENCE_LEAST), twice)
                        e.store(e.minimum(longer, i64(_PATIENCE_MOST)), place)
                        self._change(e, team, active, -change, now)
                        e.b.ret_void()

    def _is_time(self, e: Emitter, since: ir.Value, own: ir.Value, patience: int) -> ir.Value:
        return e.b.icmp_signed(">=", since, e.load(e.offset(own, patience), I64))

    def _start_try(self, e: Emitter, team: ir.Value, active: ir.Value, change: int,
                   share: ir.Value, now: ir.Value) -> None:
        e.store(i64(change), e.offset(team, _TRY))
        e.store(share, e.offset(team, _BEFORE))
        self._change(e, team, active, change, now)

    def _change(self, e: Emitter, team: ir.Value, active: ir.Value, change: int,
                now: ir.Value) -> None:
        """One worker more or less from the next run on."""
        e.store(now, e.offset(team, _CHANGED))
        if change > 0:  # that worker was away: it counts tiles like the others from now on
            own, first = worker_block(e, team, active), worker_block(e, team, i64(0))
            e.store(e.load(e.offset(first, TURN), I64), e.offset(own, TURN))
            for turn in (0, 8):
                e.store(i64(0), e.offset(own, TAKEN + turn))
        number = e.b.trunc(e.b.add(active, i64(change)), I32)
        e.b.atomic_rmw("xchg", e.offset(team, ACTIVE), number, "seq_cst")
        if change > 0:
            e.call("llmc_team_wake", VOID, e.offset(team, ACTIVE), e.offset(team, ACTIVE_SLEEPERS))
