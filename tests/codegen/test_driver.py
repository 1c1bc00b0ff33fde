"""The step function: loops, tables, arena, threads, cancelling; and code for other CPUs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from llmc.codegen import generate
from llmc.codegen.target import Target
from llmc.errors import CompileError, DeviceError
from llmc.ir.dims import ceildiv, symbol
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph, TensorType
from llmc.ir.ops import make
from llmc.ir.program import Buffer, Loop, Program, Stage
from llmc.runtime.host_device import load_object
from tests.codegen.harness import Runner, host, leaf, stage_program

TOKENS = symbol("tokens", 1, 1000)
WIDTH, LAYERS = 33, 5


def stage(name, kind, operands, results, node):
    """operands: buffer name -> body input."""
    body = Graph(name, tuple(operands.values()),
                 tuple((f"result{i}", each) for i, each in enumerate(node)))
    return Stage(name, kind, body, tuple(operands), tuple(results))


def layered_program(target=None, fixed_tokens=None):
    """out = x after LAYERS turns of x = rms_norm(x, weight[layer]) * table[layer] + layer."""
    tokens = fixed_tokens or TOKENS
    x = leaf("x", "f32", tokens, WIDTH)
    weight = make("input", name="weight", type=TensorType(dtype("f32"), (WIDTH,)))
    first = stage("first", "map", {"input": x}, ["h"], [make("neg", x)])
    h = leaf("h", "f32", tokens, WIDTH)
    norm = make("rms_norm", h, weight, epsilon=1e-5)
    normed = stage("norm", "reduce", {"h": h, "weight": weight}, ["n"], [norm])
    n = leaf("n", "f32", tokens, WIDTH)
    factor = make("table", dtype=dtype("f32"), values=tuple(float(i + 1) for i in range(LAYERS)))
    moved = make("add", make("mul", n, factor), make("layer", dtype=dtype("f32")))
    shifted = stage("shift", "map", {"n": n}, ["h"], [moved])
    last = stage("last", "map", {"h": h}, ["output"], [make("add", h, h)])
    type_ = TensorType(dtype("f32"), (tokens, WIDTH))
    size = ceildiv(tokens * WIDTH * 4, 64) * 64
    buffers = [Buffer("input", type_, "input"), Buffer("h", type_, "arena", offset=0),
               Buffer("n", type_, "arena", offset=size), Buffer("output", type_, "output"),
               Buffer("weight", weight.type, "weight", count=LAYERS)]
    symbols = (("tokens", fixed_tokens or 1, fixed_tokens or 1000),)
    return Program("layered", (target or host()).capabilities(), symbols,
                   {buffer.name: buffer for buffer in buffers}, {},
                   (first, Loop(LAYERS, (normed, shifted)), last), 2 * size)


class LayeredRunner(Runner):
    """Gives each turn its own copy of the weight."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.weights = np.random.default_rng(0).random((LAYERS, WIDTH), np.float32) + 0.5

    def table(self, role, memory):
        if role == "weight":
            return [row.ctypes.data for row in self.weights]
        return super().table(role, memory)

    def wanted(self, x):
        h = -x.astype(np.float64)
        for layer, weight in enumerate(self.weights):
            h = h / np.sqrt(np.mean(h * h, -1, keepdims=True) + 1e-5) * weight
            h = h * (layer + 1) + layer
        return 2 * h


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("fixed", [None, 17])
def test_loop_weights_and_arena(workers, fixed):
    runner = LayeredRunner(layered_program(fixed_tokens=fixed), workers)
    for tokens in [fixed] if fixed else (1, 3, 17, 33, 500):
        x = np.random.default_rng(tokens).standard_normal((tokens, WIDTH)).astype(np.float32)
        got = runner.run({"input": x}, {"tokens": tokens})["output"]
        assert runner.returned == 0
        np.testing.assert_allclose(got, runner.wanted(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_cancelled_step_returns_one_and_the_next_runs(workers):
    runner = LayeredRunner(layered_program(), workers)
    x = np.ones((3, WIDTH), np.float32)
    for _ in range(50):
        runner.cancel[0] = 1
        runner.run({"input": x}, {"tokens": 3})
        assert runner.returned == 1
        runner.cancel[0] = 0
        got = runner.run({"input": x}, {"tokens": 3})["output"]
        assert runner.returned == 0
    np.testing.assert_allclose(got, runner.wanted(x), rtol=1e-4, atol=1e-4)


def test_cancelling_at_any_moment_never_hangs():
    runner = LayeredRunner(layered_program(), 3)
    x = np.ones((200, WIDTH), np.float32)
    done = threading.Event()

    def flicker():
        while not done.is_set():
            runner.cancel[0] ^= 1
            time.sleep(1e-5)

    thread = threading.Thread(target=flicker)
    thread.start()
    returned = set()
    for _ in range(300):
        runner.run({"input": x}, {"tokens": 200})
        returned.add(runner.returned)
    done.set()
    thread.join()
    assert returned <= {0, 1}


def test_code_does_not_grow_with_layers():
    few, many = layered_program(), layered_program()
    first, loop, last = many.steps
    many = replace(many, steps=(first, Loop(100, loop.stages), last))
    sizes = [len(generate(program, host()).object) for program in (few, many)]
    assert sizes[1] <= 1.02 * sizes[0]


def test_generating_twice_gives_the_same_bytes():
    codes = [generate(layered_program(), host()) for _ in range(2)]
    assert codes[0].object == codes[1].object
    assert "llmc_step" in codes[0].asm()


def test_an_unknown_stage_kind_is_an_error():
    program = stage_program("teleport", {"out": make("neg", leaf("x", "f32", 3))})
    with pytest.raises(CompileError, match="teleport"):
        generate(program, host())


# ---- other CPUs ------------------------------------------------------------------------------

TARGETS = ["x86_64:x86-64-v3", "x86_64:znver5", "aarch64:neoverse-n1", "aarch64:neoverse-v1"]


@pytest.mark.parametrize("text", TARGETS)
def test_code_for_other_cpus(text):
    target = Target.parse(text)
    code = generate(layered_program(target), target)
    machine = {"x86_64": 62, "aarch64": 183}[target.processor]
    assert code.object[:4] == b"\x7fELF" and code.object[18] == machine
    assert {16: "zmm", 8: "ymm", 4: "v0.4s"}[target.vector_lanes] in code.asm()


@pytest.mark.parametrize("text", [*TARGETS, "x86_64:znver3:+avx512f,-fma"])
def test_target_text_round_trips(text):
    assert Target.parse(text).text() == text
    assert Target.parse(Target.host().text()) == Target.parse(Target.host().text())


def test_capabilities_follow_the_cpu():
    found = {text: Target.parse(text).capabilities() for text in TARGETS}
    assert [found[text].vector_lanes for text in TARGETS] == [8, 16, 4, 4]
    assert [found[text].bf16_dot for text in TARGETS] == [False, True, False, False]
    assert Target.parse("x86_64:znver5:-avx512bf16").capabilities().bf16_dot is False


def test_bf16_is_widened_where_its_dot_products_are_slow():
    target = Target.parse("x86_64:emeraldrapids")
    assert target.has_bf16 and not target.bf16_dot


def test_products_of_bytes_need_fused_multiply_adds():
    assert Target.parse("x86_64:haswell").byte_dot == "maddubs"
    assert Target.parse("x86_64:haswell:-fma").byte_dot == ""


@pytest.mark.parametrize("text", ["", "x86_64:nonsense", "mips:r4000", "x86_64:znver3:avx2"])
def test_bad_targets_are_refused(text):
    with pytest.raises(CompileError):
        Target.parse(text)


# ---- loading ---------------------------------------------------------------------------------


def test_bad_object_code_is_refused():
    with pytest.raises(DeviceError):
        load_object(b"no object code")


def test_loading_needs_no_code_generator():
    text = ("import sys; import llmc.runtime.host_device; "
            "sys.exit(any(name.startswith('llmc.codegen') for name in sys.modules))")
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
