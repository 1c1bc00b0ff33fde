"""Scan stages for GPUs: assembled without one, and run against the references where one is."""

import numpy as np
import pytest

import llmc
from llmc.codegen.nvptx import generate
from llmc.codegen.nvptx.assemble import is_available
from llmc.codegen.target import Target
from llmc.errors import CompileError, DeviceError
from llmc.frontend.trace import Spec, linear_attention, trace
from llmc.ir.dims import symbol
from llmc.ir.interpret import allowed, interpret
from llmc.runtime.cuda_device import Device
from tests.codegen.harness import leaf, stage_program
from tests.codegen.test_scan import TOKENS, addresses, both, operands
from tests.models.packed import GOLDENS, Golden

assembled = pytest.mark.skipif(not is_available(), reason="nvJitLink is not installed")
TARGET = "nvptx:sm_80,sm_90a"
# heads of state, queries and keys, sizes of keys and values, whether decay is by key
SHAPES = [("gated", (80, 1, 1, 128, 64, False)), ("gated_delta", (4, 16, 4, 128, 128, True)),
          ("linear", (2, 2, 2, 17, 12, False)), ("delta", (1, 1, 1, 256, 256, False))]


def code(program):
    """Code of a stage; every kernel of it without spills."""
    made = generate(program, Target.parse(TARGET))
    for each in made.assembled.values():
        assert each.cubin and not each.warnings
        assert all(k.spill_bytes == k.stack_bytes == 0 for k in each.report), each.report
    return made


def program(rule, heads, dtype="f32"):
    (q, k, v, *gates), _ = operands(rule, heads, TOKENS, dtype)
    where, _ = addresses()
    state = leaf("state", "f32", 6, heads[0], *heads[3:5])
    y, new = both("slot_linear_attention", state, q, k, v, *where, *gates, rule=rule)
    return stage_program("scan", {"y": y, "state": new}, states=("state",),
                         target=Target.parse(TARGET))


@assembled
@pytest.mark.parametrize("rule, heads", SHAPES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_linear_attention_does_not_spill(rule, heads, dtype):
    code(program(rule, heads, dtype))


@assembled
def test_the_convolution_reads_the_old_state_before_it_writes_the_new():
    where, _ = addresses()
    leaves = [leaf("state", "bf16", 6, 3, 160), leaf("x", "bf16", TOKENS, 160),
              leaf("weight", "bf16", 160, 4)]
    y, new = both("slot_conv", *leaves, *where, leaf("sequence", "i32", TOKENS),
                  leaf("bias", "bf16", 160), activation="silu")
    made = code(stage_program("scan", {"y": y, "state": new}, states=("state",),
                              target=Target.parse(TARGET)))
    (step,) = made.steps["sm_90a"]
    assert [launch.blocks for launch in step.launches] == [str(-(-TOKENS * 160 // 256)),
                                                           str(-(-4 * 160 // 256))]


def test_keys_that_do_not_fit_registers_are_refused():
    with pytest.raises(CompileError, match="1056 elements"):
        generate(program("linear", (1, 1, 1, 1056, 8, False)), Target.parse("nvptx:sm_90a"))


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> None:
    """Skips where there is no GPU."""
    try:
        Device()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("rule, heads", [*SHAPES, ("gated", (3, 3, 1, 8, 16, False))])
def test_batches_against_the_reference(gpu, rule, heads):
    tokens = symbol("tokens")
    leaves, arrays = operands(rule, heads, 37, "f32", batch=(2,))
    arrays["state"] = np.random.default_rng(1).normal(
        size=(2, heads[0], *heads[3:5])).astype(np.float32)
    specs = [Spec("state", "f32", arrays["state"].shape)] + [
        Spec(x["name"], "f32", (2, tokens, *x.shape[2:])) for x in leaves]

    def function(state, q, k, v, *gates):
        decay = gates[0] if "gated" in rule else None
        beta = gates[-1] if "delta" in rule else None
        y, new = linear_attention(state, q, k, v, decay, beta, rule=rule)
        return {"y": y, "new": new}

    graph = trace(function, *specs)
    with allowed():
        wanted = interpret(graph, arrays, exact=True)
    with llmc.Runtime(graph, target="nvptx") as runtime:
        got = runtime.run(arrays)
    for name, array in wanted.items():
        error = np.abs(got[name] - array).max() / np.abs(array).max()
        assert error < 2e-5, (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mamba2", "zamba2"])
def test_models_in_one_go_and_in_chunks(gpu, name):
    golden = Golden.load(name)
    ids, expected = golden.tensors["p33.input_ids"][0], golden.tensors["p33.logits"][0]
    with llmc.Runtime(GOLDENS / name, target="nvptx", dtype="f32") as runtime:
        golden.assert_close(runtime.run(ids), expected)
        model = runtime.language_model
        model.chunk_tokens = 5
        golden.assert_close(runtime.run(ids), expected, "in chunks")
        new = golden.tensors["greedy.p7.new_ids"][0].tolist()
        prompt = golden.tensors["p7.input_ids"][0]
        assert list(runtime.generate(prompt, max_new_tokens=len(new), ignore_eos=True)) == new
