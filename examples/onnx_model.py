"""Run an ONNX file through Runtime: build a small one, then feed it batches of two sizes.

    python examples/onnx_model.py [model.onnx]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import llmc


def small_model(path: Path) -> Path:
    """y = relu(x @ w + b) with a dynamic batch."""
    random = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["product"]),
         helper.make_node("Add", ["product", "b"], ["sum"]),
         helper.make_node("Relu", ["sum"], ["y"])],
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(random.standard_normal((24, 10), np.float32), "w"),
         numpy_helper.from_array(random.standard_normal(10, np.float32), "b")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def main(model: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = model or small_model(Path(directory) / "model.onnx")
        with llmc.Runtime(path) as runtime:
            for tensor in runtime.executor.inputs:
                print("input ", tensor)
            if model is None:
                for batch in (1, 5):
                    result = runtime.run({"x": np.ones((batch, 24), np.float32)})
                    print("output", {name: value.shape for name, value in result.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
