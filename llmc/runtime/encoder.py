"""Runs an encoder (BERT family) on packed sentences, and pools them into embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmc.errors import ShapeError
from llmc.runtime.executor import Executor
from llmc.runtime.padding import DenseBatch, pad


@dataclass(frozen=True)
class Sentence:
    """One sentence's tokens. The first `length` of them are seen; `pooled` is the one that the
    model's own pooler reads."""

    ids: np.ndarray
    types: np.ndarray
    positions: np.ndarray
    length: int
    pooled: int = 0

    @classmethod
    def of(cls, ids: np.ndarray) -> Sentence:
        """Plain tokens: type 0, positions from 0."""
        return cls(ids, np.zeros(len(ids), np.int32), np.arange(len(ids)), len(ids))


class Encoder:
    """Steps an executor whose model is an encoder."""

    def __init__(self, executor: Executor, max_context: int, chunk_tokens: int):
        self.executor = executor
        self.max_context = max_context
        self.chunk_tokens = max(chunk_tokens, max_context)
        self._inputs = {tensor.name for tensor in executor.inputs}

    def run(self, sentences: Sequence[Sentence]) -> list[dict[str, np.ndarray]]:
        """Every output per sentence: [tokens, width] of that sentence, or [width] if pooled."""
        for sentence in sentences:
            if not 0 < sentence.length <= self.max_context:
                raise ShapeError(f"a sentence of {sentence.length} tokens; the model takes 1 to "
                                 f"{self.max_context}")
            if sentence.positions.min() < 0 or sentence.positions.max() >= self.max_context:
                raise ShapeError(f"positions must be in 0..{self.max_context - 1}")
        results: list[dict[str, np.ndarray]] = []
        start = 0
        while start < len(sentences):
            end = self._batch_end(sentences, start)
            results += self._step(sentences[start:end])
            start = end
        return results

    def run_dense(self, batch: DenseBatch) -> dict[str, np.ndarray]:
        """Every output of a padded batch: [batch, length, width] with zeros at padding, or
        [batch, width]. Positions count columns, as the family's reference does, unless given;
        ShapeError if they are given to a model that counts its tokens itself."""
        if batch.positions is not None and "positions" not in self._inputs:
            raise ShapeError("this model counts positions itself: leave out position_ids")
        results = self.run([_dense_row(batch, row) for row in range(len(batch.ids))])
        kept = batch.mask.sum(axis=1)
        dense = {}
        for name, first in results[0].items():
            values = [result[name] for result in results]
            dense[name] = np.stack(values) if first.ndim == 1 else pad(
                [value[:count] for value, count in zip(values, kept, strict=True)], batch.mask)
        return dense

    def _batch_end(self, sentences: Sequence[Sentence], start: int) -> int:
        """Sentences of one step: what would be left as a short one joins the last, since every
        step reads all weights."""
        total, end = 0, start
        while end < len(sentences) and (end == start or total + len(sentences[end].ids)
                                        <= self.chunk_tokens):
            total += len(sentences[end].ids)
            end += 1
        left = sum(len(sentence.ids) for sentence in sentences[end:])
        return len(sentences) if left <= self.chunk_tokens // 2 else end

    def _step(self, sentences: Sequence[Sentence]) -> list[dict[str, np.ndarray]]:
        counts = [len(sentence.ids) for sentence in sentences]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        inputs = {
            "ids": np.concatenate([s.ids for s in sentences]),
            "token_types": np.concatenate([s.types for s in sentences]),
            "positions": np.concatenate([s.positions for s in sentences]),
            "sequence": np.repeat(np.arange(len(counts)), counts),
            "offsets": offsets,
            "lengths": np.array([s.length for s in sentences]),
            "pooled": offsets[:-1] + [s.pooled for s in sentences],
        }
        outputs = self.executor.run(
            {name: array.astype(np.int32) for name, array in inputs.items()
             if name in self._inputs})
        by_token = {t.name for t in self.executor.outputs if "tokens" in str(t.shape[0])}
        return [{name: value[first:last] if name in by_token else value[row]
                 for name, value in outputs.items()}
                for row, (first, last) in enumerate(pairwise(offsets))]


def _dense_row(batch: DenseBatch, row: int) -> Sentence:
    """A row's tokens. The pooler reads column 0: where that is padding, its token comes along,
    to ask but not to be seen."""
    columns = np.flatnonzero(batch.mask[row])
    length, pooled = len(columns), 0
    if columns[0]:
        columns, pooled = np.append(columns, 0), length
    positions = columns if batch.positions is None else batch.positions[row, columns]
    return Sentence(batch.ids[row, columns], batch.types[row, columns], positions, length, pooled)


def pool(hidden: np.ndarray, mode: str, normalize: bool) -> np.ndarray:
    """A sentence's vector [dim] f32 from its hidden states [tokens, dim]; mode: mean, cls, max."""
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
