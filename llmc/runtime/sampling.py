"""From logits to tokens, on the host, for all rows of a step at once.

Random numbers are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") of
(seed, choice, position), so a sequence's tokens never depend on what else is in the batch, nor on
whether it was preempted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc.errors import ShapeError

CANDIDATES = 256  # tokens of a row that are sorted; where top-p needs more, all are
NO_TOKEN = -1  # for a row without any possible token: a mask forbids all, or logits are NaN


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in this order.

    logit_bias           token id -> what is added to its logit
    repetition_penalty   logits of tokens in the prompt or made are divided by it where positive,
                         multiplied where negative (1: none)
    presence_penalty     taken from the logits of tokens that were made
    frequency_penalty    taken from them as many times as they were made
    temperature          logits are divided by it; 0 is greedy, and what follows has no effect
    top_k                keep the k likeliest (0: all)
    min_p                keep those at least min_p times as likely as the likeliest (0: all)
    top_p                keep the fewest likeliest that together have a share p of what is left
                         (1: all)
    seed                 fixes the random numbers
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty", "presence_penalty",
                     "frequency_penalty"):
            if not np.isfinite(getattr(self, name)):
                raise ShapeError(f"{name} must be finite, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ShapeError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ShapeError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ShapeError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ShapeError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.repetition_penalty <= 0:
            raise ShapeError("repetition_penalty must be more than 0, got "
                             f"{self.repetition_penalty}")
        if not all(np.isfinite(bias) for bias in self.logit_bias.values()):
            raise ShapeError("logit_bias must be finite")

    def check(self, vocabulary: int) -> None:
        """ShapeError if logit_bias names tokens that a model does not have."""
        for token in self.logit_bias:
            if not 0 <= token < vocabulary:
                raise ShapeError(f"logit_bias: token id {token} is outside the vocabulary of "
                                 f"{vocabulary}")

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return (self.repetition_penalty != 1 or self.presence_penalty != 0
                or self.frequency_penalty != 0)


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token by the model's own logits (before bias, penalties, temperature),
    and the likeliest tokens with theirs, the best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """logits: [vocab] f32, as the model gave them; top: how many alternatives."""
    best = logits.max()
    total = best + np.log(np.exp(logits - best, dtype=np.float64).sum())
    found = np.argpartition(-logits, min(top, len(logits) - 1))[:top].tolist()
    likeliest = sorted(((float(logits[each] - total), each) for each in found),
                       key=lambda pair: (-pair[0], pair[1]))
    return TokenLogprob(token, float(logits[token] - total),
                        tuple((each, value) for value, each in likeliest))


class _Counts:
    """Tokens of one sequence, for its penalties."""

    def __init__(self, sampling: Sampling, vocabulary: int, prompt: np.ndarray, made: np.ndarray):
        self.sampling = sampling
        self.made = np.bincount(made, minlength=vocabulary)
        self.seen = self.made > 0
        self.seen[prompt] = True

    def apply(self, row: np.ndarray) -> None:
        """Penalise a row of logits in place."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            seen = row[self.seen]
            row[self.seen] = np.where(seen > 0, seen / sampling.repetition_penalty,
                                      seen * sampling.repetition_penalty)
        if sampling.frequency_penalty:
            row -= np.float32(sampling.frequency_penalty) * self.made
        if sampling.presence_penalty:
            row -= np.float32(sampling.presence_penalty) * (self.made > 0)


class Sampler:
    """Settings of the sequences that run, each in a slot; samples rows of any of the slots."""

    def __init__(self, slots: int, vocabulary: int):
        self.vocabulary = vocabulary
        self.greedy = np.ones(slots, np.bool_)  # whether the likeliest logit alone decides
        self._temperature = np.zeros(slots)
        self._top_k = np.zeros(slots, np.int64)
        self._top_p = np.ones(slots)
        self._min_p = np.zeros(slots)
        self._seed = np.zeros(slots, np.uint64)
        self._choice = np.zeros(slots, np.uint64)
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._counts: dict[int, _Counts] = {}

    def assign(self, slot: int, sampling: Sampling, choice: int, prompt: np.ndarray,
               made: np.ndarray) -> None:
        """Put a sequence into a slot. choice: its number among those with the same seed; prompt,
        made: its token ids so far. The sampling has been checked."""
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._seed[slot] = sampling.seed & (2**64 - 1)
        self._choice[slot] = choice
        self._bias.pop(slot, None)
        self._counts.pop(slot, None)
        if sampling.logit_bias:
            self._bias[slot] = (np.array(list(sampling.logit_bias), np.int64),
                                np.array(list(sampling.logit_bias.values()), np.float32))
        if sampling.counts_tokens:
            self._counts[slot] = _Counts(sampling, self.vocabulary, prompt, made)
        self.greedy[slot] = (sampling.temperature == 0 and not sampling.logit_bias
                             and not sampling.counts_tokens)

    def observe(self, slot: int, token: int) -> None:
        """A sequence got a token: penalties count it."""
        counts = self._counts.get(slot)
        if counts is not None:
            counts.made[token] += 1
            counts.seen[token] = True

    def sample(self, logits: np.ndarray, slots: np.ndarray, positions: np.ndarray,
               masks: Mapping[int, np.ndarray] | None = None,
               banned: Mapping[int, Sequence[int]] | None = None) -> np.ndarray:
        """The next token of every row, int64 [rows]; NO_TOKEN where none is possible.

        logits: [rows, vocab] f32, written to. slots, positions: [rows], whose row it is and where
        the token will stand. masks: row -> bits of the tokens that may come, as a Matcher gives
        them; banned: row -> tokens that may not.
        """
        self._adjust(logits, slots, masks or {}, banned or {})
        tokens = logits.argmax(axis=1)
        peaks = np.take_along_axis(logits, tokens[:, None], 1)[:, 0]
        possible = np.isfinite(peaks)
        random = np.flatnonzero(possible & (self._temperature[slots] > 0))
        if random.size:
            whole = random.size == len(logits)
            tokens[random] = self._draw(logits if whole else logits[random], peaks[random],
                                        slots[random], positions[random])
        tokens[~possible] = NO_TOKEN
        return tokens

    def _adjust(self, logits: np.ndarray, slots: np.ndarray, masks: Mapping[int, np.ndarray],
                banned: Mapping[int, Sequence[int]]) -> None:
        if self._bias or self._counts:
            for row, slot in enumerate(slots.tolist()):
                if slot in self._bias:
                    ids, values = self._bias[slot]
                    logits[row, ids] += values
                if slot in self._counts:
                    self._counts[slot].apply(logits[row])
        for row, bits in masks.items():
            allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[:self.vocabulary]
            np.copyto(logits[row, :len(allowed)], -np.inf, where=allowed == 0)
            logits[row, len(allowed):] = -np.inf
        for row, tokens in banned.items():
            logits[row, list(tokens)] = -np.inf

    def _draw(self, logits: np.ndarray, peaks: np.ndarray, slots: np.ndarray,
              positions: np.ndarray) -> np.ndarray:
        """Random tokens of rows that are not greedy."""
        temperature = np.maximum(self._temperature[slots, None], np.finfo(np.float32).tiny)
        with np.errstate(over="ignore"):  # a tiny temperature: all others are infinitely worse
            below = (logits - peaks[:, None]) / temperature.astype(np.float32)
        weights = np.exp(below, out=below)
        uniform = philox_uniform(self._seed[slots], self._choice[slots], positions)
        filtered = ((self._top_k[slots] > 0) | (self._top_p[slots] < 1) | (self._min_p[slots] > 0))
        tokens = np.empty(len(logits), np.int64)
        for rows, draw in ((np.flatnonzero(~filtered), self._draw_all),
                           (np.flatnonzero(filtered), self._draw_filtered)):
            if rows.size:
                part = weights if rows.size == len(weights) else weights[rows]
                tokens[rows] = draw(part, slots[rows], uniform[rows])
        return tokens

    def _draw_all(self, weights: np.ndarray, slots: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Tokens in proportion to weights [rows, vocab]."""
        return _pick(np.cumsum(weights, axis=1, dtype=np.float64), uniform)

    def _draw_filtered(self, weights: np.ndarray, slots: np.ndarray, uniform: np.ndarray
                       ) -> np.ndarray:
        """The same among those that top-k, top-p and min-p keep."""
        count = min(CANDIDATES, weights.shape[1])
        totals = weights.sum(axis=1, dtype=np.float64)
        best, order = _largest(weights, count)
        enough = self._suffices(best, totals, slots) | (count == weights.shape[1])
        tokens = np.empty(len(weights), np.int64)
        for rows in (np.flatnonzero(enough), np.flatnonzero(~enough)):
            if not rows.size:
                continue
            some, places = ((best[rows], order[rows]) if enough[rows[0]]
                            else _largest(weights[rows], weights.shape[1]))
            picked = self._pick_kept(some, totals[rows], slots[rows], uniform[rows])
            tokens[rows] = np.take_along_axis(places, picked[:, None], 1)[:, 0]
        return tokens

    def _suffices(self, best: np.ndarray, totals: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Whether what is kept lies among the best [rows, candidates], row by row."""
        top_k, min_p = self._top_k[slots], self._min_p[slots]
        by_rank = (top_k > 0) & (top_k <= best.shape[1])
        by_weight = best[:, -1] < min_p  # the likeliest weighs 1
        by_share = ((top_k == 0) & (min_p == 0)
                    & (best.sum(axis=1, dtype=np.float64) >= self._top_p[slots] * totals))
        return by_rank | by_weight | by_share

    def _pick_kept(self, weights: np.ndarray, totals: np.ndarray, slots: np.ndarray,
                   uniform: np.ndarray) -> np.ndarray:
        """Columns of weights [rows, candidates], which fall; totals: those of all tokens."""
        top_k, min_p = self._top_k[slots], self._min_p[slots]
        columns = np.arange(weights.shape[1])
        keep = columns < np.where(top_k > 0, top_k, len(columns))[:, None]
        keep &= weights >= min_p[:, None]
        kept = np.cumsum(weights * keep, axis=1, dtype=np.float64)
        share = self._top_p[slots] * np.where((top_k > 0) | (min_p > 0), kept[:, -1], totals)
        keep &= kept - weights < share[:, None]
        keep[:, 0] = True
        return _pick(np.cumsum(weights * keep, axis=1, dtype=np.float64), uniform)


def sample(logits: np.ndarray, sampling: Sampling, sequence: int, position: int) -> int:
    """The next token of one sequence without penalties. logits: [vocab] f32; position: where the
    token will stand."""
    none = np.empty(0, np.int64)
    sampler = Sampler(1, len(logits))
    sampler.assign(0, sampling, sequence, none, none)
    row = np.array(logits[None])
    return int(sampler.sample(row, np.zeros(1, np.int64), np.array([position]))[0])


def _largest(weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of each row, falling, and their columns; of equals the first comes
    first."""
    if count < weights.shape[1]:
        places = np.sort(np.argpartition(weights, -count, axis=1)[:, -count:], axis=1)
        values = np.take_along_axis(weights, places, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        return np.take_along_axis(values, order, 1), np.take_along_axis(places, order, 1)
    order = np.argsort(-weights, axis=1, kind="stable")
    return np.take_along_axis(weights, order, 1), order


def _pick(cumulative: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """First column of each row whose cumulative weight exceeds a share `uniform` of the last; a
    column without weight is never picked."""
    target = uniform * cumulative[:, -1]
    return np.fromiter((row.searchsorted(value, "right") for row, value
                        in zip(cumulative, target, strict=True)), np.int64, len(target))


_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10. counter: [4, n], key: [2, n], 32-bit words in uint64; random words [4, n]."""
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((right >> _HALF) ^ b ^ first, right & _LOW,
                      (left >> _HALF) ^ d ^ second, left & _LOW)
        first, second = (first + _KEY_STEPS[0]) & _LOW, (second + _KEY_STEPS[1]) & _LOW
    return np.stack([a, b, c, d])


def philox_uniform(seeds: np.ndarray, choices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A number in [0, 1) with 53 random bits for every (seed, choice, position); f64."""
    seeds, choices = seeds.astype(np.uint64), choices.astype(np.uint64)
    places = positions.astype(np.uint64)
    words = philox(np.stack([places & _LOW, places >> _HALF, choices & _LOW, choices >> _HALF]),
                   np.stack([seeds & _LOW, seeds >> _HALF]))
    return ((words[0] >> np.uint64(5)) * 2.0**26 + (words[1] >> np.uint64(6))) * 2.0**-53
