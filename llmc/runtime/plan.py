"""Runs a plan: host-side functions, loops and programs in order, over values by name. `open_model`
opens whatever an ONNX model needs: one program, several in stages, or a plan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import LlmcError, ModelError, ShapeError
from llmc.ir.plan import HostStep, LoopStep, Plan
from llmc.runtime.host_functions import HOST_FUNCTIONS
from llmc.runtime.host_loop import run_loop
from llmc.runtime.jit import host_plan, typed_part
from llmc.runtime.staged import MOST_VALUES, StagedModel

Array = np.ndarray[Any, Any]


def open_model(source: Path | bytes, target: str, options: Mapping[str, Any],
               fed: Collection[str] = ()) -> StagedModel | PlannedModel:
    """An .onnx file, or such a file's content, ready to run. fed: names of overridable initializers
    that are inputs. ModelError: it is bad or has operators that llmc lacks."""
    try:
        model = StagedModel(source, target, options, fed)
    except ModelError:
        plan = host_plan(source, fed) if isinstance(source, bytes) or source.is_file() else None
        if plan is None:
            raise
        return PlannedModel(plan, target, options)
    plan = host_plan(source, fed) if model.runtime is None else None
    if plan is None:
        return model
    model.close()
    return PlannedModel(plan, target, options)


class TypedProgram:
    """A model that is compiled when the types and shapes of its inputs are first met. Axes that
    differ from one call to the next become symbols."""

    def __init__(self, model: bytes, target: str, options: Mapping[str, Any]) -> None:
        self.model, self.target, self.options = model, target, dict(options)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._varying: dict[str, set[int]] = {}
        self._programs: OrderedDict[tuple[Any, ...], StagedModel | PlannedModel] = OrderedDict()

    def run(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. ShapeError where the inputs do not fit."""
        for name, array in given.items():
            last = self._shapes.get(name)
            if last is not None and len(last) == array.ndim:
                self._varying.setdefault(name, set()).update(
                    axis for axis, pair in enumerate(zip(last, array.shape, strict=True))
                    if pair[0] != pair[1])
            self._shapes[name] = array.shape
        return self._program(given).run(given)

    def _program(self, given: Mapping[str, Array]) -> StagedModel | PlannedModel:
        exact = tuple((array.dtype, array.shape) for array in given.values())
        general = tuple((array.dtype, *(None if axis in self._varying.get(name, ()) else size
                                        for axis, size in enumerate(array.shape)))
                        for name, array in given.items())
        for key in (exact, general):
            if key in self._programs:
                self._programs.move_to_end(key)
                return self._programs[key]
        if len(self._programs) >= MOST_VALUES:
            self._programs.popitem(last=False)[1].close()
        try:
            self._programs[general] = self._open(given, self._varying)
            return self._programs[general]
        except ModelError:  # no program fits all sizes
            self._programs[exact] = self._open(given, {})
            return self._programs[exact]

    def _open(self, given: Mapping[str, Array], varying: Mapping[str, set[int]]
              ) -> StagedModel | PlannedModel:
        return open_model(typed_part(self.model, given, varying), self.target, self.options)

    def close(self) -> None:
        """Stop the threads of all programs."""
        for program in self._programs.values():
            program.close()


class PlannedModel:
    """A model that computes with text or has loops that the host counts. Not thread-safe."""

    runtime = None  # there is no single program to ask

    def __init__(self, plan: Plan, target: str, options: Mapping[str, Any]) -> None:
        self.plan = plan
        self._programs = {
            number: TypedProgram(step.model, target, options)
            for number, step in enumerate(plan.steps) if not isinstance(step, HostStep)}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. ShapeError where the inputs do not fit."""
        values: dict[str, Array] = {**self.plan.constants, **feeds}
        for number, step in enumerate(self.plan.steps):
            inputs = [_value(values, name) for name in step.inputs]
            if isinstance(step, HostStep):
                results = _on_host(step, inputs)
                values.update(zip(step.outputs, results, strict=False))
            elif isinstance(step, LoopStep):
                values.update(run_loop(step, values, self._programs[number].run))
            else:
                given = dict(zip(step.inputs, inputs, strict=True))
                values.update(self._programs[number].run(given))
        return {name: _value(values, name) for name in self.plan.outputs}

    def close(self) -> None:
        """Stop the threads of all programs."""
        for program in self._programs.values():
            program.close()


def _value(values: Mapping[str, Array], name: str) -> Any:
    """A value by name, None for an input that is left out."""
    if name and name not in values:
        raise ShapeError(f"missing input {name}")
    return values[name] if name else None


def _on_host(step: HostStep, inputs: list[Any]) -> list[Array]:
    try:
        return HOST_FUNCTIONS[step.op](inputs, step.attributes)
    except LlmcError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ShapeError(f"node '{step.name}' ({step.op}): {error}") from error
