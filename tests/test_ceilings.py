"""What the ceilings measure is plausible, and their code is what it says."""

import re

import llvmlite.binding as llvm
import pytest

from llmc.ceilings import Ceilings
from llmc.codegen.host import ceilings as code
from llmc.codegen.target import Target


@pytest.mark.parametrize("threads", [1, 2])
def test_ceilings_are_plausible(threads, monkeypatch):
    monkeypatch.setattr("llmc.ceilings.BUFFER_BYTES", 32 << 20)
    ceilings = Ceilings(threads)
    assert 1e8 < ceilings.read_bandwidth() < 1e13
    assert 1e8 < ceilings.peak_f32() < 1e13
    assert 1e8 < ceilings.peak_bf16() < 1e13


@pytest.mark.parametrize("target, instruction, bf16", [
    ("x86_64:znver3", "vfmadd", False), ("x86_64:znver5", "vdpbf16ps", True),
    ("aarch64:neoverse-n1", "fmla", False)])
def test_peak_is_independent_multiply_adds(target, instruction, bf16, monkeypatch):
    emitted = []
    emit = code.emit_object

    def spy(text, machine):
        result = emit(text, machine)
        emitted.append(machine.emit_assembly(llvm.parse_assembly(result[1])))
        return result

    monkeypatch.setattr(code, "emit_object", spy)
    made = code.generate_ceilings(Target.parse(target))
    assert bool(made.bf16_flops) == bf16
    assert ("llmc_peak_bf16" in made.exports) == bf16
    assert len(re.findall(instruction, emitted[0])) >= code.CHAINS * code.UNROLL
