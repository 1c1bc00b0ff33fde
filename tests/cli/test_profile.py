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
    profile.model, profile.target = "llama 4x64 f32", "x86_64:znver3"
    for _ in range(9):
        profile.observe((3, 1), "generic", 0.010)
        profile.observe((3, 1), "tokens=3,rows=1", 0.008)
        profile.observe((1, 1), "few", 0.002)
    profile.observe((300, 1), "generic", 0.020)
    profile.verdicts[3, 1] = Verdict("kept", 0.2, 1.5)
    path = tmp_path / "profiles" / "model.json"
    profile.save(path)
    return path


def test_the_histogram_shows_shapes_tiers_waste_and_verdicts(llmc_command, saved: Path):
    result = llmc_command("profile", "show", saved)
    title, heads, *lines = result.out.splitlines()
    assert result.status == 0
    assert title == "llama 4x64 f32 on x86_64:znver3"
    assert heads.split() == ["tokensxrows", "calls", "ms/call", "time", "waste", "tier", "own",
                             "code"]
    assert lines[0].split()[:7] == ["3x1", "18", "9.000", "81.0%", "33.3%", "exact", "kept"]
    assert lines[0].endswith("#" * 13 + "-" * 17), "a mark for each tier's part of the time"
    assert lines[1].split()[:6] == ["300x1", "1", "20.000", "10.0%", "0.0%", "generic"]
    assert lines[2].split()[0] == "1x1" and "ranged" in lines[2]
    assert lines[-2] == "time by tier: exact (#) 36.0%, ranged (=) 9.0%, generic (-) 55.0%"
    assert lines[-1] == "waste, rows of tiles that hold no token: at most 20.2% of the time"


def test_code_for_a_range_is_of_the_ranged_tier(llmc_command, tmp_path: Path):
    profile = Profile(("tokens", "rows"))
    profile.observe((9, 1), "tokens=9..13", 0.010)
    profile.ranges[9, 13] = Verdict("kept", 0.07, 1.0)
    path = tmp_path / "model.json"
    profile.save(path)
    lines = llmc_command("profile", "show", path).out.splitlines()
    assert "ranged" in lines[1]
    assert "code for 9 to 13 tokens: kept +7.0%" in lines


def test_a_graph_without_tokens_has_no_waste(llmc_command, tmp_path: Path):
    profile = Profile(("height", "width"))
    profile.observe((9, 7), "generic", 0.010)
    path = tmp_path / "model.json"
    profile.save(path)
    result = llmc_command("profile", "show", path)
    assert result.status == 0 and "9x7" in result.out and "at most 0.0%" in result.out


def test_the_rest_is_summed_up(llmc_command, saved: Path):
    assert "2 more shapes" in llmc_command("profile", "show", saved, "--top", 1).out


def test_the_page_needs_nothing_else(llmc_command, saved: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    assert llmc_command("profile", "show", saved, "--html", page).status == 0
    text = page.read_text()
    assert "3x1" in text and "kept +20.0%" in text and "33.3%" in text
    assert "class=exact" in text and "class=generic" in text and "at most 20.2%" in text
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
