"""Sampling: greedy, its limits, and repeatability."""

import numpy as np
import pytest

from llmc.errors import ShapeError
from llmc.runtime.sampling import Sampling, sample

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
