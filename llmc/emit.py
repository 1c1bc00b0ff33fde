"""Models for C: an object file or shared library, its header and its weights.

    NAME.o or NAME.so   code with the C ABI       NAME.h   the header
    NAME.weights        packed weights, to be mapped; written beside the code
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmc.codegen.host.abi import generate_abi
from llmc.codegen.host.abi_header import header
from llmc.codegen.host.abi_interface import Interface, check_prefix, fingerprint
from llmc.driver import Compiled
from llmc.errors import CompileError
from llmc.ir.program import Program
from llmc.runtime.progress import Progress, silent
from llmc.weights import WeightFile, WeightMaker, place, w_bytes, write_weights

SUFFIXES = {"obj": ".o", "so": ".so", "header": ".h"}
_WEIGHTS = ".weights"


def emit(compiled: Compiled, kinds: Sequence[str], output: str | os.PathLike[str],
         prefix: str = "llmc_", progress: Progress = silent) -> list[Path]:
    """Write what C needs of a model; returns the files.

    kinds: of obj, so, header. output: the file of the first kind; the others, and the weights that
    come with obj and so, lie beside it by the same name. prefix: begins every name in C. All files
    are written, then put in place; CompileError leaves what was there.
    """
    check_request(kinds, prefix)
    first = Path(output)
    paths = {kind: first if kind == kinds[0] else first.with_suffix(SUFFIXES[kind])
             for kind in kinds}
    interface = make_interface(compiled, prefix)
    if {"obj", "so"} & set(kinds):
        paths["weights"] = first.with_suffix(_WEIGHTS)
    if len(set(paths.values())) < len(paths):
        raise CompileError(f"{first}: its name must differ from those of the files beside it "
                           f"({', '.join(str(path) for path in paths.values())})")
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{first.name}.", dir=first.parent) as directory:
            made = Path(directory)
            if "header" in kinds:
                (made / "header").write_text(header(interface))
            if "weights" in paths:
                mark = _write_weights(compiled, made / "weights", progress)
                _write_code(compiled, replace(interface, fingerprint=mark), kinds, made)
            for kind, path in paths.items():
                (made / kind).replace(path)
    except OSError as error:
        raise CompileError(f"cannot write {first}: {error.strerror or error}") from None
    return list(paths.values())


def check_request(kinds: Sequence[str], prefix: str) -> None:
    """CompileError for kinds that cannot be emitted and prefixes that C does not allow."""
    check_prefix(prefix)
    if not kinds or (unknown := [kind for kind in kinds if kind not in SUFFIXES]):
        raise CompileError(f"cannot emit {', '.join(unknown) if kinds else 'nothing'}: it must be "
                           f"of {', '.join(SUFFIXES)}")
    if "so" in kinds and shutil.which("cc") is None:
        raise CompileError("a shared library needs the C compiler `cc`, which is not on PATH: emit "
                           "obj and link it yourself where there is one")


def make_interface(compiled: Compiled, prefix: str) -> Interface:
    """A compiled model as C will see it; CompileError where it cannot have a C ABI."""
    if compiled.target.kind == "nvptx":
        raise CompileError(f"{compiled.graph.name}: code for GPUs has no C ABI; compile for a host")
    offsets, size = weight_places(next(iter(compiled.programs.values())))
    config = compiled.model.config
    return Interface(
        compiled.graph.name, prefix, compiled.programs,
        {name: code.scratch_bytes for name, code in compiled.codes.items()},
        offsets, size, config.vocab_size or 0, config.max_context or 0)


def weight_places(program: Program) -> tuple[tuple[int, ...], int]:
    """Offset of every copy of every weight in the packed file, and the file's size."""
    offsets, size = [], 0
    for weight in program.weights.values():
        for _ in weight.names:
            offsets.append(place(size, w_bytes(program, weight)))
            size = offsets[-1] + w_bytes(program, weight)
    return tuple(offsets), size


def _write_code(compiled: Compiled, interface: Interface, kinds: Sequence[str], made: Path) -> None:
    texts = {name: code.llvm for name, code in compiled.codes.items()}
    (made / "obj").write_bytes(generate_abi(interface, texts, compiled.target))
    if "so" in kinds:
        command = ["cc", "-shared", "-Wl,-z,defs", "-o", str(made / "so"), "-x", "none",
                   str(made / "obj"), "-lpthread", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise CompileError(f"cc cannot link the shared library: {reason}")


def _write_weights(compiled: Compiled, path: Path, progress: Progress) -> int:
    """Pack the weights into a file; its fingerprint."""
    with open(path, "wb") as stream:
        file = WeightFile(stream)
        program = next(iter(compiled.programs.values()))
        for _ in write_weights(program, WeightMaker(compiled.model), file, progress):
            pass
        file.close()
    packed = np.memmap(path, np.uint8, "r") if file.size else np.empty(0, np.uint8)
    return fingerprint(packed)
