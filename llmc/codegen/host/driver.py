"""The step function of a program: stages in order, each shared out among the workers.

    i32 llmc_step(arguments*)            the ABI of docs/architecture.md
    void worker(context*, worker, workers)
                                         what every worker runs: stage, barrier, stage, barrier ...
    void stage_N(arguments*, layer, worker, workers)
                                         set-up, then tiles, shared out by shares.py
    void warm_N(arguments*, layer, worker, workers)
                                         fetches what stage N reads first; called before the
                                         barrier that ends the last such stage ahead of it, where
                                         memory would stand still

A stage is a function of its own, so that LLVM's time grows with the number of stages only. The
context is {arguments*, i64 stop}: stop is the ordinal of the barrier at which a cancelled step
ends. Worker 0 alone reads the cancel word and writes stop, before a barrier that everybody passes:
so all workers agree on where to leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import llvmlite.ir as ir

from llmc.codegen.host import shares, team
from llmc.codegen.host.frame import ARGUMENTS, StageFrame
from llmc.codegen.host.kernel import Kernel, Warming, Worker
from llmc.codegen.llvm import I1, I32, I64, POINTER, VOID, Emitter, define, i32, i64
from llmc.ir.dims import Dim, ceildiv, maximum
from llmc.ir.program import Loop, Program, Stage, Step

STEP = "llmc_step"
_SYNCHRONISE, _WORKER = "llmc_synchronise", "llmc_worker"
_STOP = 8  # byte offset in the context


class Driver:
    """Emits one program into a module. kernels: stage -> kernel, made by the caller."""

    def __init__(self, module: ir.Module, program: Program, kernels: dict[int, Kernel]):
        self.module = module
        self.program = program
        self.kernels = kernels
        self.scratch_bytes: Dim = maximum(0, *(_scratch(kernel) for kernel in kernels.values()))
        self._stages: dict[int, ir.Function] = {}
        self._warmers: dict[int, ir.Function] = {}

    def emit(self) -> None:
        """The team, all stages and the step function."""
        team.emit(self.module)
        for number, stage in enumerate(self.program.stages()):
            self._stages[id(stage)] = self._define_stage(number, stage)
            if isinstance(self.kernels[number], Warming):
                self._warmers[id(stage)] = self._define_warmer(number)
        self._define_synchronise()
        self._define_worker()
        self._define_step()

    # ---- one stage --------------------------------------------------------------------------

    def _define_stage(self, number: int, stage: Stage) -> ir.Function:
        name = f"stage_{number}_{_identifier(stage.name)}"
        function, entry = define(self.module, name, VOID, [POINTER, I64, I64, I64],
                                 attributes=("noinline", "nounwind"))
        arguments, layer, index, count = function.args
        body = function.append_basic_block("body")
        entry.b.branch(body)
        e = Emitter(ir.IRBuilder(body))
        frame = StageFrame(self.program, e, arguments, layer)
        kernel = self.kernels[number]
        base = e.load(e.offset(arguments, ARGUMENTS["scratch"]), POINTER)
        scratch = e.offset(base, e.b.mul(index, frame.dim(_scratch(kernel))))
        worker = Worker(index, count, scratch)
        crew = e.load(e.offset(arguments, ARGUMENTS["team"]), POINTER)
        with shares.tiles(e, crew, kernel.tiles(e, frame), index, count,
                          lambda: kernel.setup(e, frame, worker)) as tile:
            kernel.tile(e, frame, worker, tile)
        e.b.ret_void()
        return function

    def _define_warmer(self, number: int) -> ir.Function:
        function, entry = define(self.module, f"warm_{number}", VOID, [POINTER, I64, I64, I64],
                                 attributes=("noinline", "nounwind"))
        arguments, layer, index, count = function.args
        body = function.append_basic_block("body")
        entry.b.branch(body)
        e = Emitter(ir.IRBuilder(body))
        kernel = self.kernels[number]
        assert isinstance(kernel, Warming)
        worker = Worker(index, count, ir.Constant(POINTER, None))
        kernel.warm(e, StageFrame(self.program, e, arguments, layer), worker)
        e.b.ret_void()
        return function

    # ---- all stages -------------------------------------------------------------------------

    def _define_worker(self) -> None:
        function, e = define(self.module, _WORKER, VOID, [POINTER, I64, I64])
        context = function.args[0]
        arguments = e.load(context, POINTER)
        ordinal = 1
        for position, step in enumerate(self.program.steps):
            if isinstance(step, Loop):
                count = len(step.stages)
                with e.loop(0, step.count, name="layer") as layer:
                    start = e.b.add(i64(ordinal), e.b.mul(layer, i64(count)))
                    for number, stage in enumerate(step.stages):
                        self._call(e, function, stage, arguments, layer,
                                   e.b.add(start, i64(number)), self._next_turn(e, step, number,
                                                                                layer))
                ordinal += step.count * count
            else:
                after = next(iter(self._warming(self.program.steps[position + 1:])), None)
                self._call(e, function, step, arguments, i64(0), i64(ordinal), (after, i64(0)))
                ordinal += 1
        e.b.ret_void()

    def _warming(self, steps: Sequence[Step]) -> Iterator[Stage]:
        """The stages of the steps that can be got ready."""
        for step in steps:
            for stage in step.stages if isinstance(step, Loop) else (step,):
                if id(stage) in self._warmers:
                    yield stage

    def _next_turn(self, e: Emitter, loop: Loop, number: int,
                   layer: ir.Value) -> tuple[Stage | None, ir.Value]:
        """What to get ready at the end of a loop's stage, and the turn that it belongs to: the
        next such stage of this turn, else the first of the next one."""
        if id(loop.stages[number]) not in self._warmers:
            return None, layer
        later = next(iter(self._warming(loop.stages[number + 1:])), None)
        if later is not None:
            return later, layer
        following = e.minimum(e.b.add(layer, i64(1)), i64(loop.count - 1))
        return next(iter(self._warming(loop.stages))), following

    def _call(self, e: Emitter, function: ir.Function, stage: Stage, arguments: ir.Value,
              layer: ir.Value, ordinal: ir.Value, ready: tuple[Stage | None, ir.Value]) -> None:
        context, worker, workers = function.args
        e.b.call(self._stages[id(stage)], [arguments, layer, worker, workers])
        following, turn = ready
        if following is not None:
            e.b.call(self._warmers[id(following)], [arguments, turn, worker, workers])
        stop = e.call(_SYNCHRONISE, I1, context, worker, ordinal)
        with e.b.if_then(stop, likely=False):
            e.b.ret_void()

    def _define_synchronise(self) -> None:
        """i1 (context, worker, ordinal): a barrier; true if the step ends at this one."""
        function, e = define(self.module, _SYNCHRONISE, I1, [POINTER, I64, I64],
                             attributes=("noinline",))
        context, worker, ordinal = function.args
        stop = e.offset(context, _STOP)
        arguments = e.load(context, POINTER)
        with e.b.if_then(e.b.icmp_signed("==", worker, i64(0))):
            cancel = e.load(e.offset(arguments, ARGUMENTS["cancel"]), POINTER)
            wanted = e.b.icmp_signed("!=", e.b.load_atomic(cancel, "monotonic", 4, typ=I32), i32(0))
            fresh = e.b.icmp_signed("==", e.b.load_atomic(stop, "monotonic", 8, typ=I64), i64(0))
            with e.b.if_then(e.b.and_(wanted, fresh), likely=False):
                e.b.atomic_rmw("xchg", stop, ordinal, "release")
        crew = e.load(e.offset(arguments, ARGUMENTS["team"]), I64)
        with e.b.if_then(e.b.icmp_signed("!=", crew, i64(0))):
            e.call(team.BARRIER, VOID, e.load(e.offset(arguments, ARGUMENTS["team"]), POINTER))
        where = e.b.load_atomic(stop, "acquire", 8, typ=I64)
        reached = e.b.icmp_signed("<=", where, ordinal)
        e.b.ret(e.b.and_(e.b.icmp_signed("!=", where, i64(0)), reached))

    def _define_step(self) -> None:
        function, e = define(self.module, STEP, I32, [POINTER], internal=False)
        arguments = function.args[0]
        worker = self.module.globals[_WORKER]
        context = e.stack(ir.ArrayType(I64, 2))
        e.store(arguments, context)
        e.store(i64(0), e.offset(context, _STOP))
        crew = e.load(e.offset(arguments, ARGUMENTS["team"]), I64)
        with e.b.if_else(e.b.icmp_signed("==", crew, i64(0))) as (alone, together):
            with alone:
                e.b.call(worker, [context, i64(0), i64(1)])
            with together:
                handle = e.load(e.offset(arguments, ARGUMENTS["team"]), POINTER)
                e.call(team.RUN, VOID, handle, worker, context)
        stopped = e.b.icmp_signed("!=", e.load(e.offset(context, _STOP), I64), i64(0))
        e.b.ret(e.b.zext(stopped, I32))


def _scratch(kernel: Kernel) -> Dim:
    """Bytes of each worker's scratch in a stage: a multiple of 64."""
    return ceildiv(kernel.scratch_bytes, 64) * 64


def _identifier(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
