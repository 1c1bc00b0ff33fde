"""Every environment variable that llmc reads, in one place; read when asked, never at import."""

from __future__ import annotations

import os
from pathlib import Path

from llmc.errors import LlmcError

MOST_THREADS = 1024  # of a host's step
MOST_DIGITS = 18  # of a number: one that no computer counts to is a mistake


def cache_directory() -> Path:
    """LLMC_CACHE_DIR: where compiled models are kept (default: the platform's cache directory)."""
    if configured := os.environ.get("LLMC_CACHE_DIR"):
        return Path(configured)
    import platformdirs

    return Path(platformdirs.user_cache_dir("llmc", appauthor=False))


def threads() -> int | None:
    """LLMC_THREADS: host threads of a step (None: as many as the model's size pays for)."""
    count = positive("LLMC_THREADS")
    if count is not None and count > MOST_THREADS:
        raise LlmcError(f"LLMC_THREADS must be at most {MOST_THREADS}, got {count}")
    return count


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(name: str) -> int | None:
    """A variable that must be a positive integer; None when it is not set."""
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < 1:
        raise LlmcError(f"{name} must be a positive integer, got {text[:40]!r}")
    return int(text)


def specialize() -> str:
    """LLMC_SPECIALIZE: lazy (default), eager or none; see `llmc.runtime.session.Options`."""
    return os.environ.get("LLMC_SPECIALIZE") or "lazy"


def promote_after() -> int | None:
    """LLMC_PROMOTE_AFTER: calls after which a shape gets its own code (None: when it pays)."""
    return positive("LLMC_PROMOTE_AFTER")


def code_budget_mb() -> int:
    """LLMC_CODE_BUDGET_MB: most memory for the code of hot shapes."""
    return positive("LLMC_CODE_BUDGET_MB") or 64


def max_variants() -> int:
    """LLMC_MAX_VARIANTS: most variants for hot shapes."""
    return positive("LLMC_MAX_VARIANTS") or 32


def no_interpret() -> bool:
    """LLMC_NO_INTERPRET=1: any use of the NumPy evaluation at run time is an error."""
    return os.environ.get("LLMC_NO_INTERPRET", "") not in ("", "0")


def log_topics() -> frozenset[str]:
    """LLMC_LOG: comma-separated topics to print to stderr."""
    return frozenset(filter(None, os.environ.get("LLMC_LOG", "").split(",")))
