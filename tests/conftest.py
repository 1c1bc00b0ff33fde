"""What every test may use: a cache directory of the session, and the embedded model compiled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmc

GOLDENS = Path(__file__).parent / "goldens"
EMBEDDED = Path(llmc.__file__).parent / "data" / "stories260K"


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LLMC_CACHE_DIR of this session; its workers share it, so that a model is compiled once."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "llmc-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE_DIR", str(directory))
        yield directory


@pytest.fixture(scope="session", autouse=True)
def checked_passes() -> Iterator[None]:
    """Whatever a test compiles: its graph and what every pass makes of it are checked."""
    from llmc import driver
    from tests.checked import checked_optimize

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "optimize", checked_optimize)
        yield


@pytest.fixture(scope="session")
def embedded_artifact() -> Path:
    """The embedded model's artifact in the cache; tests must not change it."""
    return llmc.compile(EMBEDDED).path


@pytest.fixture
def embedded_runtime(embedded_artifact: Path) -> Iterator[llmc.Runtime]:
    with llmc.Runtime(embedded_artifact, threads=2) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def embedded_goldens() -> list[dict]:
    """prompt, prompt_ids, greedy_ids (past the end of text), text."""
    return json.loads((GOLDENS / "models" / "stories260K" / "golden.json").read_text())["goldens"]
