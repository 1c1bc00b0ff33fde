"""Choosing tokens on the device: the kernels' own code, run here as a block of one thread."""

import ctypes

import llvmlite.binding as llvm
import numpy as np
import pytest

from llmc.codegen.llvm import I8, I64, POINTER, VOID, define, emit_object, i64, ir
from llmc.codegen.nvptx import choose
from llmc.codegen.nvptx.kernel import DeviceEmitter
from llmc.codegen.target import Target
from llmc.ir.choice import FIELDS, SAMPLING
from llmc.runtime.host_device import load_object
from llmc.runtime.sampling import Sampling, sample


class OneThread(DeviceEmitter):
    """A block of one thread, on this CPU."""

    row: ir.Value

    def special(self, name):
        return self.row if name == "ctaid.x" else i64(0)

    def barrier(self):
        pass

    def shared(self, element, count, align=16):
        return self.stack(ir.ArrayType(element, count))


@pytest.fixture(scope="module")
def kernels():
    target = Target.host()
    module = ir.Module("choose")
    module.triple = target.triple
    for name in (choose.ADVANCE, choose.SAMPLE):
        function, e = define(module, name, VOID, [POINTER, I64], internal=False)
        body = function.append_basic_block("body")
        e.b.branch(body)
        one = OneThread(ir.IRBuilder(body))
        one.row = function.args[1]
        if name == choose.ADVANCE:
            choose.emit_advance(one, function.args[0], threads=1)
        else:
            bins = one.stack(ir.ArrayType(I8, 8 * choose.BINS))
            choose.emit_sample(one, function.args[0], bins, threads=1, warp=1)
        one.b.ret_void()
    code, _ = emit_object(str(module), target.machine())
    library = load_object(code, (choose.ADVANCE, choose.SAMPLE))
    return {name: library.function(name, None, ctypes.c_void_p, ctypes.c_int64)
            for name in (choose.ADVANCE, choose.SAMPLE)}


class Step:
    """Memory of a step of some sequences."""

    def __init__(self, logits, positions, samplings, numbers, slots=4):
        count = len(logits)
        self.logits = np.ascontiguousarray(logits, np.float32)
        self.greedy = self.logits.argmax(axis=1).astype(np.int64)
        self.ids = np.full(count, -1, np.int32)
        self.positions = np.array(positions, np.int32)
        self.steps = np.zeros(1, np.int64)
        self.ring = np.full((slots, count), -1, np.int32)
        self.sampling = np.zeros((count, len(SAMPLING)), np.int64)
        self.sampling[:, :3] = np.array([[s.temperature, s.top_p, s.min_p] for s in samplings]
                                        ).view(np.int64)
        self.sampling[:, 3] = [s.top_k for s in samplings]
        self.sampling[:, 4] = np.array([s.seed for s in samplings], np.uint64).view(np.int64)
        self.sampling[:, 5] = numbers
        values = {"ids": self.ids, "positions": self.positions, "greedy": self.greedy,
                  "logits": self.logits, "steps": self.steps, "ring": self.ring, "slots": slots,
                  "sampling": self.sampling, "sequences": count,
                  "vocabulary": self.logits.shape[1]}
        self.choice = np.array([v.ctypes.data if isinstance(v, np.ndarray) else v for v in
                                (values[name] for name in FIELDS)], np.int64)

    def run(self, kernel, rows=1):
        for row in range(rows):
            kernel(self.choice.ctypes.data, row)


def test_chosen_tokens_become_the_next_step(kernels):
    step = Step(np.eye(3, 40), [4, 0, 31], [Sampling()] * 3, [0, 1, 2], slots=2)
    for turn in range(3):
        step.greedy[:] = [10 * turn, 10 * turn + 1, 10 * turn + 2]
        step.run(kernels[choose.ADVANCE])
    assert step.ids.tolist() == [20, 21, 22]
    assert step.positions.tolist() == [7, 3, 34]
    assert step.ring.tolist() == [[20, 21, 22], [10, 11, 12]]
    assert step.steps[0] == 3


SAMPLINGS = [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8),
             Sampling(0.9, top_k=20, top_p=0.9), Sampling(0.05, seed=2**64 - 1), Sampling(),
             Sampling(1.0, top_k=1), Sampling(2.0, top_p=1e-6), Sampling(1e-300),
             Sampling(5.0, top_k=10**6, seed=7), Sampling(1.0, min_p=0.2),
             Sampling(1.5, top_k=30, top_p=0.7, min_p=0.05)]


@pytest.mark.parametrize(("vocabulary", "spread"), [
    # The host picks its candidates from a larger vocabulary of equals in any order.
    (1, 0.0), (2, 0.0), (17, 0.0), *((size, spread) for size in (17, 512, 3001)
                                     for spread in (1.0, 8.0))])
def test_the_device_draws_what_the_host_draws(kernels, vocabulary, spread):
    random = np.random.default_rng(vocabulary)
    for turn in range(6):
        count = len(SAMPLINGS)
        logits = (random.standard_normal((count, vocabulary)) * spread).astype(np.float32)
        if turn % 2:
            logits = np.round(logits)  # many equals, zeros of both signs among them
        positions = random.integers(0, 10**6, count)
        step = Step(logits, positions, SAMPLINGS, range(count))
        step.run(kernels[choose.SAMPLE], count)
        expected = [sample(row, each, number, int(position) + 1) for row, each, number, position
                    in zip(logits, SAMPLINGS, range(count), positions, strict=True)]
        assert step.greedy.tolist() == expected


def test_kernels_assemble_without_spills():
    from llmc.codegen.nvptx import _optimise, _set_options, define_choosers
    from llmc.codegen.nvptx.assemble import assemble, is_available

    if not is_available():
        pytest.skip("nvJitLink is not installed")
    _set_options()
    for target in Target.parse("nvptx:sm_80,sm_90a").architectures():
        module = ir.Module("choose")
        machine = target.machine()
        module.triple, module.data_layout = target.triple, str(machine.target_data)
        define_choosers(module)
        optimised = llvm.parse_assembly(str(module))
        _optimise(optimised, machine)
        made = assemble(machine.emit_assembly(optimised), target.cpu)
        assert not made.warnings
        assert all(k.spill_bytes == k.stack_bytes == 0 for k in made.report), made.report
