"""Runs an encoder (BERT family) on packed sentences, and pools them into embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.errors import ShapeError
from llmc.runtime.executor import Executor


class Encoder:
    """Steps an executor whose model is an encoder."""

    def __init__(self, executor: Executor, max_context: int, chunk_tokens: int):
        self.executor = executor
        self.max_context = max_context
        self.chunk_tokens = max(chunk_tokens, max_context)

    def run(self, sentences: Sequence[np.ndarray], types: Sequence[np.ndarray] | None = None
            ) -> list[dict[str, np.ndarray]]:
        """Every output per sentence: [tokens, width] of that sentence, or [width] if pooled."""
        types = types or [np.zeros(len(ids), np.int32) for ids in sentences]
        for ids in sentences:
            if not 0 < len(ids) <= self.max_context:
                raise ShapeError(f"a sentence of {len(ids)} tokens; the model takes 1 to "
                                 f"{self.max_context}")
        results: list[dict[str, np.ndarray]] = []
        start = 0
        while start < len(sentences):
            end = self._batch_end(sentences, start)
            results += self._step(sentences[start:end], types[start:end])
            start = end
        return results

    def _batch_end(self, sentences: Sequence[np.ndarray], start: int) -> int:
        total, end = 0, start
        while end < len(sentences) and total + len(sentences[end]) <= self.chunk_tokens:
            total += len(sentences[end])
            end += 1
        return end

    def _step(self, sentences, types) -> list[dict[str, np.ndarray]]:
        counts = [len(ids) for ids in sentences]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        inputs = {
            "ids": np.concatenate(sentences).astype(np.int32),
            "token_types": np.concatenate(types).astype(np.int32),
            "positions": np.concatenate([np.arange(count) for count in counts]).astype(np.int32),
            "sequence": np.repeat(np.arange(len(counts)), counts).astype(np.int32),
            "offsets": offsets,
        }
        wanted = {tensor.name for tensor in self.executor.inputs}
        outputs = self.executor.run({n: array for n, array in inputs.items() if n in wanted})
        by_token = {t.name for t in self.executor.outputs if "tokens" in str(t.shape[0])}
        return [{name: value[first:last] if name in by_token else value[row]
                 for name, value in outputs.items()}
                for row, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False))]


def pool(hidden: np.ndarray, mode: str, normalize: bool) -> np.ndarray:
    """A sentence's vector [dim] f32 from its hidden states [tokens, dim]. mode: mean, cls or max."""
    if mode == "cls":
        vector = hidden[0]
    elif mode == "max":
        vector = hidden.max(axis=0)
    else:
        vector = hidden.mean(axis=0, dtype=np.float64)
    vector = vector.astype(np.float64)
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return vector.astype(np.float32)
