"""compile, load, load_graph: what stands in llmc's public surface besides Runtime and trace."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.errors import LlmcError
from llmc.ir.graph import Graph
from llmc.ir.quantization import Quantization, quantization
from llmc.runtime.artifact import Artifact, Manifest


@dataclass(frozen=True)
class Compiled:
    """A compiled model on disk (in the cache, or where `load` found it)."""

    path: Path
    manifest: Manifest

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Copy the artifact to `path` (a directory that does not exist yet)."""
        target = Path(path)
        if target.exists():
            raise LlmcError(f"{target} exists: choose another path or remove it first")
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            shutil.copytree(self.path, temporary)
            temporary.rename(target)
        except OSError as error:
            raise LlmcError(f"cannot write {target}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target


def compile(model: str | os.PathLike[str] | Graph, target: str = "host", dtype: str | None = None,
            shape: dict[str, tuple[int, int]] | None = None,
            cache_dir: str | os.PathLike[str] | None = None,
            parameters: Mapping[str, np.ndarray] | None = None,
            quantize: str | Quantization | None = None, kv_cache: str | None = None) -> Compiled:
    """Compile an .onnx file, a checkpoint directory or a traced graph for this machine or another.

    target: "host", or a CPU such as "x86_64:znver5". dtype: compute dtype (default: the
    checkpoint's). shape: symbol -> (low, high), narrower than the model's own ranges. parameters:
    values of a traced graph's parameters by name. quantize: what weights become, "int8", "int4" or
    a `Quantization` (default: they stay as they are). kv_cache: "int8" stores keys and values as
    8-bit codes.
    """
    from llmc.runtime.jit import cached_artifact, cached_graph

    cache, limits = Path(cache_dir) if cache_dir else None, dict(shape or {})
    chosen = quantization(quantize, kv_cache)
    if isinstance(model, Graph):
        if dtype is not None:
            raise LlmcError("a traced graph computes in the dtypes that it was traced with")
        artifact = cached_graph(model, parameters or {}, target, cache, limits,
                                quantization=chosen)
    else:
        if parameters is not None:
            raise LlmcError("parameters are for a traced graph: other models bring their own")
        artifact = cached_artifact(Path(model), target, dtype, cache, limits,
                                   quantization=chosen)
    return Compiled(artifact.directory, artifact.manifest)


def load(path: str | os.PathLike[str]) -> Compiled:
    """An artifact directory that `llmc compile` or `Compiled.save` wrote."""
    artifact = Artifact(path)
    return Compiled(artifact.directory, artifact.manifest)


def load_graph(path: str | os.PathLike[str], dtype: str | None = None) -> Graph:
    """The graph of a model as its frontend imports it, before any pass."""
    from llmc.frontend.model import load_model

    return load_model(path if isinstance(path, str) else Path(path), dtype=dtype).graph


