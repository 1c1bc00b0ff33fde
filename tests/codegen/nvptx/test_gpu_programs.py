"""Whole programs for GPUs: every kernel is assembled without one, and its report checked."""

from pathlib import Path

import pytest

from llmc.codegen.nvptx.assemble import KernelReport, is_available, parse_report
from llmc.codegen.target import Target
from llmc.driver import compile_model
from llmc.errors import CompileError

GOLDENS = Path(__file__).parents[2] / "goldens"
assembled = pytest.mark.skipif(not is_available(), reason="nvJitLink is not installed")

LOG = """
ptxas info    : Function properties for stage_0
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 256 bytes smem
ptxas info    : Function properties for stage_1
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""


@assembled
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("model", ["llama_gqa3_sharded", "bert"])
def test_every_kernel_assembles_without_spills(model, dtype):
    compiled = compile_model(GOLDENS / "hf" / model, Target.parse("nvptx:sm_80,sm_90a"), dtype)
    assert set(compiled.codes) == ({"generic", "few", "one"} if "llama" in model else {"generic"})
    for code in compiled.codes.values():
        for architecture in ("sm_80", "sm_90a"):
            made = code.assembled[architecture]
            assert made.cubin
            assert not made.warnings
            assert all(k.spill_bytes == k.stack_bytes == 0 for k in made.report), made.report


@assembled
def test_onnx_models_assemble():
    compiled = compile_model(GOLDENS / "onnx" / "llama_past_dynamo" / "model.onnx",
                             Target.parse("nvptx:sm_90a"))
    report = compiled.codes["generic"].assembled["sm_90a"].report
    assert report
    assert all(kernel.spill_bytes == 0 for kernel in report)


def test_a_report_names_what_each_kernel_takes():
    assert parse_report(LOG) == (KernelReport("stage_0", 10, 256, 8, 16),
                                 KernelReport("stage_1", 32, 0, 0, 0))


def test_targets_are_lists_of_architectures():
    assert Target.parse("nvptx").text() == "nvptx:sm_80,sm_90a"
    target = Target.parse("nvptx:sm_90a")
    assert Target.parse(target.text()) == target
    assert [single.cpu for single in Target.parse("nvptx:sm_80,sm_90a").architectures()] == [
        "sm_80", "sm_90a"]
    with pytest.raises(CompileError, match="sm_1"):
        Target.parse("nvptx:sm_1")


@assembled
def test_what_is_quantised_is_divided_exactly():
    """A quotient off by a bit rounds to another integer."""
    compiled = compile_model(GOLDENS / "onnx" / "bert_int8_dynamic" / "model.onnx",
                             Target.parse("nvptx:sm_90a"))
    made = compiled.codes["generic"].assembled["sm_90a"]
    kernels = [text for text in made.ptx.split(".entry ")[1:] if "cvt.rni" in text]
    assert kernels
    assert all("div.rn.f32" in text and "div.full.f32" not in text for text in kernels)
    assert all(kernel.spill_bytes == 0 for kernel in made.report)
    assert not made.warnings
