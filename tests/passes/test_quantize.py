"""What becomes codes, what stays as it is, and that a tied embedding is stored once."""

import numpy as np
import pytest

import llmc
from llmc.codegen.target import Target
from llmc.errors import LlmcError
from llmc.frontend.model import load_model
from llmc.frontend.trace import Spec, gather, matmul, parameter, trace, transpose
from llmc.ir.dims import symbol
from llmc.ir.quantization import Quantization
from llmc.ir.text import format_graph
from llmc.passes.lower import lower
from llmc.passes.pipeline import optimize
from llmc.passes.quantize import candidates, quantize
from tests.conftest import EMBEDDED, GOLDENS

ROWS = symbol("rows")
INT4 = Quantization("int4", calibrate="never")


def program_of(graph, options, has_head=False, target="host"):
    capabilities = Target.parse(target).capabilities()

    def apply(raised, _):
        return quantize(raised, candidates(raised, options, has_head), capabilities)

    return lower(optimize(graph, capabilities, before_outline=("quantize", apply)), capabilities)


def weights(program):
    return {buffer.name: str(buffer.type) for buffer in program.with_role("weight")
            if buffer.type.rank == 2}


def product(right, k=64, dtype="f32"):
    return trace(lambda x: matmul(x, right()), Spec("x", dtype, (ROWS, k)))


def test_a_matrix_becomes_codes_and_scales():
    graph = product(lambda: parameter("w", "f32", (64, 40)))
    assert list(weights(program_of(graph, INT4)).values()) == ["i4[64, 40]", "bf16[2, 40]"]
    options = Quantization("int8", group=32, symmetric=False)
    assert list(weights(program_of(graph, options)).values()) == [
        "u8[64, 40]", "bf16[2, 40]", "u8[2, 40]"]


@pytest.mark.parametrize("right, reason", [
    (lambda: parameter("w", "f32", (64, 31)), "fewer than 32 columns"),
    (lambda: parameter("w", "f32", (3, 64, 40)), "3 axes")])
def test_what_stays_says_why(right, reason):
    graph = product(right)
    (found,) = candidates(graph, INT4, has_head=False)
    assert found.options is None and reason in found.reason and found.name == "w"
    same = quantize(graph, [found], Target.host().capabilities())
    assert format_graph(same) == format_graph(graph)


def test_codes_of_other_makers_stay():
    graph = load_model(GOLDENS / "onnx" / "llama_genai_int4" / "model.onnx").graph
    found = candidates(graph, INT4, has_head=True)
    assert found and {each.reason for each in found} == {"it is quantised already"}


def tied(x):
    table = parameter("embed", "f32", (96, 64))
    rows = gather(table, x, axis=0)
    return matmul(rows, transpose(table, (1, 0)))


@pytest.mark.parametrize("head, stored", [
    ("int8", ["i8[64, 96]", "bf16[1, 96]"]), ("int4", ["i4[64, 96]", "bf16[2, 96]"]),
    ("float", ["f32[64, 96]"])])
def test_a_tied_embedding_is_stored_once(head, stored):
    graph = trace(tied, Spec("x", "i32", (ROWS,)))
    options = Quantization("int4", head=head)
    program = program_of(graph, options, has_head=True)
    assert list(weights(program).values()) == stored


def test_a_head_is_what_logits_are_made_by():
    graph = load_model(EMBEDDED).graph
    found = candidates(graph, Quantization("int4", head="float"), has_head=True)
    kept = [each for each in found if each.options is None]
    assert [each.name for each in kept] == ["model.embed_tokens"]
    assert "logits" in kept[0].reason


def test_layers_stay_one_loop():
    graph = load_model(EMBEDDED).graph
    plain = program_of(graph, Quantization("int4", head="int4"), has_head=True)
    floats = lower(optimize(graph, plain.capabilities), plain.capabilities)
    assert [stage.kind for stage in plain.stages()] == [stage.kind for stage in floats.stages()]
    codes = [buffer for buffer in plain.with_role("weight") if buffer.type.dtype.name == "i4"]
    assert [buffer.count for buffer in codes] == [1, 5, 5, 5, 5]


def test_targets_without_a_kernel_for_codes_get_floats():
    program = program_of(load_model(EMBEDDED).graph, INT4, True, "nvptx:sm_90a")
    assert all(buffer.type.dtype.is_float for buffer in program.with_role("weight"))


@pytest.mark.parametrize("options", [
    {"weights": "int5"}, {"weights": "int4", "group": 48}, {"weights": "int8", "head": "f32"},
    {"weights": "int8", "group": True}, {"weights": "int4", "symmetric": 1},
    {"weights": "int4", "calibrate": "now"}])
def test_bad_options_are_named(options):
    with pytest.raises(LlmcError, match="must be one of"):
        Quantization(**options)
    with pytest.raises(LlmcError, match="quantize must be one of int8, int4 or"):
        llmc.compile(EMBEDDED, quantize=np.int8)
