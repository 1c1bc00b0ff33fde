"""Models whose shapes depend on data: compiled code computes the values that decide shapes, and the
rest is compiled for them.

The programs form a tree. A stage computes one such value (or the value is an input) and has a child
for each value that it met; a leaf computes the model's outputs.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import LlmcError, ShapeError, ValueNeeded
from llmc.ir.listed import ITEMS
from llmc.runtime.jit import onnx_artifact
from llmc.runtime.session import Runtime

MOST_VALUES = 16  # of one tensor, whose programs are kept


class Stage:
    """One program. key: of the value that it computes, None if it computes the model's outputs;
    runtime: None if that value is the input of this name."""

    def __init__(self, runtime: Runtime | None, key: str | None) -> None:
        self.runtime, self.key = runtime, key
        self.children: OrderedDict[bytes, Stage] = OrderedDict()

    def value(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """What decides the shapes that come next."""
        if self.runtime is not None:
            return self.runtime.run(_tensors(feeds))["value"]
        if self.key is None or self.key not in feeds:
            raise ShapeError(f"missing input {self.key}")
        return np.asarray(feeds[self.key])

    def close(self) -> None:
        """Stop the threads of this stage and of all below it."""
        for child in self.children.values():
            child.close()
        if self.runtime is not None:
            self.runtime.close()


def _tensors(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What programs take: descriptions of lists only decide which program it is."""
    return {name: array for name, array in feeds.items() if not name.endswith(ITEMS)}


class StagedModel:
    """An ONNX model (a file or its content) that is compiled for the values of tensors that decide
    shapes; one whose shapes depend on no values is one stage, kept in the cache if it is a file.
    fed: names of overridable initializers that are inputs. Not thread-safe."""

    def __init__(self, source: Path | bytes, target: str, options: Mapping[str, Any],
                 fed: Collection[str] = ()) -> None:
        self.source, self.target, self.options, self.fed = source, target, dict(options), fed
        self.root = self._whole() or self._compile({})

    @property
    def runtime(self) -> Runtime | None:
        """The program if it depends on no values."""
        return None if self.root.key is not None else self.root.runtime

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name. ShapeError where the inputs do not fit."""
        if self.runtime is not None:  # has no lists: their lengths are values
            return self.runtime.run(feeds)
        stage, values = self.root, dict[str, np.ndarray]()
        while stage.key is not None:
            value = stage.value(feeds)
            if stage.key in values:
                raise LlmcError(f"the value of {stage.key} decides shapes and cannot be given")
            values[stage.key] = value
            stage = self._child(stage, value, values)
        if stage.runtime is None:
            raise LlmcError("a program without code")
        return stage.runtime.run(_tensors(feeds))

    def _child(self, stage: Stage, value: np.ndarray, values: Mapping[str, np.ndarray]) -> Stage:
        identity = f"{value.dtype}{value.shape}".encode() + value.tobytes()
        child = stage.children.get(identity)
        if child is None:
            child = stage.children[identity] = self._compile(values)
            if len(stage.children) > MOST_VALUES:
                stage.children.popitem(last=False)[1].close()
        stage.children.move_to_end(identity)
        return child

    def _whole(self) -> Stage | None:
        """A file that is one program, as a Runtime keeps it; None for others."""
        if isinstance(self.source, bytes) or self.fed:
            return None
        try:
            return Stage(Runtime(self.source, self.target.partition(":")[0], **self.options), None)
        except ValueNeeded:
            return None

    def _compile(self, values: Mapping[str, np.ndarray]) -> Stage:
        for name in ("dtype", "quantize"):
            if self.options.get(name) is not None:
                raise LlmcError(f"{name} is for an .onnx file that is one program; the programs of "
                                "this model compute as it says")
        options = {"specialize": "none", **self.options}  # its programs are for values already
        with tempfile.TemporaryDirectory() as directory:  # an open artifact needs its files no more
            path, key = onnx_artifact(
                self.source, values, self.target, Path(directory), self.fed)
            if path is None:
                return Stage(None, key)
            where = "host" if self.target == "host" else "nvptx"
            return Stage(Runtime(path, where, **options), key)

    def close(self) -> None:
        """Stop the threads of all programs."""
        self.root.close()
