"""Sampling: greedy, its limits, and repeatability."""

import numpy as np
import pytest

from llmc.errors import ShapeError
from llmc.runtime.sampling import (
    NO_TOKEN,
    Sampler,
    Sampling,
    philox,
    sample,
    token_logprob,
)

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draws(sampling: Sampling, count: int = 2000) -> np.ndarray:
    found = [sample(LOGITS, sampling, 0, position) for position in range(count)]
    return np.bincount(found, minlength=4) / count


def test_temperature_zero_takes_the_best():
    assert sample(LOGITS, Sampling(), 0, 0) == 0


def test_frequencies_follow_the_probabilities():
    assert np.abs(draws(Sampling(temperature=1.0)) - np.exp(LOGITS)).max() < 0.04


def test_top_k_keeps_k():
    found = draws(Sampling(temperature=1.0, top_k=2))
    assert found[2:].sum() == 0 and abs(found[0] - 0.625) < 0.04


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    found = draws(Sampling(temperature=1.0, top_p=0.75))
    assert found[2:].sum() == 0 and found[1] > 0


def test_random_numbers_depend_on_seed_sequence_and_position_only():
    one = Sampling(temperature=1.0, seed=7)
    assert [sample(LOGITS, one, 3, p) for p in range(50)] == [
        sample(LOGITS, one, 3, p) for p in range(50)]
    other = Sampling(temperature=1.0, seed=8)
    assert [sample(LOGITS, one, 3, p) for p in range(50)] != [
        sample(LOGITS, other, 3, p) for p in range(50)]


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"temperature": float("nan")},
                                      {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ShapeError):
        Sampling(**settings)


def test_the_least_temperature_takes_the_best():
    assert all(sample(LOGITS, Sampling(temperature=5e-324), 0, p) == 0 for p in range(20))


def test_every_seed_is_another():
    seeds = (-2, -1, 0, 1, 2**63, 2**63 + 5, 2**64 - 3)
    found = {tuple(sample(LOGITS, Sampling(temperature=1.0, seed=seed), 0, p) for p in range(50))
             for seed in seeds}
    assert len(found) == len(seeds)


# ---- batches ------------------------------------------------------------------------------------


def test_random_numbers_are_those_of_the_published_generator():
    """Random123's known answers of Philox4x32-10."""
    cases = [([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
             ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
             ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
              [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1])]
    for counter, key, expected in cases:
        found = philox(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64)[:, None])
        assert found[:, 0].tolist() == expected


SETTINGS = [
    Sampling(), Sampling(temperature=0.7, seed=1), Sampling(temperature=1.0, top_k=5, seed=2),
    Sampling(temperature=1.3, top_p=0.8, seed=3), Sampling(temperature=1.0, min_p=0.05, seed=4),
    Sampling(temperature=2.0, top_k=400, top_p=0.99, seed=5),
    Sampling(temperature=8.0, top_p=0.999, seed=6), Sampling(repetition_penalty=3.0),
    Sampling(temperature=1.0, presence_penalty=1.0, frequency_penalty=0.5, seed=7),
    Sampling(logit_bias={3: 100.0}), Sampling(temperature=1.0, logit_bias={3: -100.0}, seed=8)]
VOCABULARY = 1000


def make_sampler(settings: list[Sampling]) -> Sampler:
    sampler = Sampler(len(settings), VOCABULARY)
    for slot, sampling in enumerate(settings):
        sampler.assign(slot, sampling, slot, np.array([1, 2]), np.array([4, 4, 9]))
    return sampler


def test_a_row_gets_the_same_token_in_any_batch():
    random = np.random.default_rng(0)
    logits = (3 * random.standard_normal((len(SETTINGS), VOCABULARY))).astype(np.float32)
    sampler = make_sampler(SETTINGS)
    slots, positions = list(range(len(SETTINGS))), list(range(70, 70 + len(SETTINGS)))
    together = sampler.sample(logits.copy(), slots, positions)
    order = random.permutation(len(SETTINGS))
    shuffled = sampler.sample(logits[order], order.tolist(), [70 + row for row in order.tolist()])
    assert shuffled == [together[row] for row in order]
    for row in slots:
        alone = sampler.sample(logits[row:row + 1].copy(), [row], [70 + row])
        assert alone == [together[row]]
    assert together[0] == logits[0].argmax() and together[9] == 3 and together[10] != 3


def kept_by_definition(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities that are drawn from, one filter after the other."""
    weights = np.exp((logits - logits.max()).astype(np.float64) / sampling.temperature)
    order = np.argsort(-weights, kind="stable")
    keep = np.ones(len(logits), bool)
    if sampling.top_k:
        keep[order[sampling.top_k:]] = False
    keep &= weights >= sampling.min_p
    share = np.cumsum((weights * keep)[order]) / (weights * keep).sum()
    keep[order[np.searchsorted(share, sampling.top_p) + 1:]] = False
    return weights * keep / (weights * keep).sum()


@pytest.mark.parametrize("sampling", SETTINGS[1:7])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_draws_follow_the_definition(sampling: Sampling, spread: float):
    logits = (spread * np.random.default_rng(1).standard_normal(VOCABULARY)).astype(np.float32)
    expected = kept_by_definition(logits, sampling)
    count = 4000
    sampler = make_sampler([sampling])
    drawn = sampler.sample(np.tile(logits, (count, 1)), [0] * count, range(count))
    assert not np.flatnonzero(np.bincount(drawn, minlength=VOCABULARY) * (expected == 0)).size
    # of the tokens in their order, one share after the other is drawn as often as it is likely
    order = np.argsort(-expected)
    found = np.cumsum(np.bincount(drawn, minlength=VOCABULARY)[order]) / count
    assert np.abs(found - np.cumsum(expected[order])).max() < 1.95 / count ** 0.5


def test_penalties_count_what_was_made():
    logits = np.zeros((1, VOCABULARY), np.float32)
    logits[0, [4, 9, 1]] = 2.0, 1.9, 1.7

    def best(**settings) -> int:
        return make_sampler([Sampling(**settings)]).sample(logits.copy(), [0], [0])[0]

    assert best() == 4
    assert best(frequency_penalty=0.15) == 9  # token 4 was made twice, 9 once, 1 is in the prompt
    assert best(presence_penalty=0.15) == 4
    assert best(presence_penalty=0.35) == 1
    assert best(frequency_penalty=-0.1) == 4
    assert best(repetition_penalty=1e9) == 4  # of small but positive logits still the largest
    sampler = make_sampler([Sampling(frequency_penalty=0.06)])
    assert sampler.sample(logits.copy(), [0], [0])[0] == 4
    sampler.observe(0, 4)
    assert sampler.sample(logits.copy(), [0], [0])[0] == 9


def test_repetition_lowers_negative_logits_too():
    logits = np.full((1, VOCABULARY), -2.0, np.float32)
    logits[0, [1, 4, 7]] = -1.0, -1.1, -1.2
    sampler = make_sampler([Sampling(repetition_penalty=1.5)])
    assert sampler.sample(logits, [0], [0])[0] == 7


def test_masks_and_banned_tokens_never_come():
    logits = np.zeros((3, VOCABULARY), np.float32)
    logits[:, 5] = 9.0
    allowed = np.zeros(VOCABULARY, np.uint8)
    allowed[[40, 999]] = 1
    bits = np.packbits(np.append(allowed, np.zeros(24, np.uint8)), bitorder="little")
    masks = {0: bits.view(np.uint32), 2: np.zeros(1, np.uint32)}
    sampler = make_sampler([Sampling(temperature=1.0), Sampling(), Sampling(temperature=1.0)])
    found = sampler.sample(logits, range(3), range(3), masks, {1: [5]})
    assert found[0] in (40, 999) and found[1] == 0 and found[2] == NO_TOKEN


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_token(temperature: float):
    logits = np.zeros((2, VOCABULARY), np.float32)
    logits[1, 7] = np.nan
    sampler = make_sampler([Sampling(temperature=temperature, top_p=0.9)] * 2)
    found = sampler.sample(logits, range(2), range(2))
    assert found[0] != NO_TOKEN and found[1] == NO_TOKEN


def test_logprobs_are_those_of_the_softmax():
    logits = np.random.default_rng(3).standard_normal(VOCABULARY).astype(np.float32)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    found = token_logprob(logits, 17, 4)
    order = np.argsort(-logits)[:4]
    assert found.token == 17 and found.logprob == pytest.approx(expected[17], abs=1e-6)
    assert [token for token, _ in found.top] == order.tolist()
    assert [value for _, value in found.top] == pytest.approx(expected[order].tolist(), abs=1e-6)
    assert token_logprob(logits, 17, 0).top == ()


@pytest.mark.parametrize("settings", [
    {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"presence_penalty": np.inf},
    {"frequency_penalty": np.nan}, {"logit_bias": {3: np.inf}}])
def test_senseless_settings_of_other_kinds_are_refused(settings):
    with pytest.raises(ShapeError):
        Sampling(**settings)


def test_a_bias_must_be_for_a_token_of_the_vocabulary():
    for token in (-1, 1000):
        with pytest.raises(ShapeError, match="outside the vocabulary"):
            Sampling(logit_bias={token: 1.0}).check(VOCABULARY)
