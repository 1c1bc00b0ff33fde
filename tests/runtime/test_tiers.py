"""The rules of specialisation: every shape has schedules, ranges waste as little as can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from llmc.runtime.tiers import (
    DEVICE,
    HOST,
    choose_ranges,
    exact_schedules,
    find_tier,
    range_schedules,
    tile_of,
    waste,
    waste_of,
)


@pytest.mark.parametrize("tiers", [HOST, DEVICE])
def test_tiers_cover_every_number_of_tokens_once(tiers):
    assert [tier.low for tier in tiers] == [1] + [tier.high + 1 for tier in tiers if tier.high]
    assert find_tier(tiers, 10**9) is tiers[-1]


@pytest.mark.parametrize("on_device", [False, True])
def test_there_is_something_to_try_for_every_shape(on_device):
    for tokens in (1, 3, 5, 17, 33, 4096):
        for sequences in (1, tokens):
            found = exact_schedules(on_device, {"tokens": tokens, "sequences": sequences})
            assert found and len({tuple(schedule.items()) for schedule in found}) == len(found)
        assert range_schedules(on_device, tokens)


def total(seconds, ranges, on_device):
    """Time wasted, by the definition; every count must be in exactly one range."""
    wasted = 0.0
    for count, spent in seconds.items():
        ((_, high),) = [each for each in ranges if each[0] <= count <= each[1]]
        wasted += spent * waste(count, tile_of(on_device, high))
    return wasted


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_ranges_waste_least(on_device, most):
    seconds = {5: 1.0, 6: 1.0, 7: 3.0, 8: 1.0, 17: 5.0, 18: 5.0, 40: 3.0, 64: 3.0, 100: 1.0}
    counts = sorted(seconds)
    found = choose_ranges(seconds, most, on_device)
    assert len(found) <= most

    def all_ways():
        for cuts in range(most):
            for inner in combinations(range(1, len(counts)), cuts):
                starts = (0, *inner, len(counts))
                yield [(counts[a], counts[b - 1]) for a, b in pairwise(starts)]

    assert total(seconds, found, on_device) == pytest.approx(
        min(total(seconds, ways, on_device) for ways in all_ways()))


def test_ranges_of_little_and_of_much():
    assert choose_ranges({}, 4) == []
    assert choose_ranges({0: 1.0, 33: 1.0}, 4) == [(33, 33)]
    many = choose_ranges(dict.fromkeys(range(1, 5000), 1.0), 4)
    assert len(many) <= 4 and all(low <= high for low, high in many)


def test_what_remains_wasted_of_a_shape():
    host = [waste_of(tokens, on_device=False) for tokens in (1, 2, 3, 4, 5, 8, 13, 128)]
    assert host == pytest.approx([0, 0, 1 / 3, 0, 0, 0, 0, 1 / 128])
    device = [waste_of(tokens, on_device=True) for tokens in (1, 8, 9, 64, 65, 300)]
    assert device == pytest.approx([7, 0, 7 / 9, 0, 63 / 65, 20 / 300])
    assert all(0 <= waste_of(tokens, False) < 0.4 for tokens in range(1, 300))
