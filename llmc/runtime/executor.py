"""Runs an artifact's variants on this CPU: arrays in, arrays out, one native call."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import llvmlite
import numpy as np

from llmc.errors import LlmcError, ShapeError
from llmc.ir.dims import Dim, evaluate, parse_dim
from llmc.runtime.artifact import Artifact, VariantInfo
from llmc.runtime.binding import Tensor, bind, check_indexes, check_inputs, make_symbols
from llmc.runtime.dispatch import MEMO_SHAPES, Dispatch, exact_symbols
from llmc.runtime.host_device import Team, load_object
from llmc.runtime.memory import HUGE_PAGE, aligned_empty, physical_memory

POINTERS = ctypes.c_void_p


class Described:
    """A variant of any target: its key, and how often and how long it ran."""

    def __init__(self, info: VariantInfo, symbols: Mapping[str, Dim]):
        self.info = info
        self.arena = parse_dim(info.arena, symbols)
        self.calls = 0
        self.seconds = 0.0

    def covers(self, values: Mapping[str, int]) -> bool:
        return all(low <= values[name] <= high for name, (low, high) in self.info.key.items())

    def width(self) -> int:
        """How wide the key is; the narrowest that covers a shape is the most specific."""
        return sum(high - low for low, high in self.info.key.values())


class Variant(Described):
    """One loaded program: its step function."""

    def __init__(self, info: VariantInfo, symbols: Mapping[str, Dim], code: bytes):
        super().__init__(info, symbols)
        self.scratch = parse_dim(info.scratch, symbols)
        self.library = load_object(code)
        self.step = self.library.function("llmc_step", ctypes.c_int32, ctypes.c_void_p)
        self._sizes: dict[tuple[int | None, ...], tuple[int, int]] = {}

    def sizes(self, values: Mapping[str, int]) -> tuple[int, int]:
        """Bytes of the arena, and of a worker's scratch; remembered, as dims take long to evaluate
        beside the step of a small model."""
        key = tuple(map(values.get, self.info.key))
        found = self._sizes.get(key)
        if found is None:
            if len(self._sizes) >= MEMO_SHAPES:
                self._sizes.clear()
            found = evaluate(self.arena, values), evaluate(self.scratch, values)
            self._sizes[key] = found
        return found


class Arguments:
    """What a step is called with (the ABI of docs/architecture.md), and all that it points to."""

    def __init__(self, fields: Sequence[int], keeps: tuple[Any, ...]):
        self._block = (POINTERS * len(fields))(*fields)
        self._keeps = keeps
        self.address = ctypes.addressof(self._block)


class Executor:
    """Memory and code for one artifact. `run` is not thread-safe; Runtime serialises it."""

    def __init__(self, artifact: Artifact, threads: int):
        self._describe(artifact)
        self.dispatch = self._dispatch(
            Variant(info, self.symbols, artifact.object_code(info))
            for info in artifact.manifest.variants)
        self.team = Team(self.variants[0].library, threads)
        self._weights = _pointer_table(artifact.weight_addresses())
        self.threads = threads
        self._scratch = aligned_empty(0)
        self._arena = aligned_empty(0)
        self._states: list[np.ndarray] = []
        self._state_table = _pointer_table([])
        self._cancel = np.zeros(1, np.int32)

    def _describe(self, artifact: Artifact) -> None:
        """What executors of every target know of an artifact."""
        manifest = artifact.manifest
        self.artifact = artifact
        self.symbols = make_symbols(manifest.symbols)
        self.inputs = [Tensor(info, self.symbols) for info in manifest.inputs]
        self._has_indexes = any(tensor.ranges for tensor in self.inputs)
        self.outputs = [Tensor(info, self.symbols) for info in manifest.outputs]
        self.states = [Tensor(info, self.symbols) for info in manifest.states]
        self.known = self._fixed()  # symbols that no input's shape has to tell
        self._bound: dict[tuple, dict[str, int]] = {}
        self.waited = 0.0  # seconds that the host has waited for a device
        self._closed = False

    def state_memory(self) -> int:
        """Bytes that states may take: half of this machine's memory."""
        return physical_memory() // 2

    def allocate_states(self, known: Mapping[str, int]) -> None:
        """Reserve the states' pools; `known` gives the symbols in their shapes (pool sizes)."""
        self._know(known)
        self._states = []
        for tensor in self.states:
            size = int(np.prod(tensor.concrete_shape(self.known), dtype=np.int64))
            stride = -(-size * tensor.dtype.bits // 8 // 64) * 64
            # A short text touches the beginning of each: huge pages there would be mostly empty.
            self._states += [aligned_empty(stride, HUGE_PAGE) for _ in range(tensor.count)]
        self._state_table = _pointer_table([state.ctypes.data for state in self._states])

    def state_copies(self, name: str) -> list[np.ndarray]:
        """The memory of each copy of a state that lies in rows, in its shape and dtype."""
        first = 0
        for tensor in self.states:
            if tensor.name == name:
                shape = tensor.concrete_shape(self.known)
                size = int(np.prod(shape, dtype=np.int64)) * tensor.dtype.bits // 8
                return [memory[:size].view(tensor.numpy).reshape(shape)
                        for memory in self._states[first:first + tensor.count]]
            first += tensor.count
        raise LlmcError(f"there is no state {name}")

    def _know(self, known: Mapping[str, int]) -> None:
        """Symbols whose values are now given. Of pages there is one more than anybody gets: steps
        on nobody's behalf use it."""
        spare = {"pool_pages": known["pool_pages"] + 1} if "pool_pages" in known else {}
        self.known = self._fixed() | dict(known) | spare
        self._bound.clear()

    def _fixed(self) -> dict[str, int]:
        """Symbols that the artifact was compiled for one value of."""
        keys = [info.key for info in self.artifact.manifest.variants]
        return {name: low for name, (low, high) in keys[0].items()
                if low == high and all(key[name] == (low, high) for key in keys)}

    def largest(self, name: str) -> int:
        """The largest value of a symbol that some variant covers."""
        return max(variant.info.key[name][1] for variant in self.variants)

    @property
    def variants(self) -> list[Any]:
        """The live variants, of this executor's own kind (a Described), the narrowest first."""
        return list(self.dispatch.table.variants)

    def _dispatch(self, variants: Iterable[Described],
                  ranges: Mapping[str, Sequence[int]] | None = None) -> Dispatch:
        """ranges: see Dispatch; those of symbols that this artifact has."""
        own = {name: ends for name, ends in (ranges or {}).items() if name in self.symbols}
        return Dispatch(variants, exact_symbols(self.artifact.manifest), own)

    # ---- code that comes and goes ---------------------------------------------------------------

    @property
    def code_target(self) -> str:
        """What further variants must be compiled for."""
        return self.artifact.manifest.target

    @property
    def code_versions(self) -> str:
        """Whatever else such code depends on."""
        return f"llvmlite {llvmlite.__version__}"

    def load(self, info: VariantInfo, code: bytes, launches: str) -> Any:
        """One more variant; LlmcError if it cannot be. launches: how a GPU runs it, as JSON."""
        return Variant(info, self.symbols, code)

    def retire(self, variant: Any) -> None:
        """No step will choose this variant any more: here it is freed with its last reference."""

    def borrow_decoder(self, count: int, most_pages: int) -> Any:
        """What decodes `count` sequences of up to so many pages in steps that feed each other; None
        where the artifact does not allow it. It goes back to `return_decoder`."""
        from llmc.runtime.host_decode import HostDecoder

        self.require_open()
        return HostDecoder(self, count)

    def return_decoder(self, decoder: Any) -> None:
        """A decoder that nobody uses any more."""

    def choose(self, values: Mapping[str, int]) -> Any:
        """The most specific live variant that covers a shape."""
        return self.dispatch.table.choose(self.dispatch.shape(values), values)

    def run(self, arrays: Mapping[str, np.ndarray], want: Collection[str] | None = None
            ) -> dict[str, np.ndarray]:
        """One step. arrays: every input by name. Returns every output by name; of a GPU's only
        those in `want`, for the others would have to be copied.

        Raises ShapeError when shapes or dtypes do not fit the model.
        """
        self.require_open()
        given = check_inputs(self.inputs, arrays)
        values = self._values(given)
        if self._has_indexes:
            check_indexes(self.inputs, given, values)
        variant: Any = self.dispatch.choose(values)
        results = {tensor.name: np.empty(tensor.concrete_shape(values), tensor.numpy)
                   for tensor in self._wanted(want)}
        before = variant.seconds
        self._call(variant, values, given, results)
        self.dispatch.observe(values, variant, variant.seconds - before)
        return results

    def _wanted(self, names: Collection[str] | None) -> list[Tensor]:
        """The outputs that a step fills: here all of them, whatever is wanted."""
        return self.outputs

    def _values(self, given: Sequence[np.ndarray]) -> dict[str, int]:
        """Values of all symbols, by the shapes of the inputs."""
        shapes = tuple(array.shape for array in given)
        values = self._bound.get(shapes)
        if values is None:
            values = bind(self.inputs, given, self.known)
            if unknown := self.symbols.keys() - values.keys():
                raise ShapeError("no input's shape tells the value of "
                                 f"{', '.join(sorted(unknown))}")
            if len(self._bound) >= MEMO_SHAPES:
                self._bound.clear()
            self._bound[shapes] = values
        return values

    def require_open(self) -> None:
        """LlmcError after `close`."""
        if self._closed:
            raise LlmcError("this runtime is closed")

    def arguments(self, variant: Variant, values: Mapping[str, int], given: Sequence[np.ndarray],
                  results: Sequence[np.ndarray]) -> Arguments:
        """Of a step of these values: inputs and outputs in the order of the model's."""
        arena, scratch = variant.sizes(values)
        self._arena = _at_least(self._arena, arena)
        self._scratch = _at_least(self._scratch, scratch * self.threads)
        symbols = np.array([values.get(info.name, info.low)
                            for info in self.artifact.manifest.symbols], np.int64)
        inputs = _pointer_table([array.ctypes.data for array in given])
        outputs = _pointer_table([array.ctypes.data for array in results])
        fields = (
            symbols.ctypes.data, ctypes.addressof(inputs), ctypes.addressof(outputs),
            ctypes.addressof(self._weights), ctypes.addressof(self._state_table),
            self._arena.ctypes.data, self._scratch.ctypes.data, self.team.handle or 0,
            self._cancel.ctypes.data)
        return Arguments(fields, (symbols, inputs, outputs, given, results, self._state_table,
                                  self._arena, self._scratch))

    def _call(self, variant: Variant, values: Mapping[str, int], given: Sequence[np.ndarray],
              results: Mapping[str, np.ndarray]) -> None:
        arguments = self.arguments(variant, values, given, list(results.values()))
        started = time.perf_counter()
        code = variant.step(arguments.address)
        variant.seconds += time.perf_counter() - started
        variant.calls += 1
        if code:
            raise LlmcError("the step was cancelled")

    def close(self) -> None:
        """Stop the threads; the executor cannot run any more."""
        self._closed = True
        self.team.close()


def _at_least(memory: np.ndarray, size: int) -> np.ndarray:
    return memory if memory.size >= size else aligned_empty(size)


def _pointer_table(addresses: Sequence[int]):
    return (POINTERS * max(1, len(addresses)))(*addresses)
