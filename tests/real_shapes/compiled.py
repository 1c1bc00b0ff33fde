"""Compiled models under hostile memory: whatever a step does not write itself is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import llmc
from llmc.codegen.target import Target
from llmc.driver import compile_model
from llmc.runtime.pages import Sequence as CachedSequence
from llmc.runtime.step import Chunk, LanguageModel
from llmc.runtime.targets import resolve_target
from tests.fuzz.hostile import spoil_device, spoil_memory, spoil_states


def build(checkpoint: Path, dtype: str, output: Path, target: str = "host") -> Path:
    """Compile a checkpoint for this CPU, or for this machine's GPU ("nvptx"), into an artifact."""
    return compile_model(checkpoint, Target.parse(resolve_target(target)), dtype).write(output)


class PoisonedModel:
    """A language model's steps. Pages come in random order and are NaN until they are written."""

    def __init__(self, artifact: Path, threads: int, target: str = "host"):
        # Nothing else may take a step: `logits` feeds the model without the runtime's lock.
        self.runtime = llmc.Runtime(artifact, target, threads=threads, max_context=2112,
                                    max_batch=4, specialize="none")
        executor = self.runtime.executor
        assert isinstance(self.runtime._model, LanguageModel)
        self.model = self.runtime._model
        np.random.default_rng(2).shuffle(self.model.pool._free)
        if target == "host":
            spoil_states(executor)
            spoil_memory(executor)
        else:
            spoil_device(executor)  # type: ignore[arg-type]

    def logits(self, sequences: Sequence[np.ndarray], past: Sequence[int], new: Sequence[int]
               ) -> list[np.ndarray]:
        """Logits [new, vocab] of tokens past .. past + new of every sequence, from one step."""
        cached = [CachedSequence() for _ in sequences]
        for sequence, ids, length in zip(cached, sequences, past, strict=True):
            if length:
                list(self.model.feed(sequence, ids[:length]))
        chunks = [Chunk(sequence, ids[start:start + count], count)
                  for sequence, ids, start, count in zip(cached, sequences, past, new, strict=True)]
        logits = self.runtime.step(chunks)
        for sequence in cached:
            self.runtime.release(sequence)
        return np.split(logits, np.cumsum(new)[:-1])

    def close(self) -> None:
        self.runtime.close()
