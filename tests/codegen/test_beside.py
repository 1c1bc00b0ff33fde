"""Machine code made by another process is what this one makes."""

import subprocess

import pytest

from llmc import knobs
from llmc.codegen import generate, generate_all, host
from llmc.codegen.host import beside
from llmc.codegen.target import Target
from llmc.driver import compile_model
from tests.conftest import EMBEDDED

MODULE = 'define i32 @f(i32 %x) {\n  %y = mul i32 %x, 3\n  ret i32 %y\n}\n'


@pytest.mark.parametrize("target", ["host", "x86_64:znver5", "aarch64:neoverse-v2"])
def test_another_process_makes_the_same(target):
    target = Target.parse(target)
    assert beside.object_beside(MODULE, target) == beside.emit_object(MODULE, target.machine())


@pytest.mark.parametrize("error", [OSError("no such file"),
                                   subprocess.CalledProcessError(-9, "python")])
def test_without_another_process_this_one_does_it(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    target = Target.host()
    assert beside.object_beside(MODULE, target) == beside.emit_object(MODULE, target.machine())


def test_all_programs_of_a_model(monkeypatch):
    used, steps = [], []

    def counted(text, target):
        used.append(len(text))
        return beside.object_beside(text, target)

    monkeypatch.setattr(host, "LEAST", 0)
    monkeypatch.setattr(host, "object_beside", counted)
    monkeypatch.setattr(knobs, "cores", lambda: 2)
    compiled = compile_model(EMBEDDED, Target.host(), later=True)
    codes = generate_all(compiled.programs, compiled.target, lambda: steps.append(1))
    assert list(codes) == list(compiled.programs) and len(steps) == 2 and len(used) == 1
    for name, code in codes.items():
        assert code == generate(compiled.programs[name], compiled.target)
    monkeypatch.setattr(knobs, "cores", lambda: 1)
    generate_all(compiled.programs, compiled.target, lambda: None)
    assert len(used) == 1
