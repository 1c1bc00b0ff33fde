"""Text of streams: characters whole, stop strings found wherever tokens are cut."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmc
from llmc.frontend.tokenizer import Tokenizer
from llmc.server.detokenizer import ChoiceText, Delta, TextStream
from llmc.server.engine import Engine
from llmc.server.request import Event, LoopWaker, Request, Stream
from tests.server.fake_runtime import FakeRuntime

STORIES = Path(llmc.__file__).parent / "data" / "stories260K"
TOKENIZER = Tokenizer.load(STORIES)


def push_all(text: str, stop: tuple[str, ...]) -> tuple[list[str], ChoiceText]:
    """The pieces that come of a text's tokens, up to a stop string."""
    choice = ChoiceText(TOKENIZER, [], stop)
    pieces = []
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        pieces.append(choice.push(token))
        if choice.stopped is not None:
            return pieces, choice
    return [*pieces, choice.finish()], choice


@settings(max_examples=150, deadline=None)
@given(st.text("ab😀é ", max_size=20), st.lists(st.text("ab😀é ", min_size=1, max_size=4),
                                                max_size=3))
def test_text_ends_at_the_first_stop_string(text: str, stop: list[str]):
    text = TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False))
    pieces, choice = push_all(text, tuple(stop))
    places = [text.find(each) for each in stop if each in text]
    if not places:
        assert "".join(pieces) == text and choice.stopped is None
    else:
        # of stop strings that overlap, one that is complete earlier may begin later
        got = "".join(pieces)
        assert text.startswith(got + choice.stopped)
        assert len(got) <= min(text.find(each) + len(each) for each in stop if each in text)
        assert not any(each in got for each in stop)


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not():
    pieces, choice = push_all("aab", ("aabb",))
    assert "".join(pieces[:-1]) == "" and pieces[-1] == "aab" and choice.stopped is None


def test_nothing_is_held_back_without_need():
    pieces, _ = push_all("Once upon a time", ())
    assert all(pieces[:-1])


def make_stream(ended: list, n: int = 1, stop: tuple[str, ...] = ()) -> Stream:
    return Stream(Request([3], 9, n=n, stop=stop), None,
                  lambda stream, choice: ended.append(choice))


def test_a_choice_ends_at_its_stop_string_and_the_engine_is_told_once():
    ended: list = []
    stream = make_stream(ended, n=2, stop=("b",))
    text = TextStream(stream, TOKENIZER)
    a, b = TOKENIZER.token_id("a"), TOKENIZER.token_id("b")
    for event in (Event(0, a), Event(1, a), Event(0, b), Event(0, a), Event(0, finish="stop"),
                  Event(1, a, finish="length")):
        stream.put(event)
    deltas = list(text)
    assert ended == [0]
    assert [(d.choice, d.text, d.finish, d.stop) for d in deltas] == [
        (0, "a", None, None), (1, "a", None, None), (0, "", "stop", "b"), (1, "a", "length", None)]
    assert text.completion_tokens == 4


def test_held_back_text_comes_with_the_end():
    stream = make_stream([], stop=("ab",))
    stream.put(Event(0, TOKENIZER.token_id("a")))
    stream.put(Event(0, finish="length"))
    assert [delta.text for delta in TextStream(stream, TOKENIZER)] == ["", "a"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_split_over_tokens_comes_whole(cut: int):
    stream = make_stream([])
    ids = TOKENIZER.encode("😀", add_special_tokens=False)[-4:]
    for token in ids[:-cut]:
        stream.put(Event(0, token))
    stream.put(Event(0, finish="length"))
    texts = [delta.text for delta in TextStream(stream, TOKENIZER)]
    assert set(texts[:-1]) == {""} and "\ufffd" in texts[-1]


def test_threads_and_coroutines_read_the_same():
    engine = Engine(FakeRuntime(), max_batch=4)
    engine.start()

    def request() -> Request:
        return Request([7, 8, 9], 30, n=2, ignore_eos=True)

    async def read(waker: LoopWaker) -> list[Delta]:
        return [delta async for delta in TextStream(engine.submit(request(), waker), TOKENIZER)]

    async def read_many() -> list[list[Delta]]:
        waker = LoopWaker(asyncio.get_running_loop())
        return await asyncio.gather(*(read(waker) for _ in range(6)))

    found = [sorted_texts(deltas) for deltas in asyncio.run(read_many())]
    threads = [threading.Thread(target=lambda: found.append(sorted_texts(
        TextStream(engine.submit(request()), TOKENIZER)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert len(found) == 9 and found == [found[0]] * 9 and found[0][0][0]


def sorted_texts(deltas) -> list[tuple[str, str]]:
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for delta in deltas:
        texts[delta.choice] = texts.get(delta.choice, "") + delta.text
        ends[delta.choice] = delta.finish or ends.get(delta.choice, "")
    return [(texts[choice], ends[choice]) for choice in sorted(texts)]


def test_waiting_for_an_event_has_a_limit():
    with pytest.raises(TimeoutError, match="no event"):
        make_stream([]).get(timeout=0.01)
