"""Decode steps that feed each other on this CPU: what a step takes is bound once, not per token.

Inputs and outputs stay in place from step to step; arrays are made and arguments bound when the
page table changes, the team is new or other code runs. Between these, a step takes of Python one
native call, the choice of the tokens, and two additions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import LlmcError, ShapeError
from llmc.runtime.decode import Start
from llmc.runtime.sampling import NO_TOKEN, Sampler

if TYPE_CHECKING:
    from llmc.runtime.executor import Arguments, Executor, Variant
    from llmc.runtime.trials import Trial

COUNTED_TOGETHER = 16  # steps that the profile hears of at once, behind the first


@dataclass(eq=False)
class Choice:
    """What runs steps of these values until something changes. trial: it belongs to that, and is
    one step's only."""

    variant: Variant
    values: dict[str, int]
    trial: Trial | None
    arguments: Arguments


class HostDecoder:
    """Steps of `count` sequences that decode together on an Executor.

    `start`, then `step` and `read` in turn. Whoever uses it serialises that with the executor's own
    steps.
    """

    ahead = 1  # a step has run when `step` returns

    def __init__(self, executor: Executor, count: int):
        self.executor, self.count = executor, count
        numbers = np.arange(count + 1, dtype=np.int32)
        self._ids, self._positions, self._slots = (np.zeros(count, np.int32) for _ in range(3))
        self._inputs = {
            "ids": self._ids, "positions": self._positions, "slots": self._slots,
            "sequence": numbers[:-1], "rows": numbers[:-1], "offsets": numbers}
        self._outputs: dict[str, np.ndarray] = {}
        self._choice: Choice | None = None
        self._known: Choice | None = None  # that the profile heard of
        self._chosen_by: Any = None  # the dispatch table
        self._handle: int | None = None  # of the team that arguments are for
        self._calls, self._seconds = 0, 0.0  # of the choice, which nobody was told of

    def start(self, starts: Sequence[Start]) -> None:
        """Begin with these sequences, as many as this decoder is for."""
        self._ids[:] = [each.token for each in starts]
        self._positions[:] = [each.position for each in starts]
        self._position = starts[0].position
        self._slots[:] = [each.slot for each in starts]
        self._sampler: Sampler | None = None
        if any(each.sampling.temperature > 0 for each in starts):
            none, config = np.empty(0, np.int64), self.executor.artifact.manifest.config
            self._sampler = Sampler(self.count, config["vocab_size"])
            for slot, each in enumerate(starts):
                self._sampler.assign(slot, each.sampling, each.choice, none, none)

    def step(self, page_rows: Sequence[np.ndarray] | None) -> None:
        """Run the next step and choose its tokens. page_rows: each sequence's pages, i32, enough
        for the step's tokens; None where they are those of the step before."""
        executor = self.executor
        executor.require_open()
        if page_rows is not None:
            self._take_pages(page_rows)
        if self._chosen_by is not executor.dispatch.table \
                or self._handle != executor.team.handle:
            self._choose()
        choice = self._choice
        assert choice is not None
        began = time.perf_counter()
        code = choice.variant.step(choice.arguments.address)
        self._seconds += time.perf_counter() - began
        self._calls += 1
        if self._calls == COUNTED_TOGETHER or choice is not self._known:
            self._tell()
        if code:
            raise LlmcError("the step was cancelled")
        if self.count == 1:  # what a ufunc needs is not in the caches behind a step: 10 us
            self._positions[0] = self._position = self._position + 1
        else:
            self._positions += 1
        self._choose_tokens()

    def read(self) -> np.ndarray:
        """The tokens of the last step, i32 [count]."""
        return self._ids.copy()

    def drain(self) -> None:
        """Let the profile know of all steps."""
        self._tell()
        self._chosen_by = None

    def _choose_tokens(self) -> None:
        """The next step's ids: the likeliest tokens, or random ones. ShapeError where a model's
        logits are not finite: it has no next token."""
        logits = self._outputs["logits"]
        if self._sampler is not None:
            slots = range(self.count)
            self._ids[:] = self._sampler.sample(logits, slots, self._positions.tolist())
            possible = self._ids.min() != NO_TOKEN
        elif self.count == 1:
            best = logits.argmax()
            self._ids[0] = best
            possible = isfinite(logits.item(best))
        else:
            logits.argmax(axis=1, out=self._best)
            self._ids[:] = self._best
            possible = np.isfinite(logits[self._inputs["rows"], self._ids]).all()
        if not possible:
            raise ShapeError("no token can follow: the model's logits are not finite")

    def _tell(self) -> None:
        """Let the variant, its trial and the profile know of the steps that were counted."""
        choice, calls, seconds = self._choice, self._calls, self._seconds
        self._calls, self._seconds = 0, 0.0
        if choice is None or not calls:
            return
        self._known = choice
        choice.variant.calls += calls
        choice.variant.seconds += seconds
        self.executor.dispatch.count(choice.values, choice.variant, seconds, calls)
        if choice.trial is not None:
            choice.trial.observe(choice.variant, seconds)

    # ---- what steps are given -------------------------------------------------------------------

    def _take_pages(self, page_rows: Sequence[np.ndarray]) -> None:
        table = np.zeros((self.count, max(1, *map(len, page_rows))), np.int32)
        for row, pages in zip(table, page_rows, strict=True):
            row[:len(pages)] = pages
        self._inputs["page_table"] = table
        self._chosen_by = None

    def _choose(self) -> None:
        """Choose what runs the next step, and bind its arguments."""
        self._tell()
        executor, dispatch = self.executor, self.executor.dispatch
        table = dispatch.table  # the choice holds as long as nobody replaces it
        values = executor.known | {
            "tokens": self.count, "sequences": self.count, "rows": self.count,
            "table_width": self._inputs["page_table"].shape[1]}
        variant: Any = dispatch.choose(values)
        if not self._outputs:
            self._outputs = {tensor.name: np.empty(tensor.concrete_shape(values), tensor.numpy)
                             for tensor in executor.outputs}
            self._best = np.zeros(self.count, np.int64)
        given = [self._inputs[tensor.name] for tensor in executor.inputs]
        self._handle = executor.team.handle
        arguments = executor.arguments(variant, values, given, list(self._outputs.values()))
        self._choice = Choice(variant, values, dispatch.trial, arguments)
        self._chosen_by = None if dispatch.trial else table
