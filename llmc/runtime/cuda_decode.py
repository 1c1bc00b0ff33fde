"""Decode steps that feed each other on the device: each is one launch of a captured graph.

A graph is the step's kernels, then `sample` where some sequence is not greedy, then `advance`,
which makes the chosen tokens the next step's input (see llmc/ir/choice.py). Nothing in it depends
on the host, which may be some steps behind: it reads tokens from a ring in its own memory. The
page table is copied when it gets more pages, the arguments when it gets wider, memory moved, or
other code runs. What a step between such changes takes of the host is four calls of the driver.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.ir.choice import FIELDS, SAMPLING
from llmc.runtime.cuda_device import (
    Device,
    Graph,
    Memory,
    PinnedMemory,
    call,
    event,
    launch,
    prepared,
    record_event,
)
from llmc.runtime.decode import AHEAD, RING, Start

if TYPE_CHECKING:
    from llmc.runtime.cuda_executor import CudaExecutor, DeviceVariant, Plan
    from llmc.runtime.dispatch import Trial

ALIGNMENT = 256  # bytes, of what lies in a region
ARGUMENTS = 9  # fields of a step's arguments
LEAST_WIDTH = 8  # pages of the narrowest page table
COUNTED_TOGETHER = 16  # steps that the profile hears of at once


class Region:
    """Device memory that the host fills. It has as many pinned copies as may be on their way."""

    def __init__(self, device: Device, sizes: Mapping[str, int], copies: int = 1):
        self.device = device
        self._places, total = {}, 0
        for name, size in sizes.items():
            self._places[name] = total
            total += -(-size // ALIGNMENT) * ALIGNMENT
        self._memory = Memory(device, total, "arguments")
        self._hosts = [HostCopy(device, self._memory.address, total) for _ in range(copies)]

    def at(self, name: str) -> int:
        """Device address of a part."""
        return self._memory.address + self._places[name]

    def copy(self, parts: Mapping[str, np.ndarray]) -> None:
        """Copy parts to the device, in the stream's order; the rest of the region is undefined."""
        host = self._hosts[0]
        self._hosts.append(self._hosts.pop(0))
        host.wait()
        for name, array in parts.items():
            place = self._places[name]
            host.memory.array[place:place + array.nbytes] = array.reshape(-1).view(np.uint8)
        host.copy()
        host.mark()

    def close(self) -> None:
        self._memory.close()
        for host in self._hosts:
            host.close()


class HostCopy:
    """Pinned memory that goes to the device as a whole: `wait` until it may be filled again, `copy`
    it, and `mark` the place in the stream behind that."""

    def __init__(self, device: Device, target: int, size: int):
        self.memory, self._done = PinnedMemory(size), event()
        self.wait = prepared("cuEventSynchronize", self._done)
        self.copy = prepared("cuMemcpyHtoDAsync", target, self.memory.address, size, device.stream)
        self.mark = prepared("cuEventRecord", self._done, device.stream)

    def close(self) -> None:
        self.memory.close()
        call("cuEventDestroy", self._done)


@dataclass(eq=False)
class Choice:
    """What runs steps of these values, until something changes. trial: it belongs to that, and is
    one step's only."""

    variant: Any
    values: Mapping[str, int]
    trial: Trial | None


class CudaDecoder:
    """Memory and graphs for `count` sequences that decode together on a CudaExecutor.

    `start`, then `step` and `read` in turn (at most RING - 1 steps may be unread). Whoever uses it
    serialises that with the executor's own steps. most_pages: of a sequence.
    """

    ahead = AHEAD

    def __init__(self, executor: CudaExecutor, count: int, most_pages: int):
        self.executor, self.count = executor, count
        self.trace: list[tuple[Any, Any]] | None = None  # events around each step, if wanted
        self._graphs: dict[tuple, Graph] = {}
        self._carried = Region(executor.device, {
            "steps": 8, "sampling": 8 * len(SAMPLING) * count,
            "ids": 4 * count, "positions": 4 * count, "sequence": 4 * count,
            "offsets": 4 * (count + 1), "rows": 4 * count, "slots": 4 * count})
        numbers = ARGUMENTS + len(executor.symbols) + len(executor.inputs) + len(executor.outputs)
        self._block = Region(executor.device, {
            "choice": 8 * len(FIELDS), "arguments": 8 * numbers}, copies=2)
        self._table = Region(executor.device, {
            "page_table": 4 * count * round_width(most_pages)}, copies=2)
        self._ring = PinnedMemory(4 * RING * count)
        self._tokens = list(self._ring.array[:4 * RING * count].view(np.int32).reshape(RING, count))
        self._events = [event() for _ in range(RING)]
        self._mark = [prepared("cuEventRecord", each, executor.device.stream)
                      for each in self._events]
        self._wait = [prepared("cuEventSynchronize", each) for each in self._events]
        self._launched = self._read = 0
        self._closed = False
        self._plans: dict[tuple, Plan] = {}
        self._prepared: tuple | None = None  # what the arguments on the device are for
        self._moves, self._width = executor.moves, 0
        self._choice: Any = None  # of the next step, and the graph that is it
        self._graph: Any = None
        self._choices: list[Any] = [None] * RING  # of the steps that were not read
        self._counted: Any = None  # the choice of steps that were read and nobody was told of
        self._calls, self._seconds = 0, 0.0  # of these

    def start(self, starts: Sequence[Start]) -> None:
        """Begin with these sequences, as many as this decoder is for."""
        self.executor.device.use()
        self._launched = self._read = 0
        self._chosen_by: Any = None  # the dispatch table
        self._sampled = any(each.sampling.temperature > 0 for each in starts)
        numbers = np.arange(self.count + 1, dtype=np.int32)
        self._carried.copy({
            "steps": np.zeros(1, np.int64), "sampling": sampling_fields(starts),
            "ids": np.array([each.token for each in starts], np.int32),
            "positions": np.array([each.position for each in starts], np.int32),
            "slots": np.array([each.slot for each in starts], np.int32),
            "sequence": numbers[:-1], "rows": numbers[:-1], "offsets": numbers})

    def step(self, page_rows: Sequence[np.ndarray] | None) -> None:
        """Put the next step on the stream. page_rows: each sequence's pages, i32, enough for the
        step's tokens; None where they are those of the step before."""
        if self._closed:
            self.executor.require_open()  # says that it is closed
        executor = self.executor
        executor.device.use()
        if page_rows is not None:
            self._take_pages(page_rows)
        if self._chosen_by is not executor.dispatch.table or self._moves != executor.moves:
            self._choose()
        if self._launched == self._read:
            self._since = time.perf_counter()
        slot = self._launched % RING
        self._choices[slot] = self._choice
        if self.trace is None:
            self._graph.launch()
        else:
            self._launch_between_events(self.trace)
        self._mark[slot]()
        self._launched += 1
        executor.graph_launches += 1

    def read(self) -> np.ndarray:
        """The tokens of the oldest step that was not read, i32 [count]; waits for it."""
        if self._closed:
            self.executor.require_open()  # says that it is closed
        slot = self._read % RING
        began = time.perf_counter()
        self._wait[slot]()
        now = time.perf_counter()
        self._read += 1
        self.executor.waited += now - began
        choice = self._choices[slot]
        if choice is not self._counted or self._calls == COUNTED_TOGETHER:
            self._tell()
            self._counted = choice
        self._calls += 1
        self._seconds += now - self._since
        self._since = now
        return self._tokens[slot].copy()

    def drain(self) -> None:
        """Wait for all steps, whose tokens are dropped."""
        if self._launched > self._read and not self._closed:
            self._wait[(self._launched - 1) % RING]()
        self._read = self._launched
        self._tell()

    def _tell(self) -> None:
        """Let the variant, its trial and the profile know of the steps that were counted."""
        choice, calls, seconds = self._counted, self._calls, self._seconds
        self._counted, self._calls, self._seconds = None, 0, 0.0
        if choice is None:
            return
        choice.variant.calls += calls
        choice.variant.seconds += seconds
        self.executor.dispatch.count(choice.values, choice.variant, seconds, calls)
        if choice.trial is not None:
            choice.trial.observe(choice.variant, seconds)

    def _launch_between_events(self, trace: list[tuple[Any, Any]]) -> None:
        begin = record_event(self.executor.device)
        self._graph.launch()
        trace.append((begin, record_event(self.executor.device)))

    # ---- what steps are given -------------------------------------------------------------------

    def _take_pages(self, page_rows: Sequence[np.ndarray]) -> None:
        """Put the page table on the device."""
        width = round_width(max(map(len, page_rows)))
        table = np.zeros((self.count, width), np.int32)
        for row, pages in zip(table, page_rows, strict=True):
            row[:len(pages)] = pages
        self._table.copy({"page_table": table})
        if width != self._width:
            self._width, self._chosen_by = width, None

    def _choose(self) -> None:
        """Choose what runs the next step, and put its arguments on the device."""
        executor, dispatch = self.executor, self.executor.dispatch
        table = dispatch.table  # the choice holds as long as nobody replaces it
        values = executor.known | {"tokens": self.count, "sequences": self.count,
                                   "rows": self.count, "table_width": self._width}
        variant: Any = dispatch.choose(values)
        self._choice = Choice(variant, values, dispatch.trial)
        executor.unload_retired(variant)
        if self._moves != executor.moves:
            self._plans.clear()
        plan = self._plans.get((id(variant), self._width))
        if plan is None:
            plan = self._plans[id(variant), self._width] = executor.plan(variant, values)
        arena, outputs = executor.memory_for(plan)
        prepared = (id(variant), self._width, executor.moves)
        if prepared != self._prepared:
            self._block.copy({"choice": self._choice_fields(plan, outputs),
                              "arguments": self._arguments(plan, arena, outputs)})
            self._prepared = prepared
        self._graph = self._graph_of(variant, plan)
        self._moves = executor.moves
        self._chosen_by = None if dispatch.trial else table

    def _graph_of(self, variant: DeviceVariant, plan: Plan) -> Graph:
        key = (id(variant), plan.grids, self._sampled)
        if key not in self._graphs:
            self._graphs[key] = Graph(self.executor.device, lambda: self._record(variant, plan))
        return self._graphs[key]

    def _arguments(self, plan: Plan, arena: int, outputs: int) -> np.ndarray:
        """The step's arguments, symbols, and tables of pointers."""
        at_symbols = self._block.at("arguments") + 8 * ARGUMENTS
        at_inputs = at_symbols + 8 * len(plan.symbols)
        at_outputs = at_inputs + 8 * len(self.executor.inputs)
        inputs = [(self._table if tensor.name == "page_table" else self._carried).at(tensor.name)
                  for tensor in self.executor.inputs]
        return np.array([at_symbols, at_inputs, at_outputs, *self.executor.tables(), arena, 0, 0, 0,
                         *plan.symbols, *inputs,
                         *(outputs + place for place, _ in plan.outputs.values())], np.uint64)

    def _choice_fields(self, plan: Plan, outputs: int) -> np.ndarray:
        carried = ("ids", "positions", "steps", "sampling")
        fields = {name: self._carried.at(name) for name in carried}
        fields |= {name: outputs + plan.outputs[name][0] for name in ("greedy", "logits")}
        fields |= {"ring": self._ring.address, "slots": RING, "sequences": self.count,
                   "vocabulary": plan.outputs["logits"][1] // (4 * self.count)}
        return np.array([fields[name] for name in FIELDS], np.uint64)

    def _record(self, variant: DeviceVariant, plan: Plan) -> None:
        self.executor.launch_stages(variant, plan, self._block.at("arguments"))
        found = self.executor.choosers()
        assert found is not None
        module, choosers = found
        for name in ("sample", "advance") if self._sampled else ("advance",):
            each = choosers[name]
            function = module.function(each["kernel"], each["shared_bytes"])
            blocks = self.count if each["blocks"] == "sequences" else 1
            launch(self.executor.device, function, blocks, each["threads"], each["shared_bytes"],
                   self._block.at("choice"), 0)

    def forget(self, variant: DeviceVariant) -> None:
        """Drop the graphs of code that is about to be unloaded; the device is done with it."""
        for key in [key for key in self._graphs if key[0] == id(variant)]:
            self._graphs.pop(key).close()
        for key in [key for key in self._plans if key[0] == id(variant)]:
            del self._plans[key]
        self._prepared = None

    def close(self) -> None:
        """Free everything; the device must be done with it. Nothing can be read any more."""
        self._closed = True
        for graph in self._graphs.values():
            graph.close()
        for region in (self._carried, self._block, self._table):
            region.close()
        self._ring.close()
        for each in self._events:
            call("cuEventDestroy", each)


def round_width(pages: int) -> int:
    """Pages of the page table for a sequence with so many: a step's grids may depend on it, and
    each has a graph of its own, so few widths should do. At most 7 or a quarter more."""
    step = max(LEAST_WIDTH, 1 << max(0, (pages - 1).bit_length() - 3))
    return -(-pages // step) * step


def sampling_fields(starts: Sequence[Start]) -> np.ndarray:
    """i64 [sequences, fields of SAMPLING]."""
    fields = np.zeros((len(starts), len(SAMPLING)), np.int64)
    for row, start in zip(fields, starts, strict=True):
        sampling = start.sampling
        row[:3] = np.array([sampling.temperature, sampling.top_p, sampling.min_p]).view(np.int64)
        row[3] = sampling.top_k
        row[4:] = np.array([sampling.seed & (2**64 - 1), start.choice], np.uint64).view(np.int64)
    return fields
