"""Profiles: counts, fading, bounded memory, files that processes share and that may be damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmc
from llmc.runtime.profile import HALF_LIFE, RECENT_LIFE, Profile, Verdict, read_profile

NAMES = ("tokens", "sequences")


def observed(*shapes: tuple[int, int], seconds: float = 0.5) -> Profile:
    profile = Profile(NAMES)
    for shape in shapes:
        profile.observe(shape, "generic", seconds)
    profile.fold()
    return profile


def test_shapes_are_counted_over_their_variants():
    profile = Profile(NAMES)
    profile.observe((1, 1), "generic", 2.0)
    profile.observe((1, 1), "few", 1.0)
    profile.observe((8, 1), "generic", 0.5)
    profile.fold()
    first, second = profile.hottest()
    assert (first.shape, round(first.calls), round(first.mean, 2)) == ((1, 1), 2, 1.5)
    assert second.shape == (8, 1)
    assert profile.calls() == {(1, 1): 2, (8, 1): 1}


def test_a_weight_halves_with_every_half_life():
    profile = Profile(NAMES)
    profile.fold(100.0)
    for _ in range(8):
        profile.observe((1, 1), "few", 1.0)
    profile.fold(100.0)
    profile.fold(100.0 + 2 * HALF_LIFE)
    (heat,) = profile.hottest()
    assert heat.calls == pytest.approx(2.0)
    assert heat.mean == pytest.approx(1.0)


def test_memory_stays_bounded_and_keeps_what_keeps_coming():
    profile = Profile(NAMES, capacity=64)
    for number in range(20_000):
        profile.observe((number, 1), "generic", 1.0)
        if number % 8 == 0:
            profile.observe((1, 7), "few", 1.0)
    profile.fold()
    assert len(profile.cells) <= 64
    assert profile.hottest()[0].shape == (1, 7)
    assert profile.hottest()[0].calls == pytest.approx(2500, rel=0.01)


def test_a_saved_profile_comes_back(tmp_path: Path):
    path = tmp_path / "profiles" / "model.json"
    first = observed((1, 1), (1, 1), (8, 1))
    first.verdicts[8, 1] = Verdict("kept", 0.1, 2.0, "abc", "", {"matmul_rows": 4})
    first.save(path)
    second = Profile(NAMES)
    second.load(path)
    assert [heat.shape for heat in second.hottest()] == [(1, 1), (8, 1)]
    assert second.hottest()[0].calls == pytest.approx(2.0, rel=0.01)
    assert second.verdicts == first.verdicts


def test_saving_adds_what_is_new_once(tmp_path: Path):
    path = tmp_path / "model.json"
    mine, other = observed((1, 1)), observed((1, 1), (2, 1))
    for profile in (mine, other, mine, other):
        profile.save(path)
    saved = read_profile(path)
    assert saved is not None
    calls = {shape: cell.weight for (shape, _), cell in saved.cells.items()}
    assert calls == {(1, 1): pytest.approx(2.0, rel=0.01), (2, 1): pytest.approx(1.0, rel=0.01)}


def test_a_night_fades_a_profile_by_one_half_life(tmp_path: Path):
    path = tmp_path / "model.json"
    observed((1, 1)).save(path)
    late = read_profile(path, now=time.time() + 100 * HALF_LIFE)
    assert late is not None
    assert late.cells[(1, 1), "generic"].weight == pytest.approx(0.5)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "\0\0", '{"format": 2}',
                                    '{"format": 3}'])
def test_a_damaged_file_is_no_profile(tmp_path: Path, damage: str):
    path = tmp_path / "model.json"
    path.write_text(damage)
    assert read_profile(path) is None
    profile = observed((1, 1))
    profile.load(path)
    profile.save(path)
    assert read_profile(path) is not None


def test_shapes_of_other_symbols_are_not_taken(tmp_path: Path):
    path = tmp_path / "model.json"
    observed((1, 1)).save(path)
    other = Profile(("tokens",))
    other.load(path)
    assert not other.cells
    data = json.loads(path.read_text())
    data["cells"][0][0] = [1, 2, 3]
    path.write_text(json.dumps(data))
    assert read_profile(path) is None


def test_processes_that_save_together_lose_nothing(tmp_path: Path):
    code = ("import sys, pathlib\n"
            "from llmc.runtime.profile import Profile\n"
            "p = Profile(('tokens', 'sequences'))\n"
            "for _ in range(5):\n"
            "    p.observe((3, 1), 'few', 1.0)\n"
            "    p.save(pathlib.Path(sys.argv[1]))\n")
    path = tmp_path / "model.json"
    environment = os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parent.parent)}
    savers = [subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
              for _ in range(4)]
    assert [saver.wait(timeout=60) for saver in savers] == [0] * 4
    saved = read_profile(path)
    assert saved is not None
    assert saved.cells[(3, 1), "few"].weight == pytest.approx(20.0, rel=0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.lock"]


def test_what_came_lately_fades_sooner():
    profile = Profile(("tokens",))
    profile.fold(now=0.0)
    profile.observe((1,), "generic", 8.0)
    profile.fold(now=0.0)
    profile.fold(now=RECENT_LIFE)
    (heat,) = profile.hottest()
    assert heat.recent == pytest.approx(4.0)
    assert heat.seconds == pytest.approx(8.0 * 0.5 ** (RECENT_LIFE / HALF_LIFE))
