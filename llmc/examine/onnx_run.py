"""An ONNX file as onnxruntime runs it, with values from its middle: a second opinion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import LlmcError, ModelError
from llmc.examine.taps import tap_points
from llmc.ir.graph import Graph, Node, origin_of


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


def result_names(path: Path, graph: Graph) -> tuple[list[Node], list[str]]:
    """The points that are results of the file's nodes or outputs, and the names of their values."""
    onnx, _ = _modules()
    model = onnx.load(path, load_external_data=False)
    values = {node.name or node.output[0]: node.output[0] for node in model.graph.node
              if node.output and node.output[0]}
    points = tap_points(graph)
    last: dict[str, Node] = {}
    for node in points:
        origin = origin_of(node)
        if origin is not None and origin.node in values:
            last[values[origin.node]] = node
    declared, known = {output.name for output in model.graph.output}, set(points)
    last |= {name: node for name, node in graph.outputs if name in declared and node in known}
    order = {node: place for place, node in enumerate(points)}
    names = sorted(last, key=lambda name: order[last[name]])
    return [last[name] for name in names], names


def _modules():
    import onnx

    try:
        import onnxruntime
    except ImportError:
        raise LlmcError("--onnxruntime needs onnxruntime: pip install onnxruntime") from None
    return onnx, onnxruntime
