"""What the ceilings measure is plausible, and their code is what it says."""

import re

import llvmlite.binding as llvm
import pytest

from llmc.ceilings import Ceilings, largest_cache
from llmc.codegen.host import ceilings as code
from llmc.codegen.target import Target


@pytest.mark.parametrize("threads", [1, 2])
def test_ceilings_are_plausible(threads, monkeypatch):
    monkeypatch.setattr("llmc.ceilings.BUFFER_BYTES", 32 << 20)
    monkeypatch.setattr("llmc.ceilings.CACHES", 0)
    ceilings = Ceilings(threads)
    assert 1e8 < ceilings.read_bandwidth() < 1e13
    assert 1e8 < ceilings.peak_f32() < 1e13
    assert 1e8 < ceilings.peak_bf16() < 1e13
    assert 1e8 < ceilings.peak_int8() < 1e14


def test_bandwidth_is_read_beyond_the_caches(monkeypatch):
    monkeypatch.setattr("llmc.ceilings.BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("llmc.ceilings.largest_cache", lambda: 3 << 20)
    ceilings = Ceilings(1)
    ceilings.read_bandwidth()
    assert len(ceilings._buffer) == 12 << 20


def test_the_largest_cache_is_no_kilobyte_and_no_terabyte():
    assert largest_cache() == 0 or 1 << 17 <= largest_cache() < 1 << 40


@pytest.mark.parametrize("target, instructions, bf16", [
    ("x86_64:znver3", ("vfmadd", "vpmaddubsw"), False),
    ("x86_64:znver5", ("vfmadd", "vdpbf16ps", "vpdpbusd"), True),
    ("aarch64:neoverse-n1", ("fmla", "sdot"), False), ("aarch64:cortex-a72", ("fmla",), False)])
def test_peak_is_independent_multiply_adds(target, instructions, bf16, monkeypatch):
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
    assert ("llmc_peak_int8" in made.exports) == (len(instructions) - bf16 == 2)
    for instruction in instructions:
        assert len(re.findall(instruction, emitted[0])) >= code.CHAINS * code.UNROLL
