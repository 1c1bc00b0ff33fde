"""Generates with an ONNX language model: token ids in, logits out, with or without a cache.

The graph keeps the inputs it was exported with, so this knows only names: which input takes ids,
mask and positions, and which `present` output becomes which `past` input of the next call.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from typing import Any

import numpy as np

from llmc.errors import ShapeError
from llmc.runtime.executor import Executor
from llmc.runtime.pages import Sequence


class OnnxLanguageModel:
    """interface: names of ids, attention_mask, position_ids (or None), logits, and cache: pairs of
    (past input, present output)."""

    def __init__(self, executor: Executor, interface: dict[str, Any],
                 max_context: int):
        self.executor = executor
        self.interface = interface
        self.max_context = max_context or self._limit()
        self._tokens: dict[int, np.ndarray] = {}
        self._caches: dict[int, dict[str, np.ndarray]] = {}

    def _limit(self) -> int:
        """The largest sequence that the graph's own symbols allow."""
        (tensor,) = (t for t in self.executor.inputs if t.name == self.interface["ids"])
        length = tensor.shape[1]
        return length if isinstance(length, int) else self.executor.symbols[str(length)].high

    def check_prompt(self, length: int) -> None:
        if length > self.max_context:
            raise ShapeError(f"the prompt has {length} tokens, the graph takes {self.max_context}")

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits [len(ids), vocab] f32 of one sequence, from an empty cache."""
        return self._run(ids, 0, self._empty_cache())[self.interface["logits"]][0]

    def feed(self, sequence: Sequence, tokens: Sequences[int] | np.ndarray, every: bool = False
             ) -> Iterator[np.ndarray]:
        """Append tokens to a sequence; yields logits of their rows (all, or the last)."""
        key = id(sequence)
        ids = np.asarray(tokens, np.int64)
        if self.interface["cache"]:
            cache = self._caches.setdefault(key, self._empty_cache())
            outputs = self._run(ids, sequence.length, cache)
            self._caches[key] = {past: outputs[present]
                                 for past, present in self.interface["cache"]}
        else:
            ids = np.concatenate([self._tokens.get(key, ids[:0]), ids])
            outputs = self._run(ids, 0, {})
            self._tokens[key] = ids
        sequence.length += len(tokens)
        logits = outputs[self.interface["logits"]][0]
        yield logits[-len(tokens):] if every else logits[-1:]

    def release(self, sequence: Sequence) -> None:
        self._tokens.pop(id(sequence), None)
        self._caches.pop(id(sequence), None)

    def _run(self, ids: np.ndarray, past: int, cache: dict[str, np.ndarray]) -> dict:
        arrays = {self.interface["ids"]: ids[None].astype(np.int64), **cache}
        if name := self.interface.get("attention_mask"):
            arrays[name] = np.ones((1, past + len(ids)), np.int64)
        if name := self.interface.get("position_ids"):
            arrays[name] = np.arange(past, past + len(ids), dtype=np.int64)[None]
        return self.executor.run(arrays)

    def _empty_cache(self) -> dict[str, np.ndarray]:
        """Zero past positions: the shape's symbols are 1 for the batch and 0 for the past."""
        tensors = {tensor.name: tensor for tensor in self.executor.inputs}
        cache = {}
        for past, _ in self.interface["cache"]:
            tensor = tensors[past]
            shape = [1, *(dim if isinstance(dim, int) else 0 for dim in tensor.shape[1:])]
            cache[past] = np.empty(shape, tensor.numpy)
        return cache
