"""Runs a plan: host-side functions and programs in order, over values by name. `open_model` opens
whatever an ONNX model needs: one program, several in stages, or a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import LlmcError, ModelError, ShapeError
from llmc.ir.plan import HostStep, Plan, ProgramStep
from llmc.runtime.host_functions import HOST_FUNCTIONS
from llmc.runtime.jit import host_plan, typed_part
from llmc.runtime.staged import StagedModel

Array = np.ndarray[Any, Any]


def open_model(source: Path | bytes, target: str, options: Mapping[str, Any]
               ) -> StagedModel | PlannedModel:
    """An .onnx file, or such a file's content, ready to run. ModelError: it is bad or has operators
    that llmc lacks."""
    try:
        return StagedModel(source, target, options)
    except ModelError:
        plan = host_plan(source) if isinstance(source, bytes) or source.is_file() else None
        if plan is None:
            raise
        return PlannedModel(plan, target, options)


class PlannedModel:
    """A model that computes with text. Not thread-safe.

    Its programs are compiled when the types and shapes of their inputs are first met.
    """

    runtime = None  # there is no single program to ask

    def __init__(self, plan: Plan, target: str, options: Mapping[str, Any]) -> None:
        self.plan, self.target, self.options = plan, target, dict(options)
        self._programs: dict[tuple[Any, ...], StagedModel] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. ShapeError where the inputs do not fit."""
        values: dict[str, Array] = {**self.plan.constants, **feeds}
        for number, step in enumerate(self.plan.steps):
            inputs = [_value(values, name) for name in step.inputs]
            if isinstance(step, HostStep):
                results = _on_host(step, inputs)
                values.update(zip(step.outputs, results, strict=False))
            else:
                given = dict(zip(step.inputs, inputs, strict=True))
                values.update(self._program(number, step, given).run(given))
        return {name: _value(values, name) for name in self.plan.outputs}

    def _program(
        self, number: int, step: ProgramStep, given: Mapping[str, Any]
    ) -> StagedModel:
        key = (number, *((array.dtype, array.shape) for array in given.values()))
        if key not in self._programs:
            model = typed_part(step.model, given)
            self._programs[key] = StagedModel(model, self.target, self.options)
        return self._programs[key]

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
