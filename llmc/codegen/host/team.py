"""The thread team as LLVM IR: it lives in the object, and needs only libc and pthread symbols.

C ABI of what `emit` defines (`i64` arguments):

    void *llmc_team_create(i64 workers)      starts workers - 1 threads; the caller is worker 0
    void  llmc_team_run(void *team, void (*fn)(void *, i64 worker, i64 workers), void *argument)
    void  llmc_barrier(void *team)           inside fn: waits for all workers
    void  llmc_team_destroy(void *team)      joins the threads, frees the team

`llmc_team_create` returns null without memory. Where the system refuses a thread, the team is
smaller: fn is told the true number of workers. One thread at a time may call run. Threads do not
survive fork(): a child must create its own team.

A waiting thread spins (some tens of microseconds), then parks on a futex, so an idle team costs no
CPU time. With more workers than CPUs, threads park at once: spinning would keep the CPU from those
that are waited for. Where there is no futex, parked threads sleep and look again.

The team in memory; each group has a 128-byte block of its own (two lines: they are fetched in
pairs), so that writes to one do not disturb readers of another:

    block 0   i64 workers                     fixed after create
              i32 spins                       polls before a thread parks
    block 1   i32 generation                  +1 for each run; what idle threads watch
    block 2   i32 idle sleepers               threads parked on generation
    block 3   ptr fn, ptr argument, i32 stop  written before generation moves
    block 4   i32 arrived                     workers at the barrier
    block 5   i32 phase                       +1 when the last worker arrives; what waiters watch
    block 6   i32 barrier sleepers            threads parked on phase
    block 7   from here, workers x {i64 thread, ptr team, i64 worker}
"""

from __future__ import annotations

import llvmlite.binding as llvm
import llvmlite.ir as ir

from llmc.codegen.llvm import I8, I32, I64, POINTER, VOID, Emitter, define, i32, i64

RUN = "llmc_team_run"
BARRIER = "llmc_barrier"
CREATE = "llmc_team_create"
DESTROY = "llmc_team_destroy"
WORK = ir.FunctionType(VOID, [POINTER, I64, I64])

_BLOCK = 128
_WORKERS, _SPINS = 0, 8
_GENERATION, _IDLE_SLEEPERS = _BLOCK, 2 * _BLOCK
_FUNCTION, _ARGUMENT, _STOP = 3 * _BLOCK, 3 * _BLOCK + 8, 3 * _BLOCK + 16
_ARRIVED, _PHASE, _BARRIER_SLEEPERS = 4 * _BLOCK, 5 * _BLOCK, 6 * _BLOCK
_THREADS, _THREAD_BYTES = 7 * _BLOCK, 24

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

    def emit(self) -> None:
        self._define_wait()
        self._define_wake()
        self._define_arrive()
        self._define_barrier()
        self._define_worker()
        self._define_run()
        self._define_polls()
        self._define_create()
        self._define_destroy()

    def _exported(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> Emitter:
        function, e = define(self.module, name, result, arguments, internal=False)
        if self.linkage != "external":
            function.linkage = self.linkage
        return e

    # ---- waiting ----------------------------------------------------------------------------

    def _define_wait(self) -> None:
        """void llmc_team_wait(ptr word, ptr sleepers, i32 old, i32 polls): until *word != old."""
        function, e = define(self.module, "llmc_team_wait", VOID, [POINTER, POINTER, I32, I32],
                             attributes=("noinline",))
        word, sleepers, old, polls = function.args
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
        # Ordered before the check of *word below, as wake's write is before its look at sleepers.
        e.b.atomic_rmw("add", sleepers, i32(1), "seq_cst")
        e.b.branch(parked)
        e.b.position_at_end(parked)
        self._sleep(e, word, old)
        moved = e.b.icmp_signed("!=", e.b.load_atomic(word, "acquire", 4, typ=I32), old)
        e.b.cbranch(moved, leave, parked)
        e.b.position_at_end(leave)
        e.b.atomic_rmw("sub", sleepers, i32(1), "monotonic")
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
        null = ir.Constant(POINTER, None)
        e.b.call(function, [i64(self.futex), word, i64(operation), e.b.sext(value, I64), null])

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
        last = e.b.sub(e.b.trunc(e.load(e.offset(team, _WORKERS), I64), I32), i32(1))
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
               phase, e.load(e.offset(team, _SPINS), I32))
        e.b.ret_void()

    # ---- runs -------------------------------------------------------------------------------

    def _call_work(self, e: Emitter, team: ir.Value, worker: ir.Value) -> None:
        # By way of an integer: llvmlite calls typed pointers only.
        work = e.b.inttoptr(e.load(e.offset(team, _FUNCTION), I64), WORK.as_pointer())
        argument = e.load(e.offset(team, _ARGUMENT), POINTER)
        workers = e.load(e.offset(team, _WORKERS), I64)
        e.b.call(work, [argument, worker, workers])

    def _define_worker(self) -> None:
        """ptr llmc_team_worker(ptr thread): a thread's life; thread is its {id, team, worker}."""
        function, e = define(self.module, "llmc_team_worker", POINTER, [POINTER])
        thread = function.args[0]
        team = e.load(e.offset(thread, 8), POINTER)
        worker = e.load(e.offset(thread, 16), I64)
        generation = e.offset(team, _GENERATION)
        idle, running, stopped = (function.append_basic_block(name)
                                  for name in ("idle", "running", "stopped"))
        entry = e.b.block
        e.b.branch(idle)

        e.b.position_at_end(idle)
        seen = e.b.phi(I32)
        seen.add_incoming(i32(0), entry)
        e.call("llmc_team_wait", VOID, generation, e.offset(team, _IDLE_SLEEPERS), seen,
               e.load(e.offset(team, _SPINS), I32))
        stop = e.load(e.offset(team, _STOP), I32)
        e.b.cbranch(e.b.icmp_signed("!=", stop, i32(0)), stopped, running)

        e.b.position_at_end(running)
        self._call_work(e, team, worker)
        e.call("llmc_team_arrive", I32, team)
        # The next run cannot start before this one's barrier, so exactly one generation is over.
        seen.add_incoming(e.b.add(seen, i32(1)), running)
        e.b.branch(idle)
        e.b.position_at_end(stopped)
        e.b.ret(ir.Constant(POINTER, None))

    def _start_generation(self, e: Emitter, team: ir.Value) -> None:
        generation = e.offset(team, _GENERATION)
        e.b.atomic_rmw("add", generation, i32(1), "seq_cst")
        e.call("llmc_team_wake", VOID, generation, e.offset(team, _IDLE_SLEEPERS))

    def _define_run(self) -> None:
        e = self._exported(RUN, VOID, [POINTER, POINTER, POINTER])
        team, work, argument = e.b.function.args
        e.store(work, e.offset(team, _FUNCTION))
        e.store(argument, e.offset(team, _ARGUMENT))
        self._start_generation(e, team)
        self._call_work(e, team, i64(0))
        e.call(BARRIER, VOID, team)
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
        size = e.b.add(e.b.mul(workers, i64(_THREAD_BYTES)), i64(_THREADS))
        slot = e.stack(POINTER)
        code = e.call("posix_memalign", I32, slot, i64(_BLOCK), size)
        with e.b.if_then(e.b.icmp_signed("!=", code, i32(0)), likely=False):
            e.b.ret(ir.Constant(POINTER, None))
        team = e.load(slot, POINTER)
        e.call("memset", POINTER, team, i32(0), size)
        e.store(e.call("llmc_team_polls", I32, workers), e.offset(team, _SPINS))
        started = self._start_threads(e, team, workers)
        e.store(started, e.offset(team, _WORKERS))
        e.b.ret(team)

    def _start_threads(self, e: Emitter, team: ir.Value, workers: ir.Value) -> ir.Value:
        """Workers in the team, caller included; stops at the first thread that is refused."""
        worker_function = self.module.globals["llmc_team_worker"]
        null = ir.Constant(POINTER, None)
        head, body, counted, done = (e.b.append_basic_block(name)
                                     for name in ("head", "start", "counted", "started"))
        entry = e.b.block
        e.b.branch(head)
        e.b.position_at_end(head)
        worker = e.b.phi(I64)
        worker.add_incoming(i64(1), entry)
        e.b.cbranch(e.b.icmp_signed("<", worker, workers), body, done)
        e.b.position_at_end(body)
        thread = self._thread(e, team, worker)
        e.store(team, e.offset(thread, 8))
        e.store(worker, e.offset(thread, 16))
        code = e.call("pthread_create", I32, thread, null, worker_function, thread)
        e.b.cbranch(e.b.icmp_signed("==", code, i32(0)), counted, done)
        e.b.position_at_end(counted)
        worker.add_incoming(e.b.add(worker, i64(1)), counted)
        e.b.branch(head)
        e.b.position_at_end(done)
        return worker

    def _thread(self, e: Emitter, team: ir.Value, worker: ir.Value) -> ir.Value:
        offset = e.b.add(e.b.mul(worker, i64(_THREAD_BYTES)), i64(_THREADS))
        return e.b.gep(team, [offset], source_etype=I8)

    def _define_destroy(self) -> None:
        e = self._exported(DESTROY, VOID, [POINTER])
        team = e.b.function.args[0]
        e.store(i32(1), e.offset(team, _STOP))
        self._start_generation(e, team)
        with e.loop(1, e.load(e.offset(team, _WORKERS), I64)) as worker:
            handle = e.load(self._thread(e, team, worker), I64)
            e.call("pthread_join", I32, handle, ir.Constant(POINTER, None))
        e.call("free", VOID, team)
        e.b.ret_void()
