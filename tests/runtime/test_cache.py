"""The cache: any number of processes at once, killed ones, damaged entries, no place to write."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmc
from llmc.errors import CacheError
from llmc.runtime.artifact import Artifact, hash_file
from llmc.runtime.cache import Cache
from tests.conftest import EMBEDDED

ROOT = Path(llmc.__file__).parent.parent
LOAD = "import sys, llmc; llmc.Runtime(sys.argv[1], threads=1).close()"


def start(cache: Path, code: str = LOAD) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LLMC_CACHE_DIR": str(cache)}
    return subprocess.Popen([sys.executable, "-c", code, str(EMBEDDED)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def leftovers(cache: Path) -> list[str]:
    """What lies in the cache besides finished entries and locks."""
    return [path.name for path in (cache / "artifacts").iterdir()
            if path.suffix not in (".llmc", ".lock") or path.name.startswith(".")]


@pytest.fixture
def counted(embedded_artifact: Path, tmp_path: Path):
    """A cache and a build function that copies the embedded artifact and counts its calls."""
    calls: list[Path] = []

    def build(path: Path) -> None:
        calls.append(path)
        if path.exists():
            shutil.rmtree(path)
        shutil.copytree(embedded_artifact, path)

    return Cache(tmp_path), build, calls


def test_an_entry_is_built_once(counted):
    cache, build, calls = counted
    first = cache.artifact("key", build)
    assert cache.artifact("key", build).directory == first.directory
    assert len(calls) == 1
    (entry,) = cache.entries()
    assert (entry.kind, entry.variant) == ("artifact", "generic few")
    assert entry.model == "llama 5x64 f32" and entry.target.startswith("x86_64:")
    assert entry.path == first.directory


@pytest.mark.parametrize("damage", ["manifest.json", "weights.bin", "variants/few.o"])
def test_a_damaged_entry_is_rebuilt(counted, damage: str):
    cache, build, calls = counted
    path = cache.artifact("key", build).directory / damage
    path.write_bytes(path.read_bytes()[:-1])
    again = cache.artifact("key", build)
    assert len(calls) == 2
    again.verify()


def test_a_missing_file_of_an_entry_is_rebuilt(counted):
    cache, build, calls = counted
    (cache.artifact("key", build).directory / "variants" / "few.o").unlink()
    cache.artifact("key", build).verify()
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["weights.bin", "files/tokenizer.json", "graph.txt"])
def test_a_changed_byte_of_an_entry_is_found(counted, name: str):
    """Whatever is not hashed at every start is, once it was written."""
    cache, build, calls = counted
    path = cache.artifact("key", build).directory / name
    time.sleep(0.05)  # file times are as coarse as that
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    for _ in range(2):
        Cache(cache.directory.parent).artifact("key", build).verify()
    assert len(calls) == 2


def test_files_that_did_not_change_are_not_read_again(counted, monkeypatch: pytest.MonkeyPatch):
    cache, build, _ = counted
    cache.artifact("key", build)
    read: list[str] = []
    monkeypatch.setattr("llmc.runtime.cache.hash_file",
                        lambda path: read.append(path.name) or hash_file(path))
    Cache(cache.directory.parent).artifact("key", build)
    assert read and "weights.bin" not in read


@pytest.mark.parametrize("damage", ["no manifest", "a file"])
def test_what_is_no_artifact_makes_room_for_one(counted, damage: str):
    cache, build, calls = counted
    path = cache.artifact("key", build).directory
    if damage == "a file":
        shutil.rmtree(path)
        path.write_text("in the way")
    else:
        (path / "manifest.json").unlink()
    cache.artifact("key", lambda path: (path.exists() and pytest.fail("in the way"), build(path)))
    assert len(calls) == 2


def test_damaged_entries_can_be_listed_and_cleared(counted):
    cache, build, _ = counted
    (cache.artifact("key", build).directory / "manifest.json").write_text("{")
    (cache.artifact("other", build).directory / "manifest.json").unlink()
    list(cache.entries())
    assert cache.clear() > 0
    assert not list(cache.directory.glob("*.llmc"))


def test_an_entry_that_is_being_built_is_not_cleared(counted):
    cache, build, _ = counted
    found = cache.artifact("key", lambda path: (build(path), cache.clear()))
    found.verify()


def test_an_empty_cache_lists_nothing_and_clears_nothing(tmp_path: Path):
    cache = Cache(tmp_path / "none")
    assert list(cache.entries()) == []
    assert cache.clear() == 0


def test_processes_that_race_share_one_entry(tmp_path: Path):
    racers = [start(tmp_path) for _ in range(2)]
    for racer in racers:
        _, errors = racer.communicate(timeout=120)
        assert racer.returncode == 0, errors
    (entry,) = Cache(tmp_path).entries()
    Artifact(entry.path).verify()
    assert not leftovers(tmp_path)


def test_a_killed_writer_leaves_nothing_that_is_taken_for_an_entry(tmp_path: Path):
    """Killed between the first byte of the weights and the last."""
    code = ("import signal, os, llmc.driver\n"
            "def stop(self, packed):\n"
            "    self.file.write(memoryview(packed)); self.file.flush()\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "llmc.driver.WeightFile.append = stop\n" + LOAD)
    killed = start(tmp_path, code)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not list(Cache(tmp_path).entries())
    assert not list((tmp_path / "artifacts").glob("[!.]*.llmc"))
    with llmc.Runtime(EMBEDDED, cache_dir=tmp_path, threads=1) as runtime:
        assert runtime.run([1]).shape == (1, 512)
    assert not leftovers(tmp_path), "the next writer sweeps up after the killed one"


@pytest.mark.parametrize("where", ["/proc/llmc", "/dev/null/llmc"])
def test_no_place_to_write_is_a_cache_error(where: str):
    with pytest.raises(CacheError, match="LLMC_CACHE_DIR"):
        llmc.Runtime(EMBEDDED, cache_dir=where)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_cache_is_a_cache_error(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(CacheError, match="LLMC_CACHE_DIR"):
        llmc.Runtime(EMBEDDED, cache_dir=tmp_path)


def test_a_cache_filled_before_can_be_read_only(embedded_artifact: Path, tmp_path: Path):
    """Nothing is written, not even a lock, when the entry is there."""
    cache = Cache(tmp_path)
    cache.artifact("key", lambda path: shutil.copytree(embedded_artifact, path))
    (cache.directory / "key.lock").unlink(missing_ok=True)
    before = sorted(cache.directory.iterdir())
    cache.artifact("key", lambda path: pytest.fail("built again"))
    assert sorted(cache.directory.iterdir()) == before


def test_use_moves_an_entry_to_the_end_of_the_list(counted):
    cache, build, _ = counted
    old, new = (cache.artifact(key, build).directory for key in ("old", "new"))
    for age, path in ((100, new), (200, old)):
        os.utime(path / "manifest.json", (time.time() - age,) * 2)
    assert [entry.path for entry in cache.entries()] == [old, new]
    cache.artifact("old", build)
    assert [entry.path for entry in cache.entries()] == [new, old]
