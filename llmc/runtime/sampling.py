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

BLOCK = 256  # weights that are summed before it is known which of them matter
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
        self.greedy = [True] * slots  # whether the likeliest logit alone decides
        self._sampling = [Sampling()] * slots
        self._choice = [0] * slots
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._counts: dict[int, _Counts] = {}

    def assign(self, slot: int, sampling: Sampling, choice: int, prompt: np.ndarray,
               made: np.ndarray) -> None:
        """Put a sequence into a slot. choice: its number among those with the same seed; prompt,
        made: its token ids so far. The sampling has been checked."""
        self._sampling[slot], self._choice[slot] = sampling, choice
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

    def sample(self, logits: np.ndarray, slots: Sequence[int], positions: Sequence[int],
               masks: Mapping[int, np.ndarray] | None = None,
               banned: Mapping[int, Sequence[int]] | None = None) -> list[int]:
        """The next token of every row; NO_TOKEN where none is possible.

        logits: [rows, vocab] f32, written to. slots, positions: for each row, whose it is and where
        the token will stand. masks: row -> bits of the tokens that may come, as a Matcher gives
        them; banned: row -> tokens that may not.
        """
        self._adjust(logits, slots, masks or {}, banned or {})
        best = logits.argmax(axis=1)
        possible = np.isfinite(logits[np.arange(len(logits)), best])
        tokens = np.where(possible, best, NO_TOKEN).tolist()
        random = [row for row, slot in enumerate(slots)
                  if self._sampling[slot].temperature > 0 and tokens[row] != NO_TOKEN]
        if random:
            some = [slots[number] for number in random]
            uniform = philox_uniform([self._sampling[slot].seed for slot in some],
                                     [self._choice[slot] for slot in some],
                                     [positions[number] for number in random])
            for number, slot, share in zip(random, some, uniform.tolist(), strict=True):
                tokens[number] = _draw(logits[number], tokens[number], self._sampling[slot], share)
        return tokens

    def _adjust(self, logits: np.ndarray, slots: Sequence[int], masks: Mapping[int, np.ndarray],
                banned: Mapping[int, Sequence[int]]) -> None:
        if self._bias or self._counts:
            for row, slot in enumerate(slots):
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


def sample(logits: np.ndarray, sampling: Sampling, sequence: int, position: int) -> int:
    """The next token of one sequence without penalties. logits: [vocab] f32; position: where the
    token will stand."""
    none = np.empty(0, np.int64)
    sampler = Sampler(1, len(logits))
    sampler.assign(0, sampling, sequence, none, none)
    return sampler.sample(np.array(logits[None]), [0], [position])[0]


def _draw(row: np.ndarray, best: int, sampling: Sampling, uniform: float) -> int:
    """A random token by logits [vocab], which become weights, the best one's 1."""
    temperature = max(sampling.temperature, float(np.finfo(np.float32).tiny))
    row -= row[best]
    with np.errstate(over="ignore"):  # a tiny temperature: all others are infinitely worse
        row *= np.float32(1 / temperature)
    weights = np.exp(row, out=row)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        return _draw_filtered(weights, sampling, uniform)
    return _find(weights, uniform)[0]


def _find(weights: np.ndarray, share: float, total: float | None = None) -> tuple[int, float]:
    """Where the running sum of weights first exceeds a share of `total` (default: of all), and the
    sum up to there. Blocks are summed first, for running sums are slow."""
    ends = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).cumsum(dtype=np.float64)
    target = share * (ends[-1] if total is None else total)
    block = min(int(ends.searchsorted(target, "right")), len(ends) - 1)
    before = float(ends[block - 1]) if block else 0.0
    inside = weights[block * BLOCK:(block + 1) * BLOCK]
    running = inside.cumsum(dtype=np.float64)
    # rounded otherwise than its block's sum, it may stay below: then the last that weighs anything
    place = min(int(running.searchsorted(target - before, "right")), int(inside.nonzero()[0][-1]))
    return block * BLOCK + place, before + float(running[place])


def _draw_filtered(weights: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """A token in proportion to its weight among those that the filters keep, the likeliest first
    (of equals the first): only weights are sorted, and only those that can be kept."""
    kept = weights
    if 0 < sampling.top_k < len(kept):
        kept = np.partition(kept, len(kept) - sampling.top_k)[-sampling.top_k:]
    if sampling.min_p:
        kept = kept[kept >= np.float32(sampling.min_p)]
    wanted = sampling.top_p * float(kept.sum(dtype=np.float64))
    if sampling.top_p < 1:
        # all that weigh less are together less than what top-p leaves out
        least = np.float32((1 - sampling.top_p) / sampling.top_p * wanted / len(kept))
        kept = kept[kept >= least * np.float32(1 - 1e-6)]
    kept = np.sort(kept)[::-1]
    if sampling.top_p < 1:
        place, wanted = _find(kept, 1.0, wanted)
        kept = kept[:place + 1]
    place, _ = _find(kept, uniform, wanted)
    value = kept[place]
    equals = np.flatnonzero(weights == value)
    return int(equals[place - int((-kept).searchsorted(-value))])


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


def philox_uniform(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]
                   ) -> np.ndarray:
    """A number in [0, 1) with 53 random bits for every (seed, choice, position); f64. Of a seed
    the low 64 bits count."""
    low, high = zip(*map(_halves, (seeds, choices, positions)), strict=True)
    words = philox(np.stack([low[2], high[2], low[1], high[1]]), np.stack([low[0], high[0]]))
    return ((words[0] >> np.uint64(5)) * 2.0**26 + (words[1] >> np.uint64(6))) * 2.0**-53


def _halves(values: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Low and high words of integers' low 64 bits."""
    words = np.array([value & (2**64 - 1) for value in values], np.uint64)
    return words & _LOW, words >> _HALF
