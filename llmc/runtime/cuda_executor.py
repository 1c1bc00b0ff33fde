"""Runs an artifact's variants on an NVIDIA GPU: arrays in, arrays out.

A step is: its arguments and inputs in one copy to the device, the stages' kernels, its outputs in
one copy back. A step of a shape that came before is one launch of a captured graph. What differs
between such steps (symbols, page tables, tokens) lies in the copied block; grids are part of what a
graph was captured for.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.errors import LlmcError
from llmc.ir.dims import Dim, Expression, evaluate, parse_dim
from llmc.runtime.artifact import Artifact, VariantInfo
from llmc.runtime.binding import Tensor
from llmc.runtime.cuda_decode import CudaDecoder
from llmc.runtime.cuda_device import (
    Device,
    Graph,
    Memory,
    Module,
    PinnedMemory,
    Upload,
    call,
    choose_architecture,
    launch,
    upload,
)
from llmc.runtime.dispatch import MEMO_SHAPES
from llmc.runtime.executor import Described, Executor

ALIGNMENT = 256  # bytes, of every tensor in device memory
FIELDS = 9  # of the step's arguments
MOST_GRAPHS = 64
# Where attention's code differs by the pages of the longest sequence: beyond so many, the blocks of
# a cluster do not join through each other's shared memory (codegen/nvptx/attention_decode.py).
CONTEXT_RANGES = (128,)


class DeviceVariant(Described):
    """One loaded program: its kernels in order."""

    def __init__(self, info: VariantInfo, symbols: Mapping[str, Dim], code: bytes,
                 launches: str | bytes):
        """launches: JSON as in an artifact's variants/NAME.ARCH.json."""
        super().__init__(info, symbols)
        self.module = Module(code, info.name)
        described = json.loads(launches)
        steps, self.overlaps = described["steps"], described["overlaps"]
        self.choosers: dict[str, dict[str, Any]] | None = described.get("choosers")
        functions: dict[str, Any] = {}
        self.launches: list[tuple[Any, Dim, int, int, int]] = []
        for step in steps:
            for layer in range(step["count"]):
                for each in step["launches"]:
                    name, shared = each["kernel"], each["shared_bytes"]
                    if name not in functions:
                        functions[name] = self.module.function(name, shared)
                    self.launches.append((functions[name], parse_dim(each["blocks"], symbols),
                                          each["threads"], shared, layer))

    def grids(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """Blocks of every launch at a shape."""
        known: dict[Expression, int] = {}
        return tuple(evaluate(blocks, values, known) for _, blocks, *_ in self.launches)


@dataclass(frozen=True)
class Plan:
    """A step of given shapes. inputs: their offsets in the copied block; outputs: name -> (offset,
    bytes) among the outputs; copied: bytes of the block, a power of two so that one graph serves
    many lengths."""

    grids: tuple[int, ...]
    arena_bytes: int
    symbols: tuple[int, ...]
    inputs: tuple[int, ...]
    copied: int
    outputs: dict[str, tuple[int, int]]
    output_bytes: int

    @classmethod
    def of(cls, variant: DeviceVariant, values: Mapping[str, int], symbols: Sequence[int],
           inputs: Sequence[int], outputs: Mapping[str, int]) -> Plan:
        """inputs and outputs: bytes of each."""
        numbers = FIELDS + len(symbols) + len(inputs) + len(outputs)
        (_, *places), size = _places([8 * numbers, *inputs])
        result_places, result_size = _places(list(outputs.values()))
        return cls(variant.grids(values), evaluate(variant.arena, values), tuple(symbols),
                   tuple(places), max(4096, 1 << (size - 1).bit_length()),
                   {name: (place, outputs[name])
                    for name, place in zip(outputs, result_places, strict=True)}, result_size)

    def header(self, block: int, outputs: int, weights: int, states: int, arena: int
               ) -> np.ndarray:
        """What the block begins with: the step's arguments, symbols, and tables of pointers."""
        at_symbols = block + 8 * FIELDS
        at_inputs = at_symbols + 8 * len(self.symbols)
        at_outputs = at_inputs + 8 * len(self.inputs)
        return np.array([at_symbols, at_inputs, at_outputs, weights, states, arena, 0, 0, 0,
                         *self.symbols, *(block + place for place in self.inputs),
                         *(outputs + place for place, _ in self.outputs.values())], np.uint64)


class CudaExecutor(Executor):
    """Memory and code for one artifact on one GPU. `run` is not thread-safe; Runtime serialises
    it."""

    def __init__(self, artifact: Artifact, ordinal: int = 0):
        self.device = Device(ordinal)
        self._describe(artifact)
        self.architecture, form = choose_architecture(self.device, _available(artifact))
        self._retired: deque[DeviceVariant] = deque()
        size = artifact.packed_weights().size
        self._weights = Memory(self.device, size, "weights")
        weights = Upload(self.device, size, artifact.read_weights, self._weights.address)
        try:  # code is loaded meanwhile
            self.dispatch = self._dispatch((
                DeviceVariant(info, self.symbols,
                              artifact.variant_file(info, f"{self.architecture}.{form}"),
                              artifact.variant_file(info, f"{self.architecture}.json"))
                for info in artifact.manifest.variants), {"table_width": CONTEXT_RANGES})
        finally:
            weights.wait()
        self.threads = 0
        addresses = [self._weights.address + offset for weight in artifact.manifest.weights
                     for offset in weight.offsets]
        self._weight_table = self._table(addresses)
        self._state_table = self._table([])
        self._state_memory: Memory | None = None
        self._grown: dict[str, Memory | PinnedMemory] = {}
        self._graphs: OrderedDict[tuple, Graph | None] = OrderedDict()
        self._plans: dict[tuple, Plan] = {}
        self._written: Plan | None = None  # whose header the pinned block holds
        self.graph_launches = 0
        self.moves = 0  # how often memory that steps use has moved
        self._decoders: list[CudaDecoder] = []
        self._idle: dict[int, list[CudaDecoder]] = {}  # by the number of sequences

    def _table(self, addresses: Sequence[int]) -> Memory:
        """A table of pointers in device memory."""
        table = Memory(self.device, 8 * len(addresses), "pointers")
        if addresses:
            upload(self.device, np.array(addresses, np.uint64).view(np.uint8), table.address)
        return table

    # ---- code that comes and goes ---------------------------------------------------------------

    @property
    def code_target(self) -> str:
        """What further variants must be compiled for."""
        return f"nvptx:{self.architecture}"

    @property
    def code_versions(self) -> str:
        """Whatever else such code depends on."""
        return f"{super().code_versions}, driver {self.device.cuda}"

    def load(self, info: VariantInfo, code: bytes, launches: str) -> DeviceVariant:
        """One more variant. Any thread may load: nothing of it is on the stream."""
        self.device.use()
        return DeviceVariant(info, self.symbols, code, launches)

    def retire(self, variant: Any) -> None:
        """Unload a variant that no step will choose any more, before the next step."""
        self._retired.append(variant)

    def unload_retired(self, chosen: DeviceVariant | None = None) -> None:
        """Between steps, when the device has done what it was given. What was just chosen for a
        step goes before the next. A later variant may get the same id, so nothing may be left that
        is found by it."""
        if not self._retired:
            return
        self.device.wait()
        for _ in range(len(self._retired)):
            variant = self._retired.popleft()
            if variant is chosen:
                self._retired.append(variant)
                continue
            for key in [key for key in self._graphs if key[0] == id(variant)]:
                graph = self._graphs.pop(key)
                if graph is not None:
                    graph.close()
            for key in [key for key in self._plans if key[0] == id(variant)]:
                if self._plans.pop(key) is self._written:
                    self._written = None
            for decoder in self._decoders:
                decoder.forget(variant)
            variant.module.close()

    def state_memory(self) -> int:
        """Bytes that states may take: what is free, less some for activations."""
        self.device.use()
        return max(1, self.device.free_memory() * 9 // 10 - (1 << 30))

    def allocate_states(self, known: Mapping[str, int]) -> None:
        """Reserve the states' pools; `known` gives the symbols in their shapes (pool sizes)."""
        self.device.use()
        self._know(known)
        self._plans.clear()
        offsets, total = [], 0
        for tensor in self.states:
            size = int(np.prod(tensor.concrete_shape(self.known), dtype=np.int64))
            for _ in range(tensor.count):
                offsets.append(total)
                total += _aligned(size * tensor.dtype.bits // 8)
        self._drop_graphs()
        for old in (self._state_memory, self._state_table):
            if old is not None:
                old.close()
        self._state_memory = memory = Memory(self.device, total, "states")
        memory.clear(self.device)
        self._state_table = self._table([memory.address + offset for offset in offsets])

    # ---- decoding -----------------------------------------------------------------------------

    def borrow_decoder(self, count: int, most_pages: int) -> CudaDecoder | None:
        """A decoder of `count` sequences of up to so many pages; None where the artifact has no
        kernels that choose tokens. Give it back to `return_decoder`."""
        self.require_open()
        if self.choosers() is None:
            return None
        self.device.use()
        idle = self._idle.get(count)
        if idle:
            return idle.pop()
        decoder = CudaDecoder(self, count, most_pages)
        self._decoders.append(decoder)
        return decoder

    def return_decoder(self, decoder: CudaDecoder) -> None:
        """A decoder that nobody uses any more."""
        if not self._closed:
            self._idle.setdefault(decoder.count, []).append(decoder)

    def choosers(self) -> tuple[Module, dict[str, dict[str, Any]]] | None:
        """The kernels that choose tokens (see llmc/ir/choice.py): they are the same in all
        variants, and the generic one stays."""
        generic = self.variants[-1]
        return (generic.module, generic.choosers) if generic.choosers else None

    def tables(self) -> tuple[int, int]:
        """Device addresses of the tables of weights and states."""
        return self._weight_table.address, self._state_table.address

    def memory_for(self, plan: Plan) -> tuple[int, int]:
        """Device addresses of the arena and the outputs, large enough for a step."""
        self._at_least("arena", plan.arena_bytes)
        outputs = self._at_least("outputs", plan.output_bytes)
        return self._grown["arena"].address, outputs.address

    def require_open(self) -> None:
        """LlmcError once it is closed."""
        if self._closed:
            raise LlmcError("this runtime is closed")

    # ---- a step -------------------------------------------------------------------------------

    def _wanted(self, names: Collection[str] | None) -> list[Tensor]:
        """The outputs that are copied back."""
        return [each for each in self.outputs if names is None or each.name in names]

    def _call(self, variant: Any, values: Mapping[str, int], given: Sequence[np.ndarray],
              results: Mapping[str, np.ndarray]) -> None:
        self.device.use()
        self.unload_retired(variant)
        started = time.perf_counter()
        plan = self._plan(variant, values, given)
        arena = self._at_least("arena", plan.arena_bytes)
        outputs = self._at_least("outputs", plan.output_bytes)
        host_outputs = self._at_least("host outputs", plan.output_bytes)
        self._at_least("block", plan.copied)
        host = self._at_least("host block", plan.copied).array
        if plan is not self._written:  # a step like the last one finds its header there
            header = plan.header(self._grown["block"].address, outputs.address,
                                 self._weight_table.address, self._state_table.address,
                                 arena.address)
            host[:header.nbytes] = header.view(np.uint8)
            self._written = plan
        for place, array in zip(plan.inputs, given, strict=True):
            host[place:place + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._run(variant, plan, tuple(results))
        began = time.perf_counter()
        self.device.wait()
        self.waited += time.perf_counter() - began
        for name, result in results.items():
            place = plan.outputs[name][0]
            result.reshape(-1).view(np.uint8)[:] = host_outputs.array[place:place + result.nbytes]
        variant.seconds += time.perf_counter() - started
        variant.calls += 1

    def _plan(self, variant: Any, values: Mapping[str, int], given: Sequence[np.ndarray]) -> Plan:
        """What a step of these shapes looks like; remembered, for most steps repeat."""
        key = (id(variant), *(array.shape for array in given))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MEMO_SHAPES:
                self._plans.clear()
            plan = self._plans[key] = self.plan(variant, values, [each.nbytes for each in given])
        return plan

    def plan(self, variant: Any, values: Mapping[str, int], inputs: Sequence[int] = ()) -> Plan:
        """A step of these shapes; inputs: bytes of those that are copied in one block with the
        arguments."""
        sizes = {tensor.name: int(np.prod(tensor.concrete_shape(values), dtype=np.int64))
                 * tensor.numpy.itemsize for tensor in self.outputs}
        symbols = [values[info.name] for info in self.artifact.manifest.symbols]
        return Plan.of(variant, values, symbols, inputs, sizes)

    def _run(self, variant: Any, plan: Plan, wanted: tuple[str, ...]) -> None:
        """The step's copies and kernels: one by one at first, as a graph when the shape repeats."""
        key = (id(variant), plan.grids, plan.copied,
               *(plan.outputs[name] for name in wanted))
        graph = self._graphs.get(key)
        if graph is None:
            def record() -> None:
                self._record(variant, plan, wanted)

            if key not in self._graphs:
                record()
                self._remember(key, None)
                return
            graph = Graph(self.device, record)
        self._remember(key, graph)
        graph.launch()
        self.graph_launches += 1

    def _record(self, variant: Any, plan: Plan, wanted: Sequence[str]) -> None:
        stream, block = self.device.stream, self._grown["block"].address
        call("cuMemcpyHtoDAsync", block, self._grown["host block"].address, plan.copied, stream)
        self.launch_stages(variant, plan, block)
        host, device = self._grown["host outputs"].address, self._grown["outputs"].address
        for place, size in (plan.outputs[name] for name in wanted):
            if size:
                call("cuMemcpyDtoHAsync", host + place, device + place, size, stream)

    def launch_stages(self, variant: Any, plan: Plan, arguments: int) -> None:
        """Put a step's kernels on the stream. arguments: device address of the step's arguments."""
        overlaps = False  # the first kernel needs what is ahead of it: the arguments
        for (function, _, threads, shared, layer), blocks in zip(variant.launches, plan.grids,
                                                                 strict=True):
            if blocks > 0:  # a shape may leave a stage nothing to do
                launch(self.device, function, blocks, threads, shared, arguments, layer, overlaps)
                overlaps = variant.overlaps

    def _remember(self, key: tuple, graph: Graph | None) -> None:
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > MOST_GRAPHS:
            _, old = self._graphs.popitem(last=False)
            if old is not None:
                self.device.wait()
                old.close()

    def _drop_graphs(self) -> None:
        """Whatever holds addresses of memory that is about to move."""
        self.device.wait()
        self.moves += 1
        self._written = None
        for graph in self._graphs.values():
            if graph is not None:
                graph.close()
        self._graphs.clear()

    def _at_least(self, name: str, size: int) -> Any:
        """Memory that grows when it has to; captured graphs hold its address, so they go then."""
        memory = self._grown.get(name)
        if memory is None or memory.size < size:
            self._drop_graphs()
            if memory is not None:
                memory.close()
            self._grown[name] = memory = PinnedMemory(size) if name.startswith("host") else \
                Memory(self.device, size, "activations")
        return memory

    def close(self) -> None:
        """Free code and memory; the executor cannot run any more."""
        if self._closed:
            return
        self._closed = True
        self.device.use()
        self._drop_graphs()
        self.unload_retired()
        for decoder in self._decoders:
            decoder.close()
        for memory in (*self._grown.values(), self._weights, self._weight_table,
                       self._state_table, self._state_memory):
            if memory is not None:
                memory.close()
        for variant in self.variants:
            variant.module.close()


def _available(artifact: Artifact) -> list[tuple[str, str]]:
    """(architecture, form) of the code that every variant has."""
    name = artifact.manifest.variants[0].name
    found = []
    for file in artifact.manifest.hashes:
        folder, _, rest = file.partition("/")
        parts = rest.split(".")
        if folder == "variants" and len(parts) == 3 and parts[0] == name \
                and parts[2] in ("cubin", "ptx"):
            found.append((parts[1], parts[2]))
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offsets of tensors laid one after the other, and the end."""
    places, total = [], 0
    for size in sizes:
        places.append(total)
        total += _aligned(size)
    return places, max(total, ALIGNMENT)
