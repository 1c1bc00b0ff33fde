"""The engine on a model whose every token depends on all pages: nothing lost, mixed up or starved.

Steps are called by hand, so what happens is the same every time.
"""

from __future__ import annotations

import threading
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import LlmcError, ShapeError
from llmc.runtime.pages import PAGE
from llmc.runtime.sampling import Sampling
from llmc.runtime.step import LanguageModel
from llmc.server.engine import Engine, EngineError
from llmc.server.request import EngineStopped, Event, QueueFull, Request, Stream
from tests.server.fake_runtime import (
    POISON,
    VOCABULARY,
    FakeRuntime,
    ForgetfulModel,
    continuation,
)


def make_engine(pages: int = 64, chooses: bool = True, growth_limit: int = 0,
                model: type[LanguageModel] = LanguageModel, **options) -> Engine:
    runtime = FakeRuntime(pages, chooses=chooses, growth_limit=growth_limit, model=model)
    return Engine(runtime, **{"max_batch": 8, **options})


def prompt(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(POISON + 1, VOCABULARY, count).tolist()


def run(engine: Engine, steps: int = 10_000) -> None:
    """Step until nothing is left, checking that nothing is lost."""
    for _ in range(steps):
        progressed = engine.step()
        engine.check()
        if not progressed:
            return
    raise AssertionError("the engine does not come to an end")


def tokens(events: list[Event], choice: int = 0) -> list[int]:
    return [event.token for event in events if event.choice == choice and event.token is not None]


def reasons(events: list[Event]) -> list[str]:
    return [event.finish for event in sorted(events, key=lambda each: each.choice) if event.finish]


def is_empty(engine: Engine) -> bool:
    engine.check()
    pool = engine.model.pool
    return pool.free == pool.size and engine.stats().running == engine.stats().waiting == 0


# ---- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("chooses", [True, False])
@pytest.mark.parametrize("count", [1, 3, 17, 31, 32, 33, 200])
def test_a_request_gets_what_the_model_makes(count: int, chooses: bool):
    engine = make_engine(chooses=chooses)
    stream = engine.submit(Request(prompt(count), max_tokens=40))
    run(engine)
    events = stream.drain()
    expected = continuation(prompt(count), 40)
    assert tokens(events) == expected
    assert reasons(events) == ["length" if len(expected) == 40 else "stop"]
    assert stream.finished and stream.get() is None and is_empty(engine)


def test_stop_ids_end_a_choice_and_are_not_delivered():
    made = continuation(prompt(9), 30, ())
    stop = made[12]
    engine = make_engine()
    stream = engine.submit(Request(prompt(9), 30, stop_ids=frozenset([stop]), ignore_eos=True))
    run(engine)
    events = stream.drain()
    assert tokens(events) == made[:made.index(stop)] and reasons(events) == ["stop"]


def test_stop_ids_may_not_come_before_min_tokens():
    expected = continuation(prompt(9), 30, ())
    stop = expected[0]
    engine = make_engine()
    stream = engine.submit(Request(prompt(9), 30, stop_ids=frozenset([stop]), min_tokens=3))
    run(engine)
    made = tokens(stream.drain())
    assert len(made) >= 3 and stop not in made


def test_generation_ends_where_the_context_does():
    engine = make_engine(pages=2)
    stream = engine.submit(Request(prompt(60), ignore_eos=True))
    run(engine)
    events = stream.drain()
    assert tokens(events) == continuation(prompt(60), 5, ()) and reasons(events) == ["length"]


def test_choices_share_the_pages_of_the_prompt():
    engine = make_engine()
    stream = engine.submit(Request(prompt(70), 8, n=4, ignore_eos=True))
    for running in (1, 1, 4):  # the first computes the prompt, in two steps
        engine.step()
        assert engine.stats().running == running
    run(engine)
    events = stream.drain()
    for choice in range(4):
        assert tokens(events, choice) == continuation(prompt(70), 8, ())
    assert engine.stats().cached_tokens == 3 * 2 * PAGE
    assert reasons(events) == ["length"] * 4 and is_empty(engine)


def test_choices_draw_different_numbers_and_the_seed_repeats_them():
    def made(**settings) -> list[list[int]]:
        engine = make_engine(**settings)
        other = engine.submit(Request(prompt(5, 1), 30))
        sampling = Sampling(temperature=9.0, seed=3, logit_bias={POISON: -1e9})
        stream = engine.submit(Request(prompt(9), 20, sampling, n=3, ignore_eos=True))
        run(engine)
        assert other.drain()
        events = stream.drain()
        return [tokens(events, choice) for choice in range(3)]

    first = made()
    assert first == made(max_batch=2) == made(pages=4) and first[0] != first[1] != first[2]


def test_logprobs_come_with_their_tokens():
    engine = make_engine()
    stream = engine.submit(Request(prompt(9), 3, logprobs=2, ignore_eos=True))
    run(engine)
    for event in stream.drain():
        best = float(-np.log(1 + (VOCABULARY - 1) * np.exp(-9.0)))
        assert event.logprob.token == event.token == event.logprob.top[0][0]
        assert event.logprob.logprob == pytest.approx(best) and len(event.logprob.top) == 2


def test_sequences_that_must_start_whole_do_and_end_where_they_may_not_grow():
    engine = make_engine(growth_limit=50, max_step_tokens=16)
    streams = [engine.submit(Request(prompt(count, count), 30, ignore_eos=True))
               for count in (45, 90, 90)]
    run(engine)
    for stream, count, made in zip(streams, (45, 90, 90), (6, 30, 30), strict=True):
        assert tokens(stream.drain()) == continuation(prompt(count, count), made, ())


# ---- policy -------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_delay_those_that_decode():
    engine = make_engine(max_step_tokens=16)
    short = engine.submit(Request(prompt(4), 60, ignore_eos=True))
    engine.step()
    short.drain()
    long = engine.submit(Request(prompt(300, 1), 2, ignore_eos=True))
    for _ in range(15):
        engine.step()
        assert len(short.drain()) == 1
        assert len(engine.model.executor.steps[-1]["ids"]) == 16
    assert not long.drain()
    run(engine)


def test_steps_that_decode_may_be_shorter_than_others():
    engine = make_engine(max_batch=4, max_step_tokens=100, mixed_step_tokens=1)
    long = engine.submit(Request(prompt(300, 1), 2, ignore_eos=True))
    engine.step()
    short = engine.submit(Request(prompt(4), 60, ignore_eos=True))
    for _ in range(6):
        engine.step()
    lengths = [len(step["ids"]) for step in engine.model.executor.steps]
    assert lengths == [100, 100, 100, 5, 1, 1, 1]
    engine.submit(Request(prompt(150, 2), 2, ignore_eos=True))
    for _ in range(3):
        engine.step()
    lengths = [len(step["ids"]) for step in engine.model.executor.steps][-3:]
    assert lengths == [68, 68, 17]  # one decodes; room for 64 tokens of prompts beside max_batch
    run(engine)
    assert tokens(long.drain()) == continuation(prompt(300, 1), 2, ())
    assert tokens(short.drain()) == continuation(prompt(4), 60, ())


def test_the_first_that_comes_is_the_first_that_is_served():
    engine = make_engine(max_batch=2)
    streams = [engine.submit(Request(prompt(40, seed), 20, ignore_eos=True)) for seed in range(9)]
    run(engine)
    admitted = [stream.times.admitted for stream in streams]
    assert admitted == sorted(admitted)


def test_prefixes_that_were_computed_are_not_computed_again():
    engine = make_engine()
    run_one = [*prompt(96), 7]
    for count in (97, 97, 96, 64, 31):
        stream = engine.submit(Request(run_one[:count], 1, ignore_eos=True))
        run(engine)
        stream.drain()
    lengths = [len(step["ids"]) for step in engine.model.executor.steps]
    assert lengths == [64, 33, 1, 32, 32, 31]
    assert stream.cached_tokens == 0
    assert engine.stats().cached_tokens == 96 + 64 + 32


def test_of_requests_that_come_together_one_computes_what_all_begin_with():
    engine = make_engine(max_step_tokens=100)
    shared = prompt(320)
    streams = [engine.submit(Request([*shared, *prompt(5, seed)], 4, ignore_eos=True))
               for seed in range(6)]
    run(engine)
    for seed, stream in enumerate(streams):
        assert tokens(stream.drain()) == continuation([*shared, *prompt(5, seed)], 4, ())
    assert engine.stats().cached_tokens == 5 * 320
    computed = sum(len(step["ids"]) for step in engine.model.executor.steps)
    assert computed == 320 + 6 * (5 + 3)


def test_without_reuse_every_prompt_is_computed():
    engine = make_engine(reuse=False)
    for _ in range(2):
        engine.submit(Request(prompt(64), 1))
        run(engine)
    assert engine.stats().cached_tokens == 0 and engine.model.pool.cached == 0


@pytest.mark.parametrize("pages", [4, 5, 7, 11])
def test_preempted_requests_lose_nothing(pages: int):
    engine = make_engine(pages=pages)
    streams = [engine.submit(Request(prompt(10 + seed, seed), 90, ignore_eos=True))
               for seed in range(6)]
    run(engine)
    assert engine.stats().preemptions > 0
    for seed, stream in enumerate(streams):
        room = min(90, pages * PAGE - (10 + seed) + 1)
        assert tokens(stream.drain()) == continuation(prompt(10 + seed, seed), room, ())
    assert is_empty(engine)


# ---- ending early -------------------------------------------------------------------------------


def test_a_cancelled_request_gives_everything_back_before_the_next_step():
    engine = make_engine()
    stream = engine.submit(Request(prompt(70), 500, n=3, ignore_eos=True))
    for _ in range(5):
        engine.step()
    stream.cancel()
    engine.step()
    assert is_empty(engine)
    assert reasons(stream.drain()) == ["cancelled"] * 3 and stream.finished
    stream.cancel()
    run(engine)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_consumer_that_has_seen_enough_of_one_choice_ends_it(steps: int):
    engine = make_engine(max_step_tokens=40)
    stream = engine.submit(Request(prompt(70), 12, n=2, ignore_eos=True))
    for _ in range(steps):
        engine.step()
    stream.finish(0)
    run(engine)
    events = stream.drain()
    assert reasons(events) == ["stop", "length"]
    assert tokens(events, 1) == continuation(prompt(70), 12, ())


def test_a_full_queue_refuses_and_takes_again():
    engine = make_engine(max_batch=1, queue_limit=2)
    for _ in range(2):
        engine.submit(Request(prompt(3), 4))
    with pytest.raises(QueueFull, match="try again"):
        engine.submit(Request(prompt(3), 4))
    with pytest.raises(ShapeError, match="n is 3, the queue holds 2"):
        engine.submit(Request(prompt(3), 4, n=3))
    engine.step()
    engine.submit(Request(prompt(3), 4))
    run(engine)


def test_a_draining_engine_takes_nothing_new_and_finishes_the_rest():
    engine = make_engine()
    stream = engine.submit(Request(prompt(3), 20, ignore_eos=True))
    assert not engine.drain(timeout=0)
    with pytest.raises(EngineStopped):
        engine.submit(Request(prompt(3), 4))
    run(engine)
    assert engine.drain(timeout=0) and len(tokens(stream.drain())) == 20


def test_closing_cancels_what_is_left():
    engine = make_engine()
    streams = [engine.submit(Request(prompt(3), 20, ignore_eos=True)) for _ in range(2)]
    engine.step()
    engine.close()
    assert [reasons(stream.drain()) for stream in streams] == [["cancelled"]] * 2
    assert is_empty(engine)


@pytest.mark.parametrize("request_of", [
    lambda: Request([], 4), lambda: Request([VOCABULARY], 4), lambda: Request([3], 0),
    lambda: Request([3], 4, n=0), lambda: Request([3], 4, logprobs=21),
    lambda: Request([3], 4, stop=("",)), lambda: Request([3], min_tokens=-1),
    lambda: Request(prompt(65), 4), lambda: Request([3], 4, Sampling(logit_bias={VOCABULARY: 1}))])
def test_senseless_requests_are_refused(request_of):
    with pytest.raises(ShapeError):
        make_engine(pages=2).submit(request_of())


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_batch": 257},
                                     {"max_step_tokens": 8}, {"max_step_tokens": 5000}])
def test_senseless_limits_are_refused(options):
    with pytest.raises(LlmcError, match="must be in"):
        make_engine(**options)


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LanguageModel, ForgetfulModel])
@pytest.mark.parametrize("bad", [0, 3, 6])
def test_a_chunk_that_fails_ends_its_request_only(bad: int, model):
    engine = make_engine(pages=10, model=model)
    prompts = [prompt(20 + seed, seed) for seed in range(7)]
    prompts[bad] = [*prompts[bad], POISON]
    streams = [engine.submit(Request(each, 40, ignore_eos=True)) for each in prompts]
    run(engine)
    for number, stream in enumerate(streams):
        events = stream.drain()
        if number == bad:
            assert reasons(events) == ["error"] and isinstance(events[-1].error, EngineError)
        else:
            assert tokens(events) == continuation(prompts[number], 40, ())
    assert engine.stats().failed_steps > 0 and is_empty(engine)


def test_an_engine_thread_outlives_steps_that_fail():
    engine = make_engine()
    engine.start()
    try:
        engine.model.executor.failing = True
        assert [event.finish for event in engine.submit(Request(prompt(9), 5))] == ["error"]
        engine.model.executor.failing = False
        events = list(engine.submit(Request(prompt(9), 5)))
        assert tokens(events) == continuation(prompt(9), 5)
    finally:
        engine.close()


def test_a_listener_that_raises_loses_its_request_only():
    def broken(streams):
        raise RuntimeError("gone")

    engine = make_engine()
    lost = engine.submit(Request(prompt(9), 50, ignore_eos=True), broken)
    kept = engine.submit(Request(prompt(9), 50, ignore_eos=True))
    run(engine)
    assert reasons(lost.drain()) == ["cancelled"] and reasons(kept.drain()) == ["length"]


def test_listeners_are_told_once_a_step():
    told: list[tuple[Stream, ...]] = []
    engine = make_engine()
    streams = [engine.submit(Request(prompt(9, seed), 5, n=2, ignore_eos=True), told.append)
               for seed in range(3)]
    engine.step()
    engine.step()
    assert len(told) == 2 and set(told[1]) == set(streams)
    run(engine)


class Alternating:
    """A grammar: odd tokens, then even ones, and so on; over after three."""

    def __init__(self):
        self.seen: list[int] = []

    def mask(self) -> np.ndarray:
        assert threading.current_thread() is not threading.main_thread()
        allowed = np.zeros(64, np.uint8)
        if len(self.seen) < 3:
            allowed[(len(self.seen) + 1) % 2::2] = 1
        return np.packbits(allowed, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        self.seen.append(token)


def test_a_grammar_decides_which_tokens_come():
    engine = make_engine()
    stream = engine.submit(Request(prompt(9), 50, grammar=Alternating, n=2, ignore_eos=True))
    run(engine)
    events = stream.drain()
    for choice in range(2):
        assert [token % 2 for token in tokens(events, choice)] == [1, 0, 1]
    assert reasons(events) == ["stop", "stop"]


def test_a_grammar_that_breaks_fails_alone():
    class Broken(Alternating):
        def accept(self, token: int) -> None:
            raise ValueError("no such token")

    engine = make_engine()
    bad = engine.submit(Request(prompt(9), 50, grammar=Broken, ignore_eos=True))
    good = engine.submit(Request(prompt(9), 5, ignore_eos=True))
    run(engine)
    assert reasons(bad.drain()) == ["error"] and reasons(good.drain()) == ["length"]


# ---- anything, at any time ----------------------------------------------------------------------

PROMPTS = st.tuples(st.lists(st.integers(0, 1), max_size=3), st.integers(1, 40)).map(
    lambda drawn: [*chain(*(prompt(PAGE, seed) for seed in drawn[0])), *prompt(drawn[1], 9)])
ARRIVALS = st.tuples(st.just("arrive"), PROMPTS, st.integers(1, 60), st.integers(1, 3),
                     st.integers(0, 9))
ENDINGS = st.tuples(st.sampled_from(["cancel", "finish"]), st.integers(0, 30), st.integers(0, 2))
ACTIONS = st.lists(st.one_of(ARRIVALS, ARRIVALS, ENDINGS, st.tuples(st.just("step"))), max_size=40)


@settings(max_examples=200, deadline=None)
@given(ACTIONS, st.integers(5, 16), st.integers(1, 6), st.integers(7, 70), st.booleans(),
       st.sampled_from([LanguageModel, ForgetfulModel]))
def test_random_traffic(actions, pages, max_batch, step_tokens, reuse, model):
    """Tiny pools, shared prefixes, choices, poison, requests that end at any time: every stream
    ends, with what the model makes or a part of it; the oldest always goes on."""
    engine = make_engine(pages, max_batch=max_batch, max_step_tokens=step_tokens, reuse=reuse,
                         model=model)
    asked: list[tuple[list[int], int, bool, Stream]] = []
    touched: set[Stream] = set()
    for action in actions:
        if action[0] == "arrive":
            _, ids, limit, n, dice = action
            ids = [*ids, POISON] if dice == 0 else ids
            stream = engine.submit(Request(ids, limit, n=n))
            asked.append((ids, limit, dice == 0, stream))
        elif action[0] == "step":
            step_and_watch(engine)
        elif action[1] < len(asked):
            stream = asked[action[1]][3]
            touched.add(stream)
            if action[0] == "cancel":
                stream.cancel()
            elif action[2] < stream.request.n:
                stream.finish(action[2])
    while step_and_watch(engine):
        pass
    assert is_empty(engine)
    for ids, limit, poisoned, stream in asked:
        events = stream.drain()
        assert stream.finished and len(reasons(events)) == stream.request.n
        for choice in range(stream.request.n):
            made, expected = tokens(events, choice), continuation(ids, limit)
            if poisoned:
                assert made == []
            elif stream in touched:
                assert made == expected[:len(made)]
            else:
                assert made == expected[:pages * PAGE - len(ids) + 1]


def step_and_watch(engine: Engine) -> bool:
    """A step; the oldest choice that runs gets on by it, or ends, if nobody is a suspect."""
    engine._take_news()
    suspects = bool(engine.scheduler.suspects)
    choices = engine.scheduler.running or engine.scheduler.waiting
    oldest = choices[0] if choices else None
    before = (oldest.sequence.length, oldest.made) if oldest else None
    progressed = engine.step()
    engine.check()
    assert progressed == (oldest is not None)
    suspects |= bool(engine.scheduler.suspects)
    if oldest is not None and not oldest.ended and not suspects:
        assert (oldest.sequence.length, oldest.made) > before
    return progressed


def test_many_clients_at_once_get_theirs_and_leave_nothing():
    """Threads that send, read, cancel and give up, on an engine with a thread of its own and too
    few pages."""
    engine = make_engine(12, queue_limit=1000)
    engine.start()
    wrong: list[str] = []

    def client(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(6):
            ids = prompt(int(random.integers(1, 90)), int(random.integers(3)))
            stream = engine.submit(Request(ids, 40, n=int(random.integers(1, 3))))
            patience = int(random.integers(0, 90))
            events = []
            while (event := stream.get(timeout=60)) is not None:
                events.append(event)
                if len(events) == patience:
                    stream.cancel()
            expected = continuation(ids, 40)
            for choice in range(stream.request.n):
                made = tokens(events, choice)
                complete = made == expected or "cancelled" in reasons(events)
                if made != expected[:len(made)] or not complete:
                    wrong.append(f"client {seed}: {made} instead of {expected}")

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(24)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(timeout=120)
    assert not wrong and not any(each.is_alive() for each in clients)
    assert engine.drain(10)
    engine.close()
    assert is_empty(engine) and sum(engine.stats().requests.values()) >= 24 * 6
