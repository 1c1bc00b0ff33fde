"""llmc profile show, and what llmc cache says of variants and profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmc.cli.cache import age
from llmc.runtime.artifact import VariantInfo
from llmc.runtime.cache import StoredVariant, VariantCache
from llmc.runtime.profile import Profile, Verdict


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    profile = Profile(("tokens", "rows"))
    for _ in range(9):
        profile.observe((8, 1), "generic", 0.010)
        profile.observe((8, 1), "tokens=8,rows=1", 0.008)
        profile.observe((1, 1), "few", 0.002)
    profile.observe((300, 1), "generic", 0.020)
    profile.verdicts[8, 1] = Verdict("kept", 0.2, 1.5)
    path = tmp_path / "profiles" / "model.json"
    profile.save(path)
    return path


def test_the_histogram_shows_shapes_tiers_and_verdicts(llmc_command, saved: Path):
    result = llmc_command("profile", "show", saved)
    lines = result.out.splitlines()
    assert result.status == 0
    assert lines[0].split()[0] == "tokensxrows"
    assert lines[1].split()[:2] == ["8x1", "18"] and "exact" in lines[1]
    assert "kept +20.0%" in lines[1] and lines[1].endswith("#")
    assert [line.split()[0] for line in lines[2:4]] == ["300x1", "1x1"]
    assert lines[-1].startswith("time by tier: exact 81.0%, ranged 9.0%, generic 10.0%")


def test_code_for_a_range_is_of_the_ranged_tier(llmc_command, tmp_path: Path):
    profile = Profile(("tokens", "rows"))
    profile.observe((9, 1), "tokens=9..13", 0.010)
    profile.ranges[9, 13] = Verdict("kept", 0.07, 1.0)
    path = tmp_path / "model.json"
    profile.save(path)
    lines = llmc_command("profile", "show", path).out.splitlines()
    assert "ranged" in lines[1]
    assert lines[-1] == "code for 9 to 13 tokens: kept +7.0%"


def test_the_rest_is_summed_up(llmc_command, saved: Path):
    assert "2 more shapes" in llmc_command("profile", "show", saved, "--top", 1).out


def test_the_page_needs_nothing_else(llmc_command, saved: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    assert llmc_command("profile", "show", saved, "--html", page).status == 0
    text = page.read_text()
    assert "8x1" in text and "kept +20.0%" in text
    assert "http" not in text and "src=" not in text


def test_what_is_no_profile_is_one_line(llmc_command, tmp_path: Path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        result = llmc_command("profile", "show", tmp_path / name)
        assert result.status == 1 and len(result.err.splitlines()) == 1
        assert name in result.err


def test_the_cache_lists_and_clears_variants_and_profiles(llmc_command, saved: Path,
                                                          monkeypatch: pytest.MonkeyPatch):
    directory = saved.parent.parent
    monkeypatch.setenv("LLMC_CACHE_DIR", str(directory))
    info = VariantInfo("tokens=8,rows=1", {"tokens": (8, 8)}, "64", "0", 3)
    VariantCache(directory).put("0123", StoredVariant(info, b"code", 1.0, "", "llama 4x64 f32",
                                                      "x86_64:znver3"))
    VariantCache(directory).path("4567").write_bytes(b"broken")
    heads, *lines = llmc_command("cache", "ls").out.splitlines()
    assert heads.split() == ["kind", "model", "target", "variant", "size", "used", "file"]
    (variant,) = (line for line in lines if "0123.variant" in line)
    for fact in ("llama 4x64 f32", "x86_64:znver3", "tokens=8,rows=1", "KB", "s ago"):
        assert fact in variant
    assert any("(damaged)" in line and "4567" in line for line in lines)
    assert any("3 shapes" in line and "profiles/model.json" in line for line in lines)
    entries = json.loads(llmc_command("cache", "ls", "--json").out)
    assert [entry["kind"] for entry in entries] == ["variant", "variant", "profile"]
    assert {"path", "model", "target", "variant", "bytes", "used"} < set(entries[0])
    assert llmc_command("cache", "clear").status == 0
    assert json.loads(llmc_command("cache", "ls", "--json").out) == []


def test_ages_are_in_their_largest_unit():
    assert [age(seconds) for seconds in (-1.0, 5.0, 90.0, 7200.0, 200000.0)] == [
        "0 s", "5 s", "2 min", "2 h", "2 d"]
