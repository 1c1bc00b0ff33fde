"""Processes of our own import what this one would, wherever the user is."""

import subprocess
import sys

from llmc.codegen import beside
from llmc.codegen.target import Target
from llmc.processes import python


def test_files_of_the_working_directory_are_not_imported(tmp_path, monkeypatch):
    for name in ("pickle", "random", "signal", "llmc"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    process, target = beside.start(), Target.host()
    assert process is not None
    text = "define i32 @f() {\n  ret i32 7\n}\n"
    assert beside.compile_beside(text, target, process) == beside.compile_text(text, target)
    assert process.returncode == 0


def test_arguments_are_given_on(tmp_path, monkeypatch):
    (tmp_path / "told.py").write_text("def main(*words):\n    print(words)\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = subprocess.run(python("told", "a b", "--c"), capture_output=True, text=True, check=True)
    assert done.stdout == "('a b', '--c')\n"
