"""An ONNX file as onnxruntime runs it, with values from its middle: a second opinion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import LlmcError, ModelError
from llmc.ir.graph import Node, origin_of


@dataclass(frozen=True)
class OnnxRuntimeSide:
    """What onnxruntime computes for the nodes of a file from these inputs; names: the value that
    belongs to each point."""

    path: Path
    inputs: Mapping[str, np.ndarray]
    names: Sequence[str]

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The values of the points; the graph's own outputs are not computed."""
        onnx, runtime = _modules()
        model = onnx.load(self.path, load_external_data=False)
        wanted = [self.names[number] for number in numbers]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(wanted))
        # Beside the file, or external data would not be found.
        temporary = self.path.with_name(f".{self.path.name}.taps")
        try:
            temporary.write_bytes(model.SerializeToString())
            session = runtime.InferenceSession(
                str(temporary), _as_written(runtime), providers=["CPUExecutionProvider"])
            return list(session.run(wanted, dict(self.inputs)))
        except OSError as error:
            raise ModelError(f"{temporary}: {error.strerror or error}") from None
        finally:
            temporary.unlink(missing_ok=True)


def _as_written(runtime: Any) -> Any:
    """Options to compute the nodes as the file has them: onnxruntime's fused products of int8
    saturate in 16 bits on CPUs without VNNI, which makes them wrong by many steps."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def result_names(path: Path, points: Sequence[Node]) -> tuple[list[Node], list[str]]:
    """The points that are results of the file's nodes, and the names of their values."""
    onnx, _ = _modules()
    model = onnx.load(path, load_external_data=False)
    outputs = {node.name or node.output[0]: node.output[0] for node in model.graph.node
               if node.output and node.output[0]}
    last: dict[str, Node] = {}
    for node in points:
        origin = origin_of(node)
        name = origin.node if origin else None
        if name is not None and name in outputs:
            last.pop(name, None)
            last[name] = node
    return list(last.values()), [outputs[name] for name in last]


def _modules():
    import onnx

    try:
        import onnxruntime
    except ImportError:
        raise LlmcError("--onnxruntime needs onnxruntime: pip install onnxruntime") from None
    return onnx, onnxruntime
