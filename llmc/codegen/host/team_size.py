"""How many workers of a team run: fewer than there are while other processes take CPUs from them.

A worker that lost its CPU keeps all others waiting at the next barrier, for milliseconds each time:
four workers beside one busy process were slower than one alone. Three of them lose a quarter.

After each run: where the workers were parked at barriers for longer, together, than one of them
worked, and at least one had lost its CPU (the system counts that; or there are fewer CPUs than
workers), the next runs have one worker less. Later, one more is tried; where that fails again, the
next try waits twice as long. A run in which nobody parks costs one system call a worker, and never
changes anything.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.llvm import I8, I32, I64, POINTER, VOID, Emitter, define, i32, i64

RESIZE = "llmc_team_resize"

# The part of the team's memory (see team.py) that this module shares.
BLOCK = 128
WORKERS, SPINS = 0, 8
ACTIVE, ACTIVE_SLEEPERS = 7 * BLOCK, 7 * BLOCK + 4
LOST, PREEMPTED = 8 * BLOCK, 8 * BLOCK + 8
_CHANGED, _PATIENCE = 8 * BLOCK + 16, 8 * BLOCK + 24
THREADS = 9 * BLOCK
TURN, TAKEN = 24, 32  # in a worker's block: see shares.py
FEW_POLLS = 1  # of SPINS: there are fewer CPUs than workers

_PATIENCE_LEAST, _PATIENCE_MOST = 32_000_000, 2_048_000_000  # nanoseconds
_NOW, _PREEMPTIONS = "llmc_team_now", "llmc_team_preemptions"
_CLOCK_MONOTONIC, _RUSAGE_THREAD = 1, 1  # of Linux
_RUSAGE_BYTES, _INVOLUNTARY_SWITCHES = 144, 136


def is_null(e: Emitter, pointer: ir.Value) -> ir.Value:
    return e.b.icmp_unsigned("==", e.b.ptrtoint(pointer, I64), i64(0))


def worker_block(e: Emitter, team: ir.Value, worker: ir.Value) -> ir.Value:
    """A worker's own block of the team."""
    offset = e.b.add(e.b.mul(worker, i64(BLOCK)), i64(THREADS))
    return e.b.gep(team, [offset], source_etype=I8)


class TeamSize:
    """Emits what decides the size. Elsewhere than on Linux, which can tell who lost its CPU, all
    workers always run."""

    def __init__(self, module: ir.Module, is_linux: bool):
        self.module = module
        self.is_linux = is_linux

    def emit_clocks(self) -> None:
        """i64 now(): nanoseconds; i64 preemptions(): how often this thread lost its CPU."""
        _, e = define(self.module, _NOW, I64, [])
        if self.is_linux:
            time = e.stack(I64, 2)
            e.call("clock_gettime", I32, i32(_CLOCK_MONOTONIC), time)
            seconds = e.b.mul(e.load(time, I64), i64(1_000_000_000))
            e.b.ret(e.b.add(seconds, e.load(e.offset(time, 8), I64)))
        else:
            e.b.ret(i64(0))
        _, e = define(self.module, _PREEMPTIONS, I64, [])
        if self.is_linux:
            usage = e.stack(I8, _RUSAGE_BYTES)
            e.call("getrusage", I32, i32(_RUSAGE_THREAD), usage)
            e.b.ret(e.load(e.offset(usage, _INVOLUNTARY_SWITCHES), I64))
        else:
            e.b.ret(i64(0))

    def now(self, e: Emitter) -> ir.Value:
        return e.call(_NOW, I64)

    def preemptions(self, e: Emitter) -> ir.Value:
        return e.call(_PREEMPTIONS, I64)

    def emit(self) -> None:
        """void resize(team, i64 began): after a run, while nobody works."""
        function, e = define(self.module, RESIZE, VOID, [POINTER, I64], attributes=("noinline",))
        team, began = function.args
        lost = e.load(e.offset(team, LOST), I64)
        workers = e.load(e.offset(team, WORKERS), I64)
        active = e.b.zext(e.load(e.offset(team, ACTIVE), I32), I64)
        undisturbed = e.b.and_(e.b.icmp_signed("==", lost, i64(0)),
                               e.b.icmp_signed("==", active, workers))
        with e.b.if_then(undisturbed, likely=True):
            e.b.ret_void()
        now = self.now(e)
        since = e.b.sub(now, e.load(e.offset(team, _CHANGED), I64))
        patience = e.load(e.offset(team, _PATIENCE), I64)
        # One worker less takes active / (active - 1) of the time, if nobody waits then.
        spent = e.b.mul(e.b.sub(now, began), e.b.sub(active, i64(1)))
        wasted = e.b.icmp_signed(">", e.b.mul(lost, active), spent)
        robbed = e.b.or_(
            e.b.icmp_signed("!=", e.load(e.offset(team, PREEMPTED), I64), i64(0)),
            e.b.icmp_signed("==", e.load(e.offset(team, SPINS), I32), i32(FEW_POLLS)))
        with e.b.if_then(e.b.and_(wasted, robbed)):
            soon = e.b.icmp_signed("<", since, patience)
            longer = e.minimum(e.b.mul(patience, i64(2)), i64(_PATIENCE_MOST))
            e.store(e.b.select(soon, longer, i64(_PATIENCE_LEAST)), e.offset(team, _PATIENCE))
            self._set(e, team, e.b.sub(active, i64(1)), now)
            e.b.ret_void()
        waited = e.b.icmp_signed(">=", since, patience)
        with e.b.if_then(e.b.and_(waited, e.b.icmp_signed("<", active, workers))):
            self._join(e, team, active)
            self._set(e, team, e.b.add(active, i64(1)), now)
            e.call("llmc_team_wake", VOID, e.offset(team, ACTIVE), e.offset(team, ACTIVE_SLEEPERS))
        e.b.ret_void()

    def _join(self, e: Emitter, team: ir.Value, worker: ir.Value) -> None:
        """Let a worker that was away count tiles like the others."""
        own, first = worker_block(e, team, worker), worker_block(e, team, i64(0))
        e.store(e.load(e.offset(first, TURN), I64), e.offset(own, TURN))
        for turn in (0, 8):
            e.store(i64(0), e.offset(own, TAKEN + turn))

    def _set(self, e: Emitter, team: ir.Value, active: ir.Value, now: ir.Value) -> None:
        e.store(now, e.offset(team, _CHANGED))
        e.b.atomic_rmw("xchg", e.offset(team, ACTIVE), e.b.trunc(active, I32), "seq_cst")
