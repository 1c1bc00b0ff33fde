"""The thread team as LLVM IR: it lives in the object, and needs only libc and pthread symbols.

C ABI of what `emit` defines (`i64` arguments):

    void *llmc_team_create(i64 workers)      starts workers - 1 threads; the caller is worker 0
    void  llmc_team_run(void *team, void (*fn)(void *, i64 worker, i64 workers), void *argument)
    void  llmc_barrier(void *team)           inside fn: waits for all workers
    void  llmc_team_destroy(void *team)      joins the threads, frees the team

`llmc_team_create` returns null without memory. Where the system refuses a thread, the team is
smaller; where other processes take its CPUs, fewer of its workers run (team_size.py): fn is told
the true number. One thread at a time may call run. Threads do not survive fork(): a child must
create its own team.

A waiting thread spins (some tens of microseconds), then parks on a futex, so an idle team costs no
CPU time. With more workers than CPUs, threads park at once: spinning would keep the CPU from those
that are waited for. Where there is no futex, parked threads sleep and look again.

The team in memory; each group has a 128-byte block of its own (two lines: they are fetched in
pairs), so that writes to one do not disturb readers of another:

    block 0   i64 workers                     fixed after create
              i32 spins                       polls before a thread parks
    block 1   i32 generation                  what idle threads watch: the number of runs, shifted
                                              by 11 bits, and how many workers this run has
    block 2   i32 idle sleepers               threads parked on generation
    block 3   ptr fn, ptr argument, i32 stop  written before generation moves
    block 4   i32 arrived                     workers at the barrier
    block 5   i32 phase                       +1 when the last worker arrives; what waiters watch
    block 6   i32 barrier sleepers            threads parked on phase
    block 7   i32 active                      workers of a run; what those beyond it watch
              i32 active sleepers             threads parked on active
    block 8   i64 lost, i64 worked            nanoseconds that workers were parked at barriers,
                                              and had a CPU, together; what team_size.py counts
    block 9   from here a block for each worker: i64 thread, ptr team, i64 worker, and what
              shares.py and team_size.py count
"""

from __future__ import annotations

import llvmlite.binding as llvm
import llvmlite.ir as ir

from llmc.codegen.host.shares import Shares
from llmc.codegen.host.team_size import (
    ACTIVE,
    ACTIVE_SLEEPERS,
    BLOCK,
    COUNTING,
    LOST,
    RESIZE,
    THREADS,
    WORKED,
    WORKERS,
    TeamSize,
    is_null,
    worker_block,
)
from llmc.codegen.llvm import I32, I64, POINTER, VOID, Emitter, define, i32, i64

RUN = "llmc_team_run"
BARRIER = "llmc_barrier"
CREATE = "llmc_team_create"
DESTROY = "llmc_team_destroy"
WORK = ir.FunctionType(VOID, [POINTER, I64, I64])
NULL = ir.Constant(POINTER, None)

_SPINS = 8
_GENERATION, _IDLE_SLEEPERS = BLOCK, 2 * BLOCK
_FUNCTION, _ARGUMENT, _STOP = 3 * BLOCK, 3 * BLOCK + 8, 3 * BLOCK + 16
_ARRIVED, _PHASE, _BARRIER_SLEEPERS = 4 * BLOCK, 5 * BLOCK, 6 * BLOCK
_ACTIVE_BITS = 11  # of generation: 2047 workers, and 2 million runs until numbers come again
_ACTIVE_MASK = (1 << _ACTIVE_BITS) - 1
_SPIN_POLLS = 3000
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE, _EVERYONE = 128, 129, 0x7FFFFFFF
_NO_FUTEX = -1
_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "arm64": 98, "riscv64": 98}
_AFFINITY_WORDS = 16  # masks of up to 1024 CPUs


def emit(module: ir.Module, linkage: str = "external") -> None:
    """Adds the four functions to a module, for the system and processor of module.triple.

    linkage: "external" exports them; "internal" keeps them inside the object.
    """
    _Team(module, linkage).emit()


def available_cpus(e: Emitter) -> ir.Value:
    """CPUs that this process may use, i64; 0: unknown (more than the mask holds)."""
    mask = e.stack(I64, _AFFINITY_WORDS)
    with e.loop(0, _AFFINITY_WORDS) as i:
        e.store(i64(0), e.offset(mask, i, I64))
    e.call("sched_getaffinity", I32, i32(0), i64(8 * _AFFINITY_WORDS), mask)
    with e.fold(0, _AFFINITY_WORDS, [i64(0)]) as (i, (total,), finish):
        word = e.load(e.offset(mask, i, I64), I64)
        finish([e.b.add(total, e.call("llvm.ctpop.i64", I64, word))])
    return finish.results[0]


class _Team:
    def __init__(self, module: ir.Module, linkage: str):
        self.module = module
        self.linkage = linkage
        triple = module.triple or llvm.get_default_triple()
        self.processor = triple.split("-")[0]
        self.is_linux = "linux" in triple
        numbers = _FUTEX_NUMBERS if self.is_linux else {}
        self.futex = numbers.get(self.processor, _NO_FUTEX)
        self.size = TeamSize(module, self.is_linux)

    def emit(self) -> None:
        self.size.emit_clocks()
        self._define_wait()
        self._define_wake()
        self._define_arrive()
        self._define_barrier()
        self.size.emit()
        self._define_work()
        self._define_worker()
        self._define_run()
        self._define_polls()
        self._define_create()
        self._define_destroy()
        Shares(self.module).emit()

    def _exported(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> Emitter:
        function, e = define(self.module, name, result, arguments, internal=False)
        if self.linkage != "external":
            function.linkage = self.linkage
        return e

    # ---- waiting ----------------------------------------------------------------------------

    def _define_wait(self) -> None:
        """void llmc_team_wait(ptr word, ptr sleepers, i32 old, i32 polls, ptr lost): until *word
        != old. lost: i64, or null: the nanoseconds that the thread was parked are added to it."""
        function, e = define(self.module, "llmc_team_wait", VOID,
                             [POINTER, POINTER, I32, I32, POINTER], attributes=("noinline",))
        word, sleepers, old, polls, lost = function.args
        spin, again, park, parked, leave, done = (
            function.append_basic_block(name)
            for name in ("spin", "again", "park", "parked", "leave", "done"))
        entry = e.b.block
        e.b.branch(spin)

        e.b.position_at_end(spin)
        count = e.b.phi(I32)
        count.add_incoming(i32(0), entry)
        moved = e.b.icmp_signed("!=", e.b.load_atomic(word, "acquire", 4, typ=I32), old)
        e.b.cbranch(moved, done, again)
        e.b.position_at_end(again)
        self._pause(e)
        next_count = e.b.add(count, i32(1))
        count.add_incoming(next_count, again)
        e.b.cbranch(e.b.icmp_signed("<", next_count, polls), spin, park)

        e.b.position_at_end(park)
        began = self.size.now(e)
        # Ordered before the check of *word below, as wake's write is before its look at sleepers.
        e.b.atomic_rmw("add", sleepers, i32(1), "seq_cst")
        e.b.branch(parked)
        e.b.position_at_end(parked)
        self._sleep(e, word, old)
        moved = e.b.icmp_signed("!=", e.b.load_atomic(word, "acquire", 4, typ=I32), old)
        e.b.cbranch(moved, leave, parked)
        e.b.position_at_end(leave)
        e.b.atomic_rmw("sub", sleepers, i32(1), "monotonic")
        with e.b.if_then(e.b.not_(is_null(e, lost))):
            e.b.atomic_rmw("add", lost, e.b.sub(self.size.now(e), began), "monotonic")
        e.b.branch(done)
        e.b.position_at_end(done)
        e.b.ret_void()

    def _pause(self, e: Emitter) -> None:
        if self.processor in ("x86_64", "i386", "i686"):
            e.call("llvm.x86.sse2.pause", VOID)
        elif self.processor in ("aarch64", "arm64"):
            e.call("llvm.aarch64.isb", VOID, i32(15))  # unlike yield, it really takes a while

    def _sleep(self, e: Emitter, word: ir.Value, old: ir.Value) -> None:
        """Parks while *word == old; may return early."""
        if self.futex != _NO_FUTEX:
            self._syscall(e, word, _FUTEX_WAIT_PRIVATE, old)
        else:
            e.call("usleep", I32, i32(50))

    def _syscall(self, e: Emitter, word: ir.Value, operation: int, value: ir.Value) -> None:
        function = self.module.globals.get("syscall")
        if function is None:
            signature = ir.FunctionType(I64, [I64], var_arg=True)
            function = ir.Function(self.module, signature, "syscall")
        e.b.call(function, [i64(self.futex), word, i64(operation), e.b.sext(value, I64), NULL])

    def _define_wake(self) -> None:
        """void llmc_team_wake(ptr word, ptr sleepers): after *word has moved."""
        function, e = define(self.module, "llmc_team_wake", VOID, [POINTER, POINTER])
        word, sleepers = function.args
        count = e.b.load_atomic(sleepers, "seq_cst", 4, typ=I32)
        with e.b.if_then(e.b.icmp_signed("!=", count, i32(0)), likely=False):
            if self.futex != _NO_FUTEX:
                self._syscall(e, word, _FUTEX_WAKE_PRIVATE, i32(_EVERYONE))
        e.b.ret_void()

    # ---- the barrier ------------------------------------------------------------------------

    def _define_arrive(self) -> None:
        """i32 llmc_team_arrive(ptr team): the phase that this barrier ends."""
        function, e = define(self.module, "llmc_team_arrive", I32, [POINTER])
        team = function.args[0]
        phase_word = e.offset(team, _PHASE)
        # Cannot move before this worker has arrived.
        phase = e.b.load_atomic(phase_word, "monotonic", 4, typ=I32)
        before = e.b.atomic_rmw("add", e.offset(team, _ARRIVED), i32(1), "acq_rel")
        last = e.b.sub(e.load(e.offset(team, ACTIVE), I32), i32(1))
        with e.b.if_then(e.b.icmp_signed("==", before, last)):
            e.store(i32(0), e.offset(team, _ARRIVED))  # the others look again after phase moved
            e.b.atomic_rmw("add", phase_word, i32(1), "seq_cst")
            e.call("llmc_team_wake", VOID, phase_word, e.offset(team, _BARRIER_SLEEPERS))
        e.b.ret(phase)

    def _define_barrier(self) -> None:
        e = self._exported(BARRIER, VOID, [POINTER])
        team = e.b.function.args[0]
        phase = e.call("llmc_team_arrive", I32, team)
        e.call("llmc_team_wait", VOID, e.offset(team, _PHASE), e.offset(team, _BARRIER_SLEEPERS),
               phase, e.load(e.offset(team, _SPINS), I32), e.offset(team, LOST))
        e.b.ret_void()

    # ---- runs -------------------------------------------------------------------------------

    def _define_work(self) -> None:
        """void llmc_team_work(ptr team, i64 worker, i64 active): a worker's part of a run."""
        function, e = define(self.module, "llmc_team_work", VOID, [POINTER, I64, I64])
        team, worker, active = function.args
        counting = e.b.icmp_signed("!=", e.load(e.offset(team, COUNTING), I64), i64(0))
        before = e.stack(I64)
        with e.b.if_then(counting, likely=False):
            e.store(self.size.cpu_time(e), before)
        # By way of an integer: llvmlite calls typed pointers only.
        work = e.b.inttoptr(e.load(e.offset(team, _FUNCTION), I64), WORK.as_pointer())
        e.b.call(work, [e.load(e.offset(team, _ARGUMENT), POINTER), worker, active])
        with e.b.if_then(counting, likely=False):
            worked = e.b.sub(self.size.cpu_time(e), e.load(before, I64))
            e.b.atomic_rmw("add", e.offset(team, WORKED), worked, "monotonic")
        e.b.ret_void()

    def _define_worker(self) -> None:
        """ptr llmc_team_worker(ptr thread): a thread's life; thread is its block of the team."""
        function, e = define(self.module, "llmc_team_worker", POINTER, [POINTER])
        thread = function.args[0]
        team = e.load(e.offset(thread, 8), POINTER)
        worker = e.load(e.offset(thread, 16), I64)
        generation = e.offset(team, _GENERATION)
        idle, called, running, excused, stopped = (
            function.append_basic_block(name)
            for name in ("idle", "called", "running", "excused", "stopped"))
        entry = e.b.block
        e.b.branch(idle)

        e.b.position_at_end(idle)
        seen = e.b.phi(I32)
        seen.add_incoming(i32(0), entry)
        e.call("llmc_team_wait", VOID, generation, e.offset(team, _IDLE_SLEEPERS), seen,
               e.load(e.offset(team, _SPINS), I32), NULL)
        stop = e.load(e.offset(team, _STOP), I32)
        e.b.cbranch(e.b.icmp_signed("!=", stop, i32(0)), stopped, called)

        e.b.position_at_end(called)
        # A run waits for all workers that it has: of those, none can miss it or see the next one.
        now = e.b.load_atomic(generation, "acquire", 4, typ=I32)
        active = e.b.zext(e.b.and_(now, i32(_ACTIVE_MASK)), I64)
        e.b.cbranch(e.b.icmp_signed("<", worker, active), running, excused)
        e.b.position_at_end(running)
        e.call("llmc_team_work", VOID, team, worker, active)
        e.call("llmc_team_arrive", I32, team)
        seen.add_incoming(now, running)
        e.b.branch(idle)
        e.b.position_at_end(excused)
        self._wait_until_active(e, team, worker)
        seen.add_incoming(now, e.b.block)
        e.b.branch(idle)
        e.b.position_at_end(stopped)
        e.b.ret(NULL)

    def _wait_until_active(self, e: Emitter, team: ir.Value, worker: ir.Value) -> None:
        head, wait, done = (e.b.append_basic_block(f"active.{name}")
                            for name in ("head", "wait", "done"))
        word = e.offset(team, ACTIVE)
        e.b.branch(head)
        e.b.position_at_end(head)
        active = e.b.load_atomic(word, "acquire", 4, typ=I32)
        e.b.cbranch(e.b.icmp_signed("<", worker, e.b.zext(active, I64)), done, wait)
        e.b.position_at_end(wait)
        e.call("llmc_team_wait", VOID, word, e.offset(team, ACTIVE_SLEEPERS), active, i32(1), NULL)
        e.b.branch(head)
        e.b.position_at_end(done)

    def _start_generation(self, e: Emitter, team: ir.Value) -> None:
        generation = e.offset(team, _GENERATION)
        old = e.b.load_atomic(generation, "monotonic", 4, typ=I32)
        number = e.b.add(e.b.or_(old, i32(_ACTIVE_MASK)), i32(1))
        following = e.b.or_(number, e.load(e.offset(team, ACTIVE), I32))
        e.b.atomic_rmw("xchg", generation, following, "seq_cst")
        e.call("llmc_team_wake", VOID, generation, e.offset(team, _IDLE_SLEEPERS))

    def _define_run(self) -> None:
        e = self._exported(RUN, VOID, [POINTER, POINTER, POINTER])
        team, work, argument = e.b.function.args
        e.store(work, e.offset(team, _FUNCTION))
        e.store(argument, e.offset(team, _ARGUMENT))
        began = self.size.now(e)
        active = e.b.zext(e.load(e.offset(team, ACTIVE), I32), I64)
        self._start_generation(e, team)
        e.call("llmc_team_work", VOID, team, i64(0), active)
        e.call(BARRIER, VOID, team)
        e.call(RESIZE, VOID, team, began)
        e.b.ret_void()

    # ---- creation ---------------------------------------------------------------------------

    def _define_polls(self) -> None:
        """i32 llmc_team_polls(i64 workers): few when the process has fewer CPUs than workers."""
        function, e = define(self.module, "llmc_team_polls", I32, [I64])
        if not self.is_linux:
            e.b.ret(i32(_SPIN_POLLS))
            return
        cpus = available_cpus(e)
        # No answer (more CPUs than the mask holds) counts as plenty.
        plenty = e.b.or_(e.b.icmp_signed("==", cpus, i64(0)),
                         e.b.icmp_signed(">=", cpus, function.args[0]))
        e.b.ret(e.b.select(plenty, i32(_SPIN_POLLS), i32(1)))

    def _define_create(self) -> None:
        e = self._exported(CREATE, POINTER, [I64])
        workers = e.b.function.args[0]
        size = e.b.add(e.b.mul(workers, i64(BLOCK)), i64(THREADS))
        slot = e.stack(POINTER)
        code = e.call("posix_memalign", I32, slot, i64(BLOCK), size)
        with e.b.if_then(e.b.icmp_signed("!=", code, i32(0)), likely=False):
            e.b.ret(NULL)
        team = e.load(slot, POINTER)
        e.call("memset", POINTER, team, i32(0), size)
        e.store(e.call("llmc_team_polls", I32, workers), e.offset(team, _SPINS))
        started = self._start_threads(e, team, workers)
        e.store(started, e.offset(team, WORKERS))
        e.store(e.b.trunc(started, I32), e.offset(team, ACTIVE))
        e.b.ret(team)

    def _start_threads(self, e: Emitter, team: ir.Value, workers: ir.Value) -> ir.Value:
        """Workers in the team, caller included; stops at the first thread that is refused."""
        worker_function = self.module.globals["llmc_team_worker"]
        head, body, counted, done = (e.b.append_basic_block(name)
                                     for name in ("head", "start", "counted", "started"))
        entry = e.b.block
        e.b.branch(head)
        e.b.position_at_end(head)
        worker = e.b.phi(I64)
        worker.add_incoming(i64(1), entry)
        e.b.cbranch(e.b.icmp_signed("<", worker, workers), body, done)
        e.b.position_at_end(body)
        thread = worker_block(e, team, worker)
        e.store(team, e.offset(thread, 8))
        e.store(worker, e.offset(thread, 16))
        code = e.call("pthread_create", I32, thread, NULL, worker_function, thread)
        e.b.cbranch(e.b.icmp_signed("==", code, i32(0)), counted, done)
        e.b.position_at_end(counted)
        worker.add_incoming(e.b.add(worker, i64(1)), counted)
        e.b.branch(head)
        e.b.position_at_end(done)
        return worker

    def _define_destroy(self) -> None:
        e = self._exported(DESTROY, VOID, [POINTER])
        team = e.b.function.args[0]
        e.store(i32(1), e.offset(team, _STOP))
        self._start_generation(e, team)
        workers = e.load(e.offset(team, WORKERS), I64)
        e.b.atomic_rmw("xchg", e.offset(team, ACTIVE), e.b.trunc(workers, I32), "seq_cst")
        e.call("llmc_team_wake", VOID, e.offset(team, ACTIVE), e.offset(team, ACTIVE_SLEEPERS))
        with e.loop(1, workers) as worker:
            handle = e.load(worker_block(e, team, worker), I64)
            e.call("pthread_join", I32, handle, NULL)
        e.call("free", VOID, team)
        e.b.ret_void()
