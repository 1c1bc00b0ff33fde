"""The runtime's door to the compiler; the only module of the runtime that knows the driver.

The driver is imported when something must be compiled, so that running an artifact never loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmc import knobs
from llmc.ir.graph import Graph
from llmc.runtime.artifact import Artifact
from llmc.runtime.cache import Cache, source_key, text_key
from llmc.runtime.progress import Progress, silent


def cached_artifact(path: Path, target: str, dtype: str | None, cache_dir: Path | None,
                    limits: dict[str, tuple[int, int]], progress: Progress = silent) -> Artifact:
    """The model's artifact from the cache, compiled first if it is not there."""
    options = f"{target} {dtype} {sorted(limits.items())} {_cpu()}"
    key = source_key(path, options)

    def build(output: Path) -> None:
        from llmc.codegen.target import Target
        from llmc.driver import compile_model

        compile_model(path, Target.parse(target), dtype, progress, limits).write(output, progress)

    return Cache(cache_dir or knobs.cache_directory()).artifact(key, build)


def cached_graph(graph: Graph, parameters: Mapping[str, np.ndarray], target: str,
                 cache_dir: Path | None, limits: dict[str, tuple[int, int]],
                 progress: Progress = silent) -> Artifact:
    """The artifact of a traced graph with these parameters from the cache, or compiled into it."""
    from llmc.frontend.traced_model import traced_model

    model = traced_model(graph, parameters)
    key = text_key(f"{model.fingerprint} {target} {sorted(limits.items())} {_cpu()}")

    def build(output: Path) -> None:
        from llmc.codegen.target import Target
        from llmc.driver import compile_imported

        compile_imported(model, Target.parse(target), progress, limits).write(output, progress)

    return Cache(cache_dir or knobs.cache_directory()).artifact(key, build)


def _cpu() -> str:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()
