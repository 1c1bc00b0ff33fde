"""What is compiled beside, in other processes, is what this one makes."""

import subprocess

import pytest

from llmc import knobs
from llmc.codegen import beside, generate, generate_all
from llmc.codegen.target import Target
from llmc.driver import compile_model
from tests.conftest import EMBEDDED

MODULE = 'define i32 @f(i32 %x) {\n  %y = mul i32 %x, 3\n  ret i32 %y\n}\n'
KERNEL = """target triple = "nvptx64-nvidia-cuda"
define ptx_kernel void @f(ptr addrspace(1) %x) {
  store i32 3, ptr addrspace(1) %x
  ret void
}
"""
CASES = {"host": MODULE, "x86_64:znver5": MODULE, "aarch64:neoverse-v2": MODULE,
         "nvptx:sm_80": KERNEL, "nvptx:sm_90a": KERNEL}


@pytest.mark.parametrize("target", CASES)
def test_another_process_makes_the_same(target):
    text, target = CASES[target], Target.parse(target)
    assert beside.compile_beside(text, target) == beside.compile_text(text, target)


@pytest.mark.parametrize("error", [OSError("no such file"),
                                   subprocess.CalledProcessError(-9, "python")])
def test_without_another_process_this_one_does_it(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    target = Target.host()
    assert beside.compile_beside(MODULE, target) == beside.compile_text(MODULE, target)


@pytest.mark.parametrize("target", ["host", "nvptx:sm_80,sm_90a"])
def test_all_programs_of_a_model(target, monkeypatch):
    used, steps = [], []

    def counted(text, single):
        used.append(len(text))
        return compile_beside(text, single)

    compile_beside = beside.compile_beside
    monkeypatch.setattr(beside, "LEAST", 0)
    monkeypatch.setattr(beside, "compile_beside", counted)
    monkeypatch.setattr(knobs, "cores", lambda: 2)
    compiled = compile_model(EMBEDDED, Target.parse(target), later=True)
    codes = generate_all(compiled.programs, compiled.target, lambda: steps.append(1))
    modules = len(codes) * len(compiled.target.architectures())
    assert list(codes) == list(compiled.programs) and len(steps) == len(codes)
    assert len(used) == modules - 1
    monkeypatch.setattr(knobs, "cores", lambda: 1)
    alone = generate_all(compiled.programs, compiled.target, lambda: None)
    assert len(used) == modules - 1
    assert {name: code.llvm for name, code in alone.items()} == {
        name: code.llvm for name, code in codes.items()}
    name = list(codes)[-1]
    assert alone[name] == generate(compiled.programs[name], compiled.target)
