"""Trials: what is faster by more than noise, what is not, and how long that takes to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from llmc.runtime.artifact import VariantInfo
from llmc.runtime.trials import LEAST_GAIN, MOST_PAIRS, RangeTrial, Trial, estimate


class FakeCode:
    """A variant without code."""

    def __init__(self, name: str):
        self.info = VariantInfo(name, {}, "0", "0", 1)
        self.calls = 0
        self.seconds = 0.0

    def covers(self, values: Mapping[str, int]) -> bool:
        return True

    def width(self) -> int:
        return 0


OLD, NEW = FakeCode("old"), FakeCode("new")


def run_trial(trial: Trial, seconds: Callable[[bool], float]) -> None:
    """Calls until the trial is done; seconds: of a call, by whether it is of the new code."""
    while not trial.done:
        variant = trial.pick()
        trial.observe(variant, seconds(variant is trial.new))


def decide(gain: float, noise: float, disturbed: float, seed: int) -> Trial:
    """A trial with noise of so many percent, extended as long as that helps; a tenth of the calls
    are disturbed."""
    random = np.random.default_rng(seed)

    def seconds(new: bool) -> float:
        extra = random.exponential(disturbed) if random.random() < 0.1 else 0.0
        return (1.0 - gain * new) * float(np.exp(random.normal(0.0, noise) + extra))

    trial = Trial(OLD, NEW)
    run_trial(trial, seconds)
    while trial.extend():
        run_trial(trial, seconds)
    return trial


@pytest.mark.parametrize(("gain", "noise", "disturbed"), [
    (0.02, 0.02, 0.0), (0.02, 0.03, 0.5), (0.1, 0.1, 0.5), (0.03, 0.01, 0.5)])
def test_gains_of_a_percent_or_two_are_found_in_noise(gain: float, noise: float, disturbed: float):
    found = [decide(gain, noise, disturbed, seed) for seed in range(12)]
    assert all(trial.is_faster() for trial in found)
    middle = np.median([trial.gain().middle for trial in found])
    assert gain / 2 < middle < 2 * gain, "what is stopped early has been lucky, but not that much"


@pytest.mark.parametrize("gain", [0.0, -0.01, -0.1])
@pytest.mark.parametrize("disturbed", [0.0, 0.5])
def test_what_is_no_faster_is_not_kept(gain: float, disturbed: float):
    found = [decide(gain, 0.03, disturbed, seed) for seed in range(40)]
    assert sum(trial.is_faster() for trial in found) <= 4, "one in a hundred a look, and few looks"


def test_the_interval_holds_the_true_gain():
    random = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        gain = estimate(list(0.97 * np.exp(random.laplace(0.0, 0.05, 48))))
        assert gain.low <= gain.middle <= gain.high and gain.pairs == 48
        inside += gain.low <= 0.03 <= gain.high
    assert inside >= 190


def test_one_pair_says_nothing():
    gain = estimate([0.5])
    assert gain.low == gain.middle == gain.high == pytest.approx(0.5)
    assert "1 pairs" in str(gain)


def test_a_clear_answer_needs_no_longer_trial():
    for gain in (0.1, -0.1):
        trial = Trial(OLD, NEW)
        run_trial(trial, lambda new, gain=gain: 1.0 - gain * new)
        assert not trial.extend()
        assert trial.is_faster() is (gain > 0) and trial.is_slower() is (gain < 0)
        assert trial.pick() is OLD, "until somebody decides, the old code runs"


def test_noise_that_hides_a_gain_makes_a_trial_longer_but_not_endless():
    trial = decide(0.0, 0.5, 0.0, seed=1)
    assert MOST_PAIRS / 2 <= trial.gain().pairs <= MOST_PAIRS
    assert not trial.is_faster() and not trial.is_slower()


def test_what_is_certainly_not_worth_its_memory_needs_no_longer_trial():
    trial = Trial(OLD, NEW)
    run_trial(trial, lambda new: 1.0 - 0.4 * LEAST_GAIN * new * (trial.calls % 3))
    assert not trial.extend()


def test_a_range_is_judged_over_all_of_its_shapes():
    trial = RangeTrial(NEW, pairs=12)
    for call in range(200):
        part = trial.part((call % 5,), OLD)
        if part is None:
            break
        variant = part.pick()
        part.observe(variant, (1.0 + call % 5) * (0.9 if variant is NEW else 1.0))
    assert trial.done and trial.part((0,), OLD) is None
    assert trial.gain().middle == pytest.approx(0.1) and trial.is_faster()


def test_where_equal_is_good_enough_a_loss_must_be_certain_before_the_trial_ends():
    trial = Trial(OLD, NEW)
    run_trial(trial, lambda new: 1.0 + new * (0.02 if trial.calls % 3 else -0.006))
    assert trial.gain().middle < 0 < trial.gain().high < LEAST_GAIN
    assert not trial.extend() and trial.extend(least=0.0)
