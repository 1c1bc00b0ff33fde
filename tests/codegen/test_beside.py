"""What is compiled beside, in other processes, is what this one makes."""

import sys

import pytest

from llmc import knobs
from llmc.codegen import beside, generate, generate_all
from llmc.codegen.target import Target
from llmc.driver import compile_model
from llmc.errors import CompileError
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
    process = beside.start()
    assert process is not None
    assert beside.compile_beside(text, target, process) == beside.compile_text(text, target)
    assert process.returncode == 0


def test_without_another_process_this_one_does_it(monkeypatch):
    target = Target.host()
    dead = beside.start()
    assert dead is not None
    dead.kill()
    made = beside.compile_text(MODULE, target)
    assert beside.compile_beside(MODULE, target, dead) == made
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert beside.start() is None
    assert beside.compile_beside(MODULE, target, None) == made


def modules(*texts):
    """For `compile_all`; an error stands for a module that there is no kernel for."""
    for text in texts:
        if isinstance(text, BaseException):
            raise text
        yield text, Target.host()


@pytest.mark.parametrize("least, started", [(0, 3), (1 << 20, 2)])
def test_no_process_is_left_behind(least, started, monkeypatch):
    """Neither where texts are too small for one, nor after an error."""
    processes = []
    start = beside.start

    def counted():
        processes.append(start())
        return processes[-1]

    monkeypatch.setattr(beside, "start", counted)
    monkeypatch.setattr(beside, "LEAST", least)
    monkeypatch.setattr(knobs, "cores", lambda: 2)
    one, two = beside.compile_all(modules(MODULE, MODULE), 2)
    assert one == two
    with pytest.raises(CompileError):
        beside.compile_all(modules(MODULE, CompileError("no kernel")), 3)
    assert len(processes) == started
    assert all(process.returncode is not None for process in processes)


def test_an_interruption_is_what_it_ends_with(monkeypatch):
    """While another process is still compiling, which nobody waits for."""
    monkeypatch.setattr(beside, "LEAST", 0)
    monkeypatch.setattr(knobs, "cores", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        beside.compile_all(modules(MODULE, KeyboardInterrupt()), 3)


@pytest.mark.parametrize("target", ["host", "nvptx:sm_80,sm_90a"])
def test_all_programs_of_a_model(target, monkeypatch):
    used, steps = [], []

    def counted(text, single, process):
        used.append(len(text))
        return compile_beside(text, single, process)

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
