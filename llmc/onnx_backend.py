"""ONNX's own Backend interface (`onnx.backend.base`) over compiled code.

    import llmc.onnx_backend as backend

    backend.prepare(onnx.load("model.onnx")).run([x])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, defs, helper
from onnx.backend.base import Backend, BackendRep, Device, DeviceType, namedtupledict

from llmc.errors import ShapeError
from llmc.runtime.inference_session import CPU, CUDA, InferenceSession

PROVIDERS = {DeviceType.CPU: CPU, DeviceType.CUDA: CUDA}


class CompiledModel(BackendRep):
    """A model, compiled: what `prepare` gives."""

    def __init__(self, session: InferenceSession) -> None:
        self._session = session

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs, as a tuple whose fields have their names where these are identifiers.

        inputs: a list in the order of the graph's inputs (initialisers left out), one array where
        there is only one, or {name: array}. Trailing inputs may be left out where they are
        optional. ShapeError where they do not fit.
        """
        names = [each.name for each in self._session.get_inputs()]
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        else:
            if isinstance(inputs, np.ndarray):
                inputs = [inputs]
            if len(inputs) > len(names):
                raise ShapeError(f"{len(inputs)} inputs for a model that takes {len(names)}: "
                                 f"{', '.join(names)}")
            feeds = dict(zip(names, inputs, strict=False))
        results = self._session.run(None, feeds)
        return namedtupledict("Outputs", [each.name for each in self._session.get_outputs()])(
            *results)


class CompiledBackend(Backend):
    """Compiles models for this machine's CPU ("CPU") or GPU ("CUDA")."""

    @classmethod
    def prepare(cls, model: ModelProto, device: str = "CPU", **kwargs: Any) -> CompiledModel:
        """The model, compiled. ModelError if it is bad or has operators that llmc lacks."""
        return CompiledModel(InferenceSession(
            model.SerializeToString(), providers=[PROVIDERS[Device(device).type]],
            threads=1, specialize="none"))

    @classmethod
    def run_model(cls, model: ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any
                  ) -> tuple[Any, ...]:
        """Compile a model and run it once."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(cls, node: NodeProto, inputs: Sequence[Any], device: str = "CPU",
                 outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None = None,
                 **kwargs: Any) -> tuple[Any, ...]:
        """Compile and run one node on arrays; kwargs may have `opset_version`."""
        given = [name for name in node.input if name]
        arrays = [np.asarray(each) for each in inputs]
        declared = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(given, arrays, strict=True)]
        graph = helper.make_graph(
            [node], "node", declared,
            [helper.make_empty_tensor_value_info(name) for name in node.output if name])
        opset = helper.make_opsetid(
            node.domain, kwargs.get("opset_version", defs.onnx_opset_version()))
        return cls.run_model(helper.make_model(graph, opset_imports=[opset]), arrays, device)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """"CPU", and "CUDA" where there is a GPU."""
        kind = Device(device).type
        if kind == DeviceType.CPU:
            return True
        if kind != DeviceType.CUDA:
            return False
        from llmc.errors import DeviceError
        from llmc.runtime.cuda_device import Device as CudaDevice

        try:
            CudaDevice(Device(device).device_id)
        except DeviceError:
            return False
        return True


prepare = CompiledBackend.prepare
run_model = CompiledBackend.run_model
run_node = CompiledBackend.run_node
supports_device = CompiledBackend.supports_device
is_compatible = CompiledBackend.is_compatible
