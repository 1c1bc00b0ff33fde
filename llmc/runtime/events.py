"""What specialisation did, as it happens: a bounded feed that programs can follow, and a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmc import knobs

KEPT_EVENTS = 1024
KINDS = ("compiling", "compiled", "failed", "kept", "dropped", "ready", "evicted", "stopped")


@dataclass(frozen=True)
class Event:
    """number: 1, 2, ...; time: seconds since 1970; kind: one of KINDS; variant: its name; text:
    one line for people; details: numbers of this kind (calls and mean_seconds, decayed;
    saving_seconds, expected; compile_seconds; gain, measured, with low, high and pairs; bytes,
    schedule, reason)."""

    number: int
    time: float
    kind: str
    variant: str
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)


class EventFeed:
    """The last KEPT_EVENTS events. Any thread may add or read."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._lock = threading.Lock()
        self._number = 0

    def add(self, kind: str, variant: str, text: str, **details: Any) -> None:
        """Keep an event; print it with LLMC_LOG=specialize."""
        with self._lock:
            self._number += 1
            self._events.append(Event(self._number, time.time(), kind, variant, text, details))
        if "specialize" in knobs.log_topics():
            print(f"llmc specialize: {variant + ': ' if variant else ''}{text}", file=sys.stderr,
                  flush=True)

    def since(self, number: int = 0) -> list[Event]:
        """Events with a greater number, oldest first; a gap in the numbers says that some are
        gone."""
        with self._lock:
            return [event for event in self._events if event.number > number]
