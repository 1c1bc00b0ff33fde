"""The key of a model's artifact in the cache, from what it is made of.

Imports little, no NumPy: a start first asks whether there is anything to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import knobs
from llmc.runtime.sources import Memory, source_key

if TYPE_CHECKING:
    from llmc.ir.quantization import Quantization

MANIFEST = "manifest.json"


def artifact_key(path: Path, target: str, dtype: str | None, quantization: Quantization | None,
                 limits: dict[str, tuple[int, int]], cache: Path,
                 external: Callable[[Path], list[str]]) -> str:
    """What the artifact of a model's files is called in the cache directory. external: see
    `sources.source_key`. ModelError where a file cannot be read."""
    options = f"{target} {dtype} {sorted(limits.items())} {this_cpu()}{options_text(quantization)}"
    return source_key(path, options, Memory(cache / "sources.json"), external)


def find_artifact(path: Path, target: str, dtype: str | None, quantization: Quantization | None,
                  cache_dir: Path | None) -> Path | None:
    """The directory of a model's artifact if there is one: its own, or where the cache has that of
    a checkpoint for this CPU. None for an .onnx file: it brings no text."""
    if (path / MANIFEST).is_file():
        return path
    if target != "host" or not path.is_dir():
        return None
    cache = cache_dir or knobs.cache_directory()
    found = artifact_directory(cache, artifact_key(path, target, dtype, quantization, {}, cache,
                                                   lambda _: []))
    return found if (found / MANIFEST).is_file() else None


def artifact_directory(cache: Path, key: str) -> Path:
    """Where a cache directory has an artifact."""
    return cache / "artifacts" / f"{key}.llmc"


def this_cpu() -> str:
    """The CPU that code is compiled for."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()


def options_text(quantization: Quantization | None) -> str:
    """The part of a key that says what weights are compiled to."""
    return f" {quantization.text()}" if quantization is not None else ""
