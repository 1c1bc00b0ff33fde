"""From logits to a token, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.errors import ShapeError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 keep every token. seed fixes the random numbers,
    which depend on (seed, sequence, position) alone, never on the batch."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0 or not np.isfinite(self.temperature):
            raise ShapeError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ShapeError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ShapeError(f"top_p must be in (0, 1], got {self.top_p}")


def sample(logits: np.ndarray, sampling: Sampling, sequence: int, position: int) -> int:
    """The next token of one sequence. logits: [vocab] f32; position: where the token will stand."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[:sampling.top_k]
    below = logits[order].astype(np.float64) - float(logits[order[0]])
    with np.errstate(over="ignore"):  # a tiny temperature: all but the best are infinitely worse
        weights = np.exp(below / sampling.temperature)
    cumulative = np.cumsum(weights / weights.sum())
    kept = len(order)
    if sampling.top_p < 1:
        kept = int(np.searchsorted(cumulative, sampling.top_p)) + 1
    key = np.array([sampling.seed & (2**64 - 1), sequence], np.uint64)
    random = np.random.Generator(np.random.Philox(key=key, counter=position))
    target = random.random() * cumulative[min(kept, len(order)) - 1]
    return int(order[min(int(np.searchsorted(cumulative, target, "right")), kept - 1)])
