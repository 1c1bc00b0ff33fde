"""A progress bar on stderr, only where somebody looks (a terminal)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmc.runtime.progress import Progress, silent


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yields a function (phase, share done); the bar appears with its first call."""
    if not sys.stderr.isatty():
        yield silent
        return
    bar = _Bar()
    try:
        yield bar.update
    finally:
        bar.stop()


class _Bar:
    """rich is imported when the first phase is reported: most starts are hot and have none."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def update(self, phase: str, share: float) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(console=Console(stderr=True), transient=True)
            self._bar.start()
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=1.0)
        self._bar.update(self._tasks[phase], completed=share)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
