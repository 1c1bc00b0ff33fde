"""The thread team: stress of runs, barriers and shares; how many run; idle CPU time, latency."""

import ctypes
import os
import time

import llvmlite.binding as llvm
import llvmlite.ir as ir
import pytest

from llmc.codegen.host import shares, team, team_size
from llmc.codegen.llvm import I32, I64, POINTER, VOID, define, emit_object, i32, i64

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

SLOT = 64


def stress_module(machine):
    """Adds `stress(ptr memory, worker, workers)`, `spin(...)`, which has only barriers, and
    `share(...)`, which counts how often each tile is taken.

    memory: i64 rounds, ptr team, i64 errors of worker 0.., then a slot of 64 bytes for each worker.
    Of share: i64 rounds, ptr team (or null), i64 tiles, the slowest worker, then a count for each
    tile.
    """
    module = ir.Module("team")
    module.triple = machine.triple
    team.emit(module)
    _, e = define(module, "checked_barrier", VOID, [POINTER])
    group = e.b.function.args[0]
    with e.b.if_then(e.b.icmp_signed("!=", e.b.ptrtoint(group, I64), i64(0))):
        e.call(team.BARRIER, VOID, group)
    e.b.ret_void()
    for name, checked in (("stress", True), ("spin", False)):
        _, e = define(module, name, VOID, [POINTER, I64, I64], internal=False)
        memory, worker, workers = e.b.function.args
        rounds, group = e.load(memory, I64), e.load(e.offset(memory, 8), POINTER)
        with e.loop(0, rounds) as turn:
            if checked:
                emit_round(e, memory, worker, workers, turn, group)
            e.call(team.BARRIER, VOID, group)
        e.b.ret_void()
    _, e = define(module, "share", VOID, [POINTER, I64, I64], internal=False)
    emit_share(e, *e.b.function.args)
    return str(module)


def emit_share(e, memory, worker, workers):
    """Every round takes all tiles once more; one worker dawdles at each of its own."""
    rounds, group = e.load(memory, I64), e.load(e.offset(memory, 8), POINTER)
    tiles, slow = e.load(e.offset(memory, 16), I64), e.load(e.offset(memory, 24), I64)
    with e.loop(0, rounds):
        with shares.tiles(e, group, tiles, worker, workers, lambda: None) as tile:
            with e.b.if_then(e.b.icmp_signed("==", worker, slow)):
                e.call("usleep", I32, i32(100))
            place = e.offset(memory, e.b.add(e.b.mul(tile, i64(8)), i64(32)))
            e.b.atomic_rmw("add", place, i64(1), "monotonic")
        e.call("checked_barrier", VOID, group)
    e.b.ret_void()


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
    names = (team.CREATE, team.RUN, team.BARRIER, team.DESTROY, "stress", "spin", "share")
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
        assert errors == 0 and done % rounds == 0  # on a busy machine, not all run every time
    assert memory[10] == runs * rounds


def test_many_barriers_in_one_run(library):
    group = library.create(4)
    memory = library.memory(group, 4, 20_000)
    library.run(group, library.addresses["stress"], ctypes.addressof(memory))
    library.destroy(group)
    assert [memory[worker * 8 + 1] for worker in range(1, 5)] == [0] * 4
    assert [memory[worker * 8 + 2] for worker in range(1, 5)] == [20_000] * 4


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("tiles", [0, 1, 3, 16, 33, 1000])
def test_every_tile_is_taken_once(library, workers, tiles):
    runs, rounds = 20, 5
    group = library.create(workers)
    memory = (ctypes.c_int64 * (4 + tiles))(rounds, group, tiles, -1)
    for _ in range(runs):
        library.run(group, library.addresses["share"], ctypes.addressof(memory))
    library.destroy(group)
    assert list(memory[4:]) == [runs * rounds] * tiles


def test_one_worker_without_a_team_takes_all_tiles(library):
    memory = (ctypes.c_int64 * (4 + 5))(3, 0, 5, -1)
    share = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
        library.addresses["share"])
    share(ctypes.addressof(memory), 0, 1)
    assert list(memory[4:]) == [3] * 5


def test_a_slow_worker_is_helped(library):
    """Its share alone would take 3.3 s of sleep."""
    group = library.create(3)
    tiles = 99_999
    memory = (ctypes.c_int64 * (4 + tiles))(1, group, tiles, 1)
    start = time.perf_counter()
    library.run(group, library.addresses["share"], ctypes.addressof(memory))
    elapsed = time.perf_counter() - start
    library.destroy(group)
    assert list(memory[4:]) == [1] * tiles
    assert elapsed < 1.5


def active(group):
    return ctypes.c_int32.from_address(group + team_size.ACTIVE).value


@pytest.fixture
def one_cpu():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_workers_without_a_cpu_stay_away_and_come_back(library, one_cpu):
    """Four on one CPU: in the end one runs, and others are tried. Tiles are counted right."""
    tiles, rounds = 333, 30
    group = library.create(4)
    memory = (ctypes.c_int64 * (4 + tiles))(rounds, group, tiles, -1)
    seen = [4]
    deadline = time.monotonic() + 30
    while (min(seen) > 1 or seen[-1] <= min(seen)) and time.monotonic() < deadline:
        library.run(group, library.addresses["share"], ctypes.addressof(memory))
        seen.append(active(group))
    library.destroy(group)
    assert list(memory[4:]) == [(len(seen) - 1) * rounds] * tiles
    assert min(seen) == 1 < seen[-1]


def test_parked_workers_wake_up(library):
    group = library.create(3)
    memory = library.memory(group, 3, 1)
    for _ in range(20):
        library.run(group, library.addresses["stress"], ctypes.addressof(memory))
        time.sleep(0.005)
    library.destroy(group)
    assert memory[10] == 20
    assert all(memory[worker * 8 + 2] > 0 for worker in range(1, 4))


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
