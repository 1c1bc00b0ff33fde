"""The engine: many requests, one step at a time.

    engine = Engine(runtime, max_batch=32)
    engine.start()
    for event in engine.submit(Request(prompt_ids, max_tokens=16)):
        ...
    engine.close()

A step is: schedule (which tokens), run (one call of Runtime.step), postprocess (choose tokens, hand
them out). It waits for nothing else: requests arrive through a queue and leave through their
Streams; text is made from tokens by whoever reads a Stream. An Engine owns its Runtime: nothing
else may step it or generate with it meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from llmc.errors import LlmcError, ShapeError
from llmc.runtime.pages import PAGE
from llmc.runtime.sampling import NO_TOKEN, Sampler, TokenLogprob, token_logprob
from llmc.runtime.step import GREEDY, Chunk
from llmc.server.request import EngineStopped, Event, Matcher, QueueFull, Request, Stream, Wake
from llmc.server.scheduler import Choice, Plan, Scheduler

MOST_RECORDS = 1024
LEAST_PROMPT_TOKENS = 2 * PAGE  # that a step has room for, whatever decodes
IDLE_SECONDS = 0.001  # between looks at a queue whose head does not fit


class EngineError(LlmcError):
    """A fault of ours while a request was served; the request ends with it."""


class StepRecord(NamedTuple):
    """One step: when it began (time.time()), what it computed, and seconds of its parts."""

    at: float
    tokens: int
    sequences: int
    rows: int
    schedule: float
    run: float
    postprocess: float


class Done(NamedTuple):
    """What a step computed. rows: the choices that an output row is for; output: logits
    [rows, vocab], or tokens [rows]."""

    choices: Sequence[Choice]
    rows: Sequence[Choice]
    output: np.ndarray


@dataclass(frozen=True)
class Stats:
    """Counters since the start, and what there is now.

    waiting, running: choices; requests: finished choices by reason ("stop", "length",
    "cancelled", "error"); prompt_tokens: computed or found, each time a choice is admitted;
    cached_tokens: those that were found; generated_tokens: delivered; seconds_*: of all steps.
    """

    waiting: int
    running: int
    pages: int
    pages_used: int
    pages_cached: int
    requests: dict[str, int]
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    failed_steps: int
    seconds_schedule: float
    seconds_run: float
    seconds_postprocess: float


class Engine:
    """Serves requests on a Runtime that holds a language model.

    max_batch: most sequences that run at once; max_step_tokens: most tokens of a step (default:
    what the runtime likes), more than max_batch; mixed_step_tokens: the same for steps that a
    decoding sequence waits for (default: no fewer), raised to let prompts go on beside max_batch
    such sequences; queue_limit: most choices that wait; reuse: whether sequences that begin alike
    share pages. LlmcError if the runtime cannot do that.
    """

    def __init__(self, runtime: Any, *, max_batch: int = 32, max_step_tokens: int | None = None,
                 mixed_step_tokens: int | None = None, queue_limit: int = 256, reuse: bool = True):
        self.runtime = runtime
        self.model = model = runtime.language_model
        self.queue_limit = queue_limit
        self.capacity = min(model.max_context, model.pool.size * PAGE)  # tokens of a sequence
        step_tokens = max_step_tokens or max(model.chunk_tokens, max_batch + PAGE)
        most = min(model.logit_rows, model.most_sequences)
        if not 1 <= max_batch <= most:
            raise LlmcError(f"max_batch must be in 1..{most} for this model, got {max_batch}")
        if not max_batch < step_tokens <= model.most_tokens:
            raise LlmcError(f"max_step_tokens must be in {max_batch + 1}..{model.most_tokens}, "
                            f"got {step_tokens}")
        mixed = max(mixed_step_tokens or step_tokens, max_batch + LEAST_PROMPT_TOKENS)
        self.scheduler = Scheduler(model.pool, model.release, max_batch, step_tokens,
                                   model.growth_limit, reuse and model.reuses_prefixes,
                                   min(mixed, step_tokens))
        self.sampler = Sampler(max_batch, runtime.config["vocab_size"])
        self.recent: deque[StepRecord] = deque(maxlen=MOST_RECORDS)
        self._live: dict[Stream, list[Choice]] = {}
        self._news = threading.Condition()  # guards the next three; told of every change
        self._arrivals: deque[tuple[Stream, list[Choice]]] = deque()
        self._endings: deque[tuple[Stream, int | None]] = deque()
        self._state = "serving"  # then "draining", "stopped"
        self._thread: threading.Thread | None = None
        self._masks = ThreadPoolExecutor(1, "llmc-masks")
        self._told: list[tuple[Stream, Event]] = []  # of this step
        self._tidings: SimpleQueue[list[tuple[Stream, Event]] | None] = SimpleQueue()
        self._teller = threading.Thread(target=self._hand_out_all, name="llmc-teller", daemon=True)
        self._numbers = 0
        self._finished: Counter[str] = Counter()
        self._generated = self._steps = self._failed = 0
        self._seconds = [0.0, 0.0, 0.0]

    # ---- from any thread ----------------------------------------------------------------------

    def submit(self, request: Request, wake: Wake | None = None) -> Stream:
        """Queue a request; its events come through the Stream, and `wake` is told of them once a
        step (see `LoopWaker`; it must not block, as it tells of all streams).

        ShapeError if the request does not fit the model, or can never fit the queue; QueueFull if
        too many wait, EngineStopped while draining. Whatever `request.grammar` raises.
        """
        ids = self.runtime.check_ids(request.prompt_ids)
        if len(ids) > self.capacity:
            raise ShapeError(f"the prompt has {len(ids)} tokens, the context holds "
                             f"{self.capacity}")
        if request.n > self.queue_limit:
            raise ShapeError(f"n is {request.n}, the queue holds {self.queue_limit} answers")
        request.sampling.check(self.sampler.vocabulary)
        stream = Stream(request, wake, self._request_end)
        matchers = [request.grammar() if request.grammar else None for _ in range(request.n)]
        with self._news:
            if self._state != "serving":
                raise EngineStopped("the server is shutting down")
            waiting = len(self.scheduler.waiting) + sum(len(each) for _, each in self._arrivals)
            if waiting + request.n > self.queue_limit:
                raise QueueFull(f"{waiting} answers are waited for already, the queue holds "
                                f"{self.queue_limit}: try again later")
            self._arrivals.append((stream, self._choices(request, stream, ids, matchers)))
            self._news.notify_all()
        return stream

    def _choices(self, request: Request, stream: Stream, ids: np.ndarray,
                 matchers: Sequence[Matcher | None]) -> list[Choice]:
        self._numbers += 1
        whole_above = self.scheduler.whole_above
        short = not 0 < whole_above < len(ids)
        room = min(self.capacity, whole_above if short and whole_above else self.capacity)
        limit = min(request.max_tokens or room + 1, room - len(ids) + 1)
        ends = request.stop_ids
        if not request.ignore_eos:
            ends |= frozenset(self.runtime.config.get("eos_token_ids") or ())
        ends = frozenset(token for token in ends if 0 <= token < self.sampler.vocabulary)
        choices = [Choice(request, stream, ids, index, (self._numbers, index), limit, ends,
                          matcher, short) for index, matcher in enumerate(matchers)]
        choices[0].siblings = choices[1:]
        return choices

    def _request_end(self, stream: Stream, choice: int | None) -> None:
        with self._news:
            self._endings.append((stream, choice))
            self._news.notify_all()

    def start(self) -> None:
        """Serve in a thread of the engine's own."""
        self._thread = threading.Thread(target=self._serve, name="llmc-engine", daemon=True)
        self._teller.start()
        self._thread.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that are there; whether all have finished."""
        with self._news:
            self._state = "draining" if self._state == "serving" else self._state
            self._news.notify_all()
            return self._news.wait_for(lambda: not self._live and not self._arrivals, timeout)

    def close(self) -> None:
        """Cancel what is left, and stop the thread. The Runtime stays open."""
        with self._news:
            self._state = "stopped"
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._take_news()
        for stream in list(self._live):
            self._end_request(stream, "cancelled")
        self._tell()
        self._masks.shutdown(cancel_futures=True)
        self._tidings.put(None)
        if self._thread is not None:
            self._teller.join()

    def stats(self) -> Stats:
        """What there is now, and counters since the start."""
        pool = self.model.pool
        scheduler = self.scheduler
        return Stats(
            len(scheduler.waiting) + len(self._arrivals), len(scheduler.running), pool.size,
            pool.size - pool.free, pool.cached, dict(self._finished), scheduler.preemptions,
            scheduler.prefix_queried, scheduler.prefix_found, self._generated, self._steps,
            self._failed, *self._seconds)

    def check(self) -> None:
        """LlmcError if a page, a slot or a request is lost. Not while a step runs."""
        self.scheduler.check()
        placed = {id(choice) for choice in self.scheduler.running + self.scheduler.waiting}
        for stream, choices in self._live.items():
            held = {id(each) for choice in choices for each in choice.siblings}
            for choice in choices:
                if not choice.ended and id(choice) not in placed | held:
                    raise LlmcError(f"request {stream.request.id}: choice {choice.index} is lost")
        live = {id(choice) for choices in self._live.values() for choice in choices}
        if not placed <= live:
            raise LlmcError("a choice runs or waits whose request is over")

    # ---- the engine's thread ------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(self._has_work)
                if self._state == "stopped":
                    return
            try:
                if not self.step():
                    time.sleep(IDLE_SECONDS)
            except Exception as error:  # a fault of ours: those that run pay, the engine goes on
                for stream in list(self._live):
                    self._end_request(stream, "error", error)
                self._tell()

    def _has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(self._arrivals or self._endings or scheduler.running or scheduler.waiting
                    or self._state == "stopped")

    def step(self) -> bool:
        """Take in what has arrived, and run one step; whether there was anything to compute."""
        began = time.perf_counter()
        self._take_news()
        plan = self.scheduler.schedule()
        for choice in plan.admitted:
            self._admit(choice)
        scheduled = time.perf_counter()
        results = self._run(plan.choices, plan.chunks) if plan.chunks else []
        ran = time.perf_counter()
        for done in results:
            self._postprocess(done)
        self._tell()
        if plan.chunks:
            rows = sum(len(done.rows) for done in results)
            self._record(plan, rows, scheduled - began, ran - scheduled,
                         time.perf_counter() - ran)
        return bool(plan.chunks)

    def _take_news(self) -> None:
        """Requests that arrived, and those that are to end."""
        if not self._arrivals and not self._endings:
            return
        with self._news:
            arrivals, self._arrivals = self._arrivals, deque()
            endings, self._endings = self._endings, deque()
            self._live.update(arrivals)
        for _, choices in arrivals:
            self.scheduler.add(choices[0])
        for stream, index in endings:
            if index is None:
                self._end_request(stream, "cancelled")
            elif stream in self._live:
                choice = self._live[stream][index]
                if not choice.ended:
                    self._end(choice, Event(index, finish="stop"))

    def _admit(self, choice: Choice) -> None:
        """A choice begins to run, for the first time or again."""
        ids = choice.ids
        self.sampler.assign(choice.slot, choice.request.sampling, choice.index,
                            ids[:choice.prompt_length], ids[choice.prompt_length:])
        stream = choice.stream
        if stream.times.admitted is None:
            stream.times.admitted = time.perf_counter()
            stream.cached_tokens = choice.sequence.length
        if choice.matcher is not None and choice.mask is None:
            choice.mask = self._masks.submit(choice.matcher.mask)

    # ---- running ------------------------------------------------------------------------------

    def _run(self, choices: Sequence[Choice], chunks: Sequence[Chunk]) -> list[Done]:
        """Run chunks, in one step or more: where one fails its halves are tried, so that only the
        requests end whose chunks fail alone. Where a failure costs the sequences their past, they
        are computed again, each alone."""
        rows = [choice for choice, chunk in zip(choices, chunks, strict=True) if chunk.wanted]
        greedy = bool(rows) and self.model.chooses and all(map(self._is_plain, rows))
        try:
            output = self.runtime.step(chunks, GREEDY if greedy else "logits")
        except Exception as error:
            self._failed += 1
            if len(chunks) == 1:
                self._end_request(choices[0].stream, "error", error)
                return []
            if not self.model.reuses_prefixes:
                for choice in choices:
                    self.scheduler.suspect(choice)
                return []
        else:
            return [Done(choices, rows, output)]
        half = len(chunks) // 2
        done = self._run(choices[:half], chunks[:half])
        rest = [number for number in range(half, len(chunks)) if not choices[number].ended]
        if rest:
            done += self._run([choices[number] for number in rest],
                              [chunks[number] for number in rest])
        return done

    def _is_plain(self, choice: Choice) -> bool:
        """Whether its next token is the likeliest, and nothing else is to be known."""
        request = choice.request
        return (self.sampler.greedy[choice.slot] and choice.matcher is None
                and request.logprobs is None and choice.made >= request.min_tokens)

    def _postprocess(self, done: Done) -> None:
        """Choose a token for every choice whose tokens are all computed, and hand it out."""
        self.scheduler.computed(done.choices)
        if not done.rows:
            return
        logprobs: dict[int, TokenLogprob] = {}
        if done.output.ndim == 1:
            tokens = done.output.tolist()
        else:
            tokens, logprobs = self._sample(done.rows, done.output)
        for row, (choice, token) in enumerate(zip(done.rows, tokens, strict=True)):
            if not choice.ended:  # by another chunk of its request that failed
                self._deliver(choice, token, logprobs.get(row))

    def _sample(self, rows: Sequence[Choice], logits: np.ndarray
                ) -> tuple[list[int], dict[int, TokenLogprob]]:
        """Tokens of all rows of logits, and what is to be told of them by row."""
        wanted = {row: (logits[row].copy(), choice.request.logprobs)
                  for row, choice in enumerate(rows) if choice.request.logprobs is not None}
        banned = {row: list(choice.stop_ids) for row, choice in enumerate(rows)
                  if choice.made < choice.request.min_tokens and choice.stop_ids}
        slots, positions = [choice.slot for choice in rows], [choice.count for choice in rows]
        tokens = self.sampler.sample(logits, slots, positions, self._ready_masks(rows), banned)
        return tokens, {row: token_logprob(raw, tokens[row], top or 0)
                        for row, (raw, top) in wanted.items() if tokens[row] != NO_TOKEN}

    def _ready_masks(self, rows: Sequence[Choice]) -> dict[int, np.ndarray]:
        """The masks of choices that have a grammar, which were made while the step ran."""
        masks = {}
        for row, choice in enumerate(rows):
            if choice.mask is not None and not choice.ended:
                try:
                    masks[row] = np.asarray(choice.mask.result(), np.uint32)
                except Exception as error:
                    self._end_request(choice.stream, "error", error)
        return masks

    # ---- handing out --------------------------------------------------------------------------

    def _deliver(self, choice: Choice, token: int, logprob: TokenLogprob | None) -> None:
        """A choice's next token."""
        if token == NO_TOKEN and choice.matcher is None:
            error = EngineError("the model's logits are not finite: no token can be chosen")
            self._end_request(choice.stream, "error", error)
            return
        if token == NO_TOKEN or token in choice.stop_ids:
            self._end(choice, Event(choice.index, finish="stop"))
            return
        choice.append(token)
        self.sampler.observe(choice.slot, token)
        self._generated += 1
        event = Event(choice.index, token, logprob)
        if choice.count >= choice.most:
            event.finish = "length"
            self._end(choice, event)
            return
        if choice.matcher is not None:
            choice.mask = self._masks.submit(_advance, choice.matcher, token)
        self._told.append((choice.stream, event))

    def _end(self, choice: Choice, event: Event) -> None:
        """A choice is over: what it holds is free, and its last event goes out."""
        assert event.finish is not None
        choice.ended = True
        self.scheduler.remove(choice)
        self.scheduler.free_siblings(choice)
        self._finished[event.finish] += 1
        self._told.append((choice.stream, event))
        if all(each.ended for each in self._live[choice.stream]):
            with self._news:
                del self._live[choice.stream]
                self._news.notify_all()  # who drains waits for the last

    def _end_request(self, stream: Stream, finish: str, error: Exception | None = None) -> None:
        """All choices of a request that are not over yet are."""
        if error is not None and not isinstance(error, LlmcError):
            error = EngineError(f"{type(error).__name__}: {error}")
        for choice in list(self._live.get(stream, ())):
            if not choice.ended:
                self._end(choice, Event(choice.index, finish=finish, error=error))

    def _tell(self) -> None:
        """Put the step's events into their streams and wake who reads them: by a thread of its own,
        while the next step runs. (Waking another thread would let that go first.)"""
        told, self._told = self._told, []
        if told and self._teller.is_alive():
            self._tidings.put(told)
        elif told:
            self._hand_out(told)

    def _hand_out_all(self) -> None:
        while (told := self._tidings.get()) is not None:
            self._hand_out(told)

    def _hand_out(self, told: Sequence[tuple[Stream, Event]]) -> None:
        for stream, event in told:
            stream.put(event)
        groups: dict[Wake, list[Stream]] = {}
        for stream in dict.fromkeys(stream for stream, _ in told):
            if stream.wake is None:
                stream.notify()
            else:
                groups.setdefault(stream.wake, []).append(stream)
        for wake, streams in groups.items():
            try:
                wake(streams)
            except Exception:  # whoever listened is gone
                for stream in streams:
                    self._request_end(stream, None)

    def _record(self, plan: Plan, rows: int, *seconds: float) -> None:
        self._steps += 1
        self._seconds = [total + part for total, part in zip(self._seconds, seconds, strict=True)]
        self.recent.append(StepRecord(time.time(), plan.tokens, len(plan.chunks), rows, *seconds))


def _advance(matcher: Matcher, token: int) -> np.ndarray:
    """The mask of the token after this one."""
    matcher.accept(token)
    return matcher.mask()
