"""llmc: a compiler for transformer models that needs nothing but `pip install`.

    runtime = llmc.Runtime("path/to/model")       an .onnx file, a checkpoint, or an artifact
    runtime.run(tokens)                           logits
    llmc.compile("path/to/model").save("model.llmc")

Names are loaded when first used, so that `import llmc` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmc.errors import (
    CacheError,
    CompileError,
    DeviceError,
    GraphError,
    LlmcError,
    ModelError,
    ShapeError,
    TraceError,
)

if TYPE_CHECKING:
    from llmc.api import Compiled, compile, load, load_graph
    from llmc.frontend.trace import Spec, trace
    from llmc.ir.graph import Graph
    from llmc.ir.quantization import Quantization
    from llmc.runtime.inference_session import InferenceSession
    from llmc.runtime.session import Runtime

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "CompileError",
    "Compiled",
    "DeviceError",
    "Graph",
    "GraphError",
    "InferenceSession",
    "LlmcError",
    "ModelError",
    "Quantization",
    "Runtime",
    "ShapeError",
    "Spec",
    "TraceError",
    "compile",
    "load",
    "load_graph",
    "trace",
]

_HOMES = {
    "Compiled": "llmc.api",
    "Graph": "llmc.ir.graph",
    "InferenceSession": "llmc.runtime.inference_session",
    "Quantization": "llmc.ir.quantization",
    "Runtime": "llmc.runtime.session",
    "Spec": "llmc.frontend.trace",
    "compile": "llmc.api",
    "load": "llmc.api",
    "load_graph": "llmc.api",
    "trace": "llmc.frontend.trace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
