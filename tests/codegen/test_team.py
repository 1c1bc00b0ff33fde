"""The thread team: stress of runs and barriers, idle CPU time, latency."""

import ctypes
import os
import time

import llvmlite.binding as llvm
import llvmlite.ir as ir
import pytest

from llmc.codegen.host import team
from llmc.codegen.llvm import I64, POINTER, VOID, define, emit_object, i64

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

SLOT = 64


def stress_module(machine):
    """Adds `stress(ptr memory, worker, workers)` and `spin(...)`: only barriers.

    memory: i64 rounds, ptr team, i64 errors of worker 0.., then a slot of 64 bytes for each worker.
    """
    module = ir.Module("team")
    module.triple = machine.triple
    team.emit(module)
    for name, checked in (("stress", True), ("spin", False)):
        _, e = define(module, name, VOID, [POINTER, I64, I64], internal=False)
        memory, worker, workers = e.b.function.args
        rounds, group = e.load(memory, I64), e.load(e.offset(memory, 8), POINTER)
        with e.loop(0, rounds) as turn:
            if checked:
                emit_round(e, memory, worker, workers, turn, group)
            e.call(team.BARRIER, VOID, group)
        e.b.ret_void()
    return str(module)


def emit_round(e, memory, worker, workers, turn, group):
    """Every worker writes its slot, waits, and checks that it sees all writes of this turn."""
    mine = e.offset(memory, e.b.mul(e.b.add(worker, i64(1)), i64(SLOT)))
    e.store(turn, mine)
    e.call(team.BARRIER, VOID, group)
    with e.loop(1, e.b.add(workers, i64(1))) as other:
        seen = e.load(e.offset(memory, e.b.mul(other, i64(SLOT))), I64)
        with e.b.if_then(e.b.icmp_signed("!=", seen, turn)):
            errors = e.offset(mine, 8)
            e.store(e.b.add(e.load(errors, I64), i64(1)), errors)
    done = e.offset(mine, 16)
    e.store(e.b.add(e.load(done, I64), i64(1)), done)


@pytest.fixture(scope="module")
def library():
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3,
        reloc="pic", codemodel="small")
    code, _ = emit_object(stress_module(machine), machine)
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    names = (team.CREATE, team.RUN, team.BARRIER, team.DESTROY, "stress", "spin")
    for name in names:
        builder.export_symbol(name)
    jit = llvm.create_lljit_compiler(machine)
    loaded = builder.link(jit, "team")
    yield Library({name: loaded[name] for name in names})
    loaded.close()


class Library:
    def __init__(self, addresses):
        self.addresses = addresses
        pointer = ctypes.c_void_p
        self.create = ctypes.CFUNCTYPE(pointer, ctypes.c_int64)(addresses[team.CREATE])
        self.run = ctypes.CFUNCTYPE(None, pointer, pointer, pointer)(addresses[team.RUN])
        self.destroy = ctypes.CFUNCTYPE(None, pointer)(addresses[team.DESTROY])

    def memory(self, group, workers, rounds):
        words = (ctypes.c_int64 * (SLOT // 8 * (workers + 1)))()
        words[0], words[1] = rounds, group
        return words


@pytest.mark.parametrize("workers", range(1, 9))
def test_barriers_order_all_writes(library, workers):
    group = library.create(workers)
    runs, rounds = 500, 5
    memory = library.memory(group, workers, rounds)
    for _ in range(runs):
        library.run(group, library.addresses["stress"], ctypes.addressof(memory))
    library.destroy(group)
    for worker in range(1, workers + 1):
        _, errors, done = memory[worker * 8:worker * 8 + 3]
        assert (errors, done) == (0, runs * rounds)


def test_many_barriers_in_one_run(library):
    group = library.create(4)
    memory = library.memory(group, 4, 20_000)
    library.run(group, library.addresses["stress"], ctypes.addressof(memory))
    library.destroy(group)
    assert [memory[worker * 8 + 1] for worker in range(1, 5)] == [0] * 4
    assert [memory[worker * 8 + 2] for worker in range(1, 5)] == [20_000] * 4


def test_parked_workers_wake_up(library):
    group = library.create(3)
    memory = library.memory(group, 3, 1)
    for _ in range(20):
        library.run(group, library.addresses["stress"], ctypes.addressof(memory))
        time.sleep(0.005)
    library.destroy(group)
    assert [memory[worker * 8 + 2] for worker in range(1, 4)] == [20] * 3


def test_idle_team_uses_no_cpu_time(library):
    group = library.create(4)
    memory = library.memory(group, 4, 10)
    library.run(group, library.addresses["stress"], ctypes.addressof(memory))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    used = time.process_time() - before
    library.destroy(group)
    assert used < 0.01


def test_create_and_destroy_leave_no_threads(library):
    def threads():
        return len(os.listdir("/proc/self/task"))

    before = threads()
    for workers in (1, 2, 8, 3):
        library.destroy(library.create(workers))
    # A joined thread may linger in /proc for a moment.
    deadline = time.monotonic() + 2
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == before


@pytest.mark.slow  # a time: only a machine without other load can tell
def test_barrier_latency(library):
    """On four free cores it is 0.2 to 0.4 us; the bound leaves room for a slower machine."""
    workers = max(1, min(4, len(os.sched_getaffinity(0))))
    group = library.create(workers)
    memory = library.memory(group, workers, 2000)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        library.run(group, library.addresses["spin"], ctypes.addressof(memory))
        times.append((time.perf_counter() - start) / 2000)
    library.destroy(group)
    print(f"\nbarrier of {workers} workers: {min(times) * 1e6:.2f} us")
    assert min(times) < 50e-6


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "arm64-apple-macosx14.0",
                                    "x86_64-unknown-linux-gnu"])
def test_compiles_for(triple):
    module = ir.Module("team")
    module.triple = triple
    team.emit(module, linkage="internal")
    _, e = define(module, "keep", VOID, [POINTER, I64], internal=False)
    group = e.call(team.CREATE, POINTER, e.b.function.args[1])
    e.call(team.RUN, VOID, group, e.b.function.args[0], e.b.function.args[0])
    e.call(team.DESTROY, VOID, group)
    e.b.ret_void()
    machine = llvm.Target.from_triple(triple).create_target_machine(opt=3, reloc="pic")
    code, text = emit_object(str(module), machine)
    assert code and "@llmc_team_run" not in text.split("define")[0]
