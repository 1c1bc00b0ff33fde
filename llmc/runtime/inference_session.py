"""InferenceSession: what code written for onnxruntime calls, over a compiled model."""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import DeviceError, LlmcError, ShapeError
from llmc.ir.dims import Dim, Symbol
from llmc.ir.listed import ITEMS, collected, spread
from llmc.runtime.artifact import is_artifact
from llmc.runtime.binding import Tensor
from llmc.runtime.jit import onnx_interface, onnx_metadata, onnx_overridable
from llmc.runtime.plan import PlannedModel, open_model
from llmc.runtime.session import Runtime
from llmc.runtime.staged import MOST_VALUES, StagedModel
from llmc.runtime.targets import resolve_target

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
Source = str | os.PathLike[str] | bytes
Model = Runtime | StagedModel | PlannedModel
TARGETS = {CPU: "host", CUDA: "nvptx"}
NUMPY_KINDS = {f"tensor({name})" for name in (
    "bool", "float16", "float", "double", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64")}
# Names that ONNX gives to dtypes whose NumPy names differ.
TYPE_NAMES = {
    "bool_": "bool", "float64": "double", "float32": "float", "float8_e8m0fnu": "float8e8m0",
    "float4_e2m1fn": "float4e2m1",
}


@dataclass(frozen=True)
class NodeArg:
    """An input or output: shape has an int, a symbol's name or None for each axis; type is such as
    "tensor(float)"."""

    name: str
    shape: list[int | str | None]
    type: str


@dataclass(frozen=True)
class ModelMetadata:
    """What a model says of itself; version: 2^63 - 1 if the file has none."""

    producer_name: str = ""
    graph_name: str = ""
    domain: str = ""
    description: str = ""
    graph_description: str = ""
    version: int = 0
    custom_metadata_map: dict[str, str] = field(default_factory=dict)


class InferenceSession:
    """An ONNX model, compiled and ready to run; takes the place of onnxruntime's class.

    path_or_bytes: an .onnx file (compiled into the cache), an artifact, or an .onnx file's content.
    A model whose shapes depend on the values of tensors is compiled for them when they are met.
    sess_options: an object whose `intra_op_num_threads` counts; what else it says is for another
    runtime. providers: names, or pairs of name and options; the first that llmc has decides between
    the CPU (default) and a GPU ("CUDAExecutionProvider"). Where that cannot be used, the CPU is if
    it is named too, with a warning; else it is a DeviceError.
    ModelError: the model is bad or has operators that llmc lacks.
    """

    def __init__(
        self,
        path_or_bytes: Source,
        sess_options: Any = None,
        providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self._provider, target = _chosen(providers, options.get("device", 0))
        threads = getattr(sess_options, "intra_op_num_threads", 0)
        if isinstance(threads, int) and threads > 0:
            options.setdefault("threads", threads)
        self._model = _open(path_or_bytes, target, options)
        self._fed = OrderedDict[frozenset[str], Model]()
        self._closed, self._lock = False, threading.Lock()
        self._inputs, self._outputs = _interface(path_or_bytes, self._model)
        self._overridable = _overridable(path_or_bytes, self._model)
        self._source, self._target, self._options = path_or_bytes, target, options

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[np.ndarray]:
        """The outputs of these names (None or empty: all), in that order.

        input_feed: an array for every input by its name. ShapeError names the input that is
        missing, unknown, or whose type or shape does not fit: arrays are not cast, while lists
        become arrays of the input's type. An overridable initializer may be fed: the first time,
        the model is compiled with it as an input. `run_options` has nothing to say.
        """
        known = {each.name for each in self._outputs}
        if unknown := set(output_names or ()) - known:
            raise ShapeError(f"no output {', '.join(sorted(unknown))}; the model has "
                             f"{', '.join(sorted(known))}")
        kinds = {each.name: each.type for each in (*self._inputs, *self._overridable)}
        arrays: dict[str, np.ndarray] = {}
        for name, value in input_feed.items():
            arrays |= _arrays(name, value, kinds.get(name, ""))
        fed = frozenset(input_feed).intersection(each.name for each in self._overridable)
        with self._lock:
            results = self._model_with(fed).run(arrays)
        names = output_names or [each.name for each in self._outputs]
        return [collected(name, results) for name in names]

    def _model_with(self, fed: frozenset[str]) -> Model:
        """The model in which these overridable initializers are inputs."""
        if not fed or self._closed:
            return self._model
        if fed not in self._fed:
            self._fed[fed] = _open(self._source, self._target, self._options, fed)
            if len(self._fed) > MOST_VALUES:
                self._fed.popitem(last=False)[1].close()
        self._fed.move_to_end(fed)
        return self._fed[fed]

    def get_inputs(self) -> list[NodeArg]:
        """The inputs that a call has to give."""
        return list(self._inputs)

    def get_overridable_initializers(self) -> list[NodeArg]:
        """The inputs that a call may give: the model has values for them. An artifact has none:
        those values are part of it."""
        return list(self._overridable)

    def get_outputs(self) -> list[NodeArg]:
        """The outputs, in the order in which `run` gives them."""
        return list(self._outputs)

    def get_modelmeta(self) -> ModelMetadata:
        """What the ONNX file says of itself; an artifact keeps of that the graph's name."""
        return _metadata(self._source, self._model)

    def get_providers(self) -> list[str]:
        """The one that runs this model."""
        return [self._provider]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """None were taken."""
        return {self._provider: {}}

    def close(self) -> None:
        """Stop the threads; running afterwards is an LlmcError."""
        self._closed = True
        for model in (self._model, *self._fed.values()):
            model.close()


def _chosen(providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None, device: int
            ) -> tuple[str, str]:
    """The provider and its target. Without a usable GPU the CPU is taken if it is named too."""
    names = [each if isinstance(each, str) else each[0] for each in providers or [CPU]]
    known = [name for name in names if name in TARGETS]
    if not known:
        raise LlmcError(f"no provider of {', '.join(names)} is known; llmc has "
                        f"{', '.join(TARGETS)}")
    try:
        return known[0], resolve_target(TARGETS[known[0]], device)
    except DeviceError as error:
        if CPU not in known:
            raise DeviceError(f"{error} (of an InferenceSession: providers=[{CPU!r}])") from None
        warnings.warn(f"the model runs on the CPU: {error}", stacklevel=3)
        return CPU, TARGETS[CPU]


def _open(source: Source, target: str, options: Mapping[str, Any],
          fed: frozenset[str] = frozenset()) -> Model:
    if isinstance(source, bytes):
        return open_model(source, target, options, fed)
    path = Path(source)
    if path.suffix == ".onnx" and not is_artifact(path):
        return open_model(path, target, options, fed)
    return Runtime(path, target.partition(":")[0], **options)


def _interface(source: Source, model: Model
               ) -> tuple[list[NodeArg], list[NodeArg]]:
    runtime = model if isinstance(model, Runtime) else model.runtime
    if runtime is not None and not any(ITEMS in each.name for each in runtime.executor.outputs):
        return ([_node_arg(each) for each in runtime.executor.inputs],
                [_node_arg(each) for each in runtime.executor.outputs])
    inputs, outputs = onnx_interface(source if isinstance(source, bytes) else Path(source))
    return ([NodeArg(name, shape, kind) for name, kind, shape in inputs],
            [NodeArg(name, shape, kind) for name, kind, shape in outputs])


def _overridable(source: Source, model: Model) -> list[NodeArg]:
    if isinstance(model, Runtime):  # an artifact
        return []
    declared = onnx_overridable(source if isinstance(source, bytes) else Path(source))
    return [NodeArg(name, shape, kind) for name, kind, shape in declared]


def _metadata(source: Source, model: Model) -> ModelMetadata:
    if isinstance(model, Runtime):  # an artifact
        return ModelMetadata("llmc", model.manifest.name)
    return ModelMetadata(**onnx_metadata(source if isinstance(source, bytes) else Path(source)))


def _array(name: str, value: Any) -> np.ndarray:
    if value is None:
        raise ShapeError(f"input {name} is None; it needs an array")
    array = np.asarray(value)
    if array.dtype.kind in "OUSM":
        raise ShapeError(f"input {name} cannot take values of type {array.dtype}")
    return array


def _arrays(name: str, value: Any, kind: str) -> dict[str, np.ndarray]:
    """The arrays that an input of a kind such as "tensor(float)" is given as."""
    if kind.startswith(("seq", "optional")):
        return _listed(name, value)
    if kind == "tensor(string)":
        if np.asarray(value).dtype.kind not in "OUT":
            raise ShapeError(f"input {name} is a {kind} and cannot take values of type "
                             f"{np.asarray(value).dtype}")
        return {name: np.asarray(value, dtype=object)}
    array = _array(name, value)
    if isinstance(value, np.ndarray | np.generic) and _differs(array.dtype, kind):
        raise ShapeError(f"input {name} is a {kind} and cannot take values of type {array.dtype}: "
                         "convert them with astype")
    return {name: array}


def _differs(dtype: np.dtype[Any], kind: str) -> bool:
    """Whether a dtype is another than that of a kind of tensor. What NumPy lacks may be given in
    dtypes of its own."""
    given, wanted = f"tensor({TYPE_NAMES.get(dtype.name, dtype.name)})", kind
    return given != wanted and wanted in NUMPY_KINDS


def _listed(name: str, value: Any) -> dict[str, np.ndarray]:
    """A sequence (a list of arrays) or an optional (an array, a list or None) as tensors."""
    if value is None:
        return spread(name, None)
    items = value if isinstance(value, list | tuple) else [value]
    return spread(name, [_array(f"{name}.{number}", item) for number, item in enumerate(items)])


def _node_arg(tensor: Tensor) -> NodeArg:
    shape = [_extent(tensor, axis, dim) for axis, dim in enumerate(tensor.shape)]
    name = tensor.dtype.numpy_name
    return NodeArg(tensor.name, shape,
                   f"tensor({TYPE_NAMES.get(name, name.replace('float8_', 'float8'))})")


def _extent(tensor: Tensor, axis: int, dim: Dim) -> int | str | None:
    """An axis as onnxruntime shows it: None for one without a name of its own."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Symbol) and dim.name == f"{tensor.name}.{axis}":
        return None
    return str(dim)
