"""Who may import whom, what `import llmc` loads, and that an artifact runs without the compiler.

docs/architecture.md has the table of edges in words.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmc

PACKAGE = Path(llmc.__file__).parent
ANYTHING = {""}
# unit -> prefixes of what it may import besides itself; errors, knobs and processes are free to all
EDGES = {
    "errors": set(),
    "knobs": set(),
    "processes": set(),
    "ir": set(),
    "passes": {"ir"},
    "codegen": {"ir"},
    "models": {"ir", "frontend.trace"},
    "frontend": {"ir", "models"},
    "runtime": {"ir"},
    "runtime.jit": {"ir", "runtime", "driver", "calibrate", "codegen.target", "frontend.onnx",
                    "frontend.traced_model"},
    "runtime.session": {"ir", "runtime", "frontend.tokenizer"},
    "driver": {"frontend", "passes", "codegen", "ir", "weights", "runtime.artifact",
               "runtime.progress"},
    "weights": {"frontend.model", "passes.names", "ir", "quantizer", "runtime.artifact",
                "runtime.progress"},
    "quantizer": {"codegen", "ir", "runtime.host_device"},
    "calibrate": {"driver", "quantizer", "codegen.target", "frontend.model", "passes", "ir",
                  "runtime"},
    "api": {"runtime", "frontend", "ir"},
    "ceilings": {"codegen", "runtime"},
    "cuda_ceilings": {"codegen", "runtime"},
    "examine": {"driver", "codegen.target", "frontend", "ir", "runtime"},
    "emit": {"driver", "weights", "codegen", "ir", "runtime"},
    "server": {"runtime", "frontend.tokenizer", "frontend.json_file"},
    "bench": {"ceilings", "cuda_ceilings", "codegen", "ir", "runtime"},
    "onnx_backend": {"runtime"},
    "cli": ANYTHING,
    "__init__": ANYTHING,
    "__main__": ANYTHING,
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_edges(path: Path):
    name = ".".join(path.with_suffix("").parts)
    unit = max((unit for unit in EDGES if _inside(name, unit)), key=len, default=None)
    assert unit is not None, f"llmc/{path} belongs to no unit of EDGES"
    allowed = {"errors", "knobs", "processes", name.split(".")[0], *EDGES[unit]}
    wrong = {imported for imported in imports_of(PACKAGE / path)
             if not any(_inside(imported, prefix) for prefix in allowed)}
    assert not wrong, f"llmc/{path} must not import {sorted(wrong)}"


def imports_of(path: Path) -> set[str]:
    """Modules of llmc that a file imports anywhere, without the leading `llmc.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("llmc.") for name in names if name.startswith("llmc.")}
    return found


def _inside(name: str, prefix: str) -> bool:
    return not prefix or f"{name}.".startswith(f"{prefix}.")


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh Python has loaded after running `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def loaded(modules: set[str], prefixes: set[str]) -> list[str]:
    return sorted(m for m in modules if any(_inside(m, prefix) for prefix in prefixes))


def test_import_llmc_is_cheap():
    heavy = {"numpy", "onnx", "networkx", "cuda", "torch", "rich", "llvmlite", "tokenizers"}
    assert not loaded(modules_after("import llmc"), heavy)


def test_a_command_imports_no_other():
    modules = modules_after("import llmc.cli\nllmc.cli.main(['cache', 'ls'])")
    assert not loaded(modules, {"asyncio", "llmc.cli.serve", "llmc.cli.generate"})


def test_an_artifact_runs_without_the_code_generator(embedded_artifact: Path):
    modules = modules_after(
        "import llmc.cli\n"
        f"llmc.cli.main(['generate', {str(embedded_artifact)!r}, '--prompt', 'Once', "
        "'--max-tokens', '2'])")
    compiler = {"onnx", "networkx", "cuda", "torch", "rich", "llmc.driver", "llmc.codegen",
                "llmc.passes", "llmc.models", "llmc.frontend.onnx", "llmc.frontend.model",
                "llmc.frontend.trace"}
    assert "llmc.runtime.session" in modules
    assert not loaded(modules, compiler)


def test_a_hot_start_does_not_load_the_compiler(embedded_artifact: Path):
    """The same from the cache: the model's path, not the artifact's."""
    modules = modules_after(
        "import llmc.cli\nllmc.cli.main(['generate', '--max-tokens', '2'])")
    assert not loaded(modules, {"onnx", "networkx", "llmc.driver", "llmc.codegen", "llmc.passes"})
