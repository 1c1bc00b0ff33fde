"""The feed of events: numbered, bounded, printed when asked for."""

from __future__ import annotations

import pytest

from llmc.runtime.events import KEPT_EVENTS, EventFeed


def test_events_are_numbered_and_the_oldest_go():
    feed = EventFeed()
    for number in range(KEPT_EVENTS + 5):
        feed.add("kept", f"tokens={number}", "kept", gain=0.25)
    events = feed.since()
    assert [event.number for event in events] == list(range(6, KEPT_EVENTS + 6))
    assert [event.number for event in feed.since(KEPT_EVENTS + 3)] == [
        KEPT_EVENTS + 4, KEPT_EVENTS + 5]
    assert events[-1].variant == f"tokens={KEPT_EVENTS + 4}"
    assert events[-1].details == {"gain": 0.25}


def test_events_are_printed_when_asked_for(monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]):
    feed = EventFeed()
    feed.add("kept", "tokens=8", "measured gain 3%")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LLMC_LOG", "specialize")
    feed.add("kept", "tokens=8", "measured gain 3%")
    assert capsys.readouterr().err == "llmc specialize: tokens=8: measured gain 3%\n"
