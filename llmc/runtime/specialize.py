"""The policy of specialisation: which shapes get code of their own, and when it goes again.

A thread wakes every INTERVAL seconds, folds the profile, and takes the steps that are due: start
the code that was compiled on every other call of its shape (or on steps of its own, while nobody
wants any), keep it if it is faster by more than noise, ask for code for the shape that it would pay
most for, or for a range where shapes are many, evict what has gone cold. Serving never waits for
any of this. Whatever fails here costs speed only.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, Protocol

from llmc import knobs
from llmc.errors import LlmcError
from llmc.runtime.artifact import Artifact, VariantInfo
from llmc.runtime.cache import StoredVariant, VariantCache, describe
from llmc.runtime.compiler import Compiler, Job, Outcome, Source
from llmc.runtime.dispatch import Dispatch
from llmc.runtime.events import EventFeed
from llmc.runtime.executor import Executor
from llmc.runtime.profile import Profile, Verdict
from llmc.runtime.targets import short_target
from llmc.runtime.tiers import Schedule, compile_cost
from llmc.runtime.traffic import Own, Range, Traffic
from llmc.runtime.trials import LEAST_GAIN, Code, Gain, Pairs

INTERVAL = 0.5  # seconds between two looks at the profile
SAVE_EVERY = 60.0  # seconds
MODES = ("lazy", "eager", "none")
COMPILE_SECONDS = 2.0  # what a compile is expected to take before one was measured
LEAST_CALLS = 8.0  # decayed calls of a shape before anything is expected of it
PATIENCE = 20.0  # seconds that a trial waits for calls of its shape
OUST = 1.2  # by how much a shape must be hotter than the one whose code goes for it
IDLE_LOOKS = 2  # looks without a step after which trials go on by themselves
REHEARSALS = 8  # steps of one look then, at most; and for how many seconds
REHEARSAL_SECONDS = 0.1
MOST_ATTEMPTS = 3  # shapes that are worked on side by side, so that a long trial holds nobody up
TUNING_SECONDS = 5.0  # of steps, after which a trial before ready is not extended

Rehearse = Callable[[Mapping[str, int]], bool]  # run a step of such values unless somebody waits


@dataclass(frozen=True)
class Policy:
    """What the user may choose. mode: lazy, eager or none; promote_after: calls of a shape after
    which its code is compiled and used, without asking whether it pays; code_bytes and
    max_variants: budgets of what is loaded beyond the artifact's own; shapes: for eager, those to
    compile before ready (empty: those that were hot before)."""

    mode: str = "none"
    promote_after: int | None = None
    code_bytes: int = 64 << 20
    max_variants: int = 32
    shapes: Sequence[Mapping[str, int]] = ()


@dataclass
class Promoted:
    """Live code of a shape or range."""

    code: Code
    schedule: Schedule
    bytes: int
    gain: float | None = None


@dataclass
class Attempt:
    """A shape or range on its way to code of its own: schedules still to be tried, and what was
    gained."""

    own: Own
    schedules: list[Schedule]
    best: Schedule | None = None  # that was kept so far
    job: Job | None = None
    stored: StoredVariant | None = None
    trial: Pairs | None = None
    share: float = 1.0  # of the generic time that is left
    compile_seconds: float = 0.0
    seen: int = 0  # calls of the trial at the last look, and seconds since there were new ones
    waited: float = 0.0


class Specialised(Protocol):
    """What is asked of an executor. threads: cores that its steps keep busy; retire: no step will
    choose this variant any more."""

    dispatch: Dispatch
    threads: int

    def load(self, info: VariantInfo, code: bytes, launches: str) -> Code: ...

    def retire(self, variant: Code) -> None: ...


class Specializer:
    """Specialises an executor of any target; only its code comes and goes.

    `tick` does everything; `start` lets a thread call it.
    """

    def __init__(self, executor: Specialised, source: Source, policy: Policy, cache_dir: Path,
                 rehearse: Rehearse | None = None):
        self.executor = executor
        self.dispatch = executor.dispatch
        self.policy = policy
        self.compiler = Compiler(source, VariantCache(cache_dir))
        self.path = cache_dir / "profiles" / f"{source.identity}.json"
        self.traffic = Traffic(executor.dispatch, source.identity,
                               source.target.startswith("nvptx"))
        self.profile.model, self.profile.target = source.model, short_target(source.target)
        self.promoted: dict[Own, Promoted] = {}
        self.attempts: list[Attempt] = []
        self.error = ""  # why the thread gave up, if it did
        self.feed = EventFeed()
        self._rehearse = rehearse
        self._paused: dict[Own, int] = {}  # whose calls stopped in a trial: how many there were
        self._steps = self._idle_looks = 0  # at the last look; looks since there were new ones
        self._compile_seconds = COMPILE_SECONDS
        self._wake = threading.Event()
        self._finalizer = weakref.finalize(self, _stop, self._wake, self.compiler)
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._unsaved = 0.0

    @property
    def profile(self) -> Profile:
        return self.traffic.profile

    # ---- life -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Before ready: take the profile of earlier runs, and the code it found worth its while;
        eager: compile and measure what is asked for, or was hot."""
        self.profile.load(self.path)
        self.traffic.look()
        self.dispatch.profile = self.profile
        kept = self.traffic.kept()
        asked = self._asked() if self.policy.mode == "eager" else []
        for own in [*asked, *(own for own in kept if own not in asked)][:self.policy.max_variants]:
            with suppress(LlmcError):
                if own in kept:
                    self._restore(own, compiles=own in asked)
                elif self.traffic.verdict(own) is None:
                    self._tune(own)

    def _asked(self) -> list[Own]:
        """What eager means: the shapes that the user listed, or those that were hot before."""
        if self.policy.shapes:
            return [self.traffic.asked(given) for given in self.policy.shapes]
        return [heat.shape for heat in self.traffic.hot.values()
                if heat.calls >= LEAST_CALLS and not self.traffic.is_settled(heat.shape)]

    def _restore(self, own: Own, compiles: bool) -> None:
        """Load code that was kept in an earlier run, if it is still there or may be compiled."""
        verdict = self.traffic.verdict(own)
        assert verdict is not None
        job = self._job(own, verdict.schedule)
        stored = self.compiler.cached(job)
        if stored is None and compiles:
            stored = self.compiler.compile(job).variant
        if stored is not None:
            self._promote(own, self._load(stored), verdict.schedule, stored, verdict.gain or None)
            self._decide("ready", own, f"before the first request, gain {verdict.gain:.1%} in an "
                         "earlier run", "specialize='none' starts with generic code",
                         gain=verdict.gain, compile_seconds=verdict.compile_seconds)

    def _tune(self, own: Own) -> None:
        """Compile code by every schedule, and keep the best as measured now; the first one, where
        nothing can be measured."""
        attempt = Attempt(own, self.traffic.schedules(own))
        self.attempts.append(attempt)
        while attempt in self.attempts:
            job = attempt.job = self._job(own, attempt.schedules[0])
            self._receive(attempt, self.compiler.compile(job))
            if attempt.trial is None:
                continue
            trial = attempt.trial
            least = 0.0 if attempt.best is None else LEAST_GAIN  # equal is good enough at first
            while self._rehearse_shapes(attempt):
                if trial.done and (trial.seconds() > TUNING_SECONDS or not trial.extend(least)):
                    break
            self._judge(attempt, trial, wanted=True)

    def start(self, interval: float = INTERVAL) -> None:
        self._thread = threading.Thread(
            target=_run, args=(weakref.ref(self), self._wake, interval), name="llmc-specialize",
            daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and the compiler, save the profile. Nothing after a fork."""
        if self._process != os.getpid():
            return
        self._finalizer()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        for attempt in self.attempts:
            if attempt.trial is not None:
                self._end_trial(attempt.trial)
        self._save()

    # ---- one look -----------------------------------------------------------------------------

    def tick(self, seconds: float = INTERVAL) -> None:
        """Everything that is due. seconds: since the last call."""
        self.traffic.look()
        steps = sum(self.traffic.calls.values())
        self._idle_looks = self._idle_looks + 1 if steps == self._steps else 0
        self._steps = steps
        if len(self.attempts) < MOST_ATTEMPTS and (found := self._next()) is not None:
            self.attempts.append(found)
        with suppress(Empty):
            while True:
                outcome = self.compiler.finished.get_nowait()
                self._receive(next(each for each in self.attempts if each.job is outcome.job),
                              outcome)
        for attempt in list(self.attempts):
            self._advance(attempt, seconds)
        self._unsaved += seconds
        if self._unsaved >= SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        self._unsaved = 0.0
        with suppress(OSError, TimeoutError):  # a read-only or full disk: the next start is colder
            self.profile.save(self.path)

    def _advance(self, attempt: Attempt, seconds: float) -> None:
        if attempt.trial is not None and not attempt.trial.done:
            self._wait(attempt, attempt.trial, seconds)
        elif attempt.trial is not None:
            if not attempt.trial.extend():
                self._judge(attempt, attempt.trial)
        elif attempt.job is None:
            job = self._job(attempt.own, attempt.schedules[0])
            if self.compiler.submit(job):
                attempt.job = job

    def _wait(self, attempt: Attempt, trial: Pairs, seconds: float) -> None:
        """Run steps for a trial while nobody else does; give up one whose shape comes no more,
        until it comes again."""
        attempt.waited = 0.0 if trial.calls != attempt.seen else attempt.waited + seconds
        if self._idle_looks >= IDLE_LOOKS:
            self._rehearse_shapes(attempt)
        attempt.seen = trial.calls
        if attempt.waited > PATIENCE:
            self._end_trial(trial)
            if attempt.best is not None:  # good enough
                self._finish(attempt, 0.0)
            else:
                self._paused[attempt.own] = self._calls_of(attempt.own)
                self.attempts.remove(attempt)

    def _rehearse_shapes(self, attempt: Attempt) -> bool:
        """Some steps for a trial, on no request's behalf; whether there was progress."""
        trial, shapes = attempt.trial, self.traffic.shapes_of(attempt.own)[:REHEARSALS]
        if self._rehearse is None or trial is None or not shapes:
            return False
        calls, until = trial.calls, trial.seconds() + REHEARSAL_SECONDS
        for _ in range(REHEARSALS):
            shape = shapes[trial.calls // REHEARSALS % len(shapes)].shape
            if trial.done or trial.seconds() > until or not self._rehearse(
                    self.traffic.values(shape)):
                break
        return trial.calls > calls

    # ---- an attempt ---------------------------------------------------------------------------

    def _receive(self, attempt: Attempt, outcome: Outcome) -> None:
        """A compile has ended: begin the trial, or take the code as it is."""
        stored, error = outcome.variant, outcome.error
        code = None
        if stored is not None:
            try:
                code = self._load(stored)
            except LlmcError as failure:
                error = str(failure)
        if code is None or stored is None:
            self._decide("failed", attempt.own, f"{error}; it stays on generic code",
                         "specialize='none' does not compile", reason=error)
            self._conclude(attempt, Verdict("failed", reason=error))
            return
        if not outcome.cached:
            self._compile_seconds = 0.5 * (self._compile_seconds + stored.compile_seconds)
        attempt.compile_seconds += stored.compile_seconds
        attempt.stored = stored
        self.feed.add("compiled", outcome.job.name, "taken from the cache" if outcome.cached else
                      f"compiled in {stored.compile_seconds:.1f} s", cached=outcome.cached,
                      compile_seconds=stored.compile_seconds, bytes=len(stored.object),
                      schedule=dict(attempt.schedules[0]))
        if self.policy.promote_after is not None:
            self._promote(attempt.own, code, attempt.schedules[0], stored, None)
            self._decide("kept", attempt.own, f"after {self.policy.promote_after} calls, gain not "
                         "measured", "without promote_after only faster code is kept", gain=None,
                         compile_seconds=stored.compile_seconds, bytes=len(stored.object))
            self._conclude(attempt, Verdict("kept", 0.0, stored.compile_seconds,
                                            schedule=dict(attempt.schedules[0])))
        elif isinstance(attempt.own, Range):
            attempt.trial = self.dispatch.start_range_trial(code)
        else:
            attempt.trial = self.dispatch.start_trial(
                attempt.own, self.traffic.values(attempt.own), code)

    def _judge(self, attempt: Attempt, trial: Pairs, wanted: bool = False) -> None:
        """A trial that is over decides. wanted: by the user, so that equal is good enough."""
        stored, schedule = attempt.stored, attempt.schedules.pop(0)
        assert stored is not None
        first = wanted and attempt.best is None
        gain = trial.gain() if trial.done else None
        faster = first if gain is None else trial.is_faster() or (first and not trial.is_slower())
        self._tell(attempt, stored, schedule, faster, gain)
        if faster:
            attempt.share *= 1.0 - (gain.middle if gain else 0.0)
            attempt.best = schedule
            self._promote(attempt.own, trial.new, schedule, stored, 1.0 - attempt.share)
        self._end_trial(trial)
        attempt.job = attempt.stored = attempt.trial = None
        if not attempt.schedules:
            self._finish(attempt, gain.middle if gain else 0.0)

    def _tell(self, attempt: Attempt, stored: StoredVariant, schedule: Schedule, faster: bool,
              gain: Gain | None) -> None:
        """The decision of a trial."""
        details = vars(gain) if gain else {}
        self._decide(
            "kept" if faster else "dropped", attempt.own,
            f"{dict(schedule) or 'tiles as in generic code'}: gain {gain or 'not measured'}",
            "specialize='none' " + ("keeps generic code" if faster else "tries nothing"),
            gain=details.get("middle"), low=details.get("low"), high=details.get("high"),
            pairs=details.get("pairs", 0), compile_seconds=stored.compile_seconds,
            bytes=len(stored.object), schedule=dict(schedule))

    def _finish(self, attempt: Attempt, gain: float) -> None:
        """All schedules were tried. gain: of the last."""
        state, gain = ("dropped", gain) if attempt.best is None else ("kept", 1.0 - attempt.share)
        self._conclude(attempt, Verdict(state, gain, attempt.compile_seconds,
                                        schedule=dict(attempt.best or {})))

    def _end_trial(self, trial: Pairs) -> None:
        """The old code again; the new code goes, unless it was promoted."""
        self.dispatch.end_trial(trial)
        if trial.new not in self.dispatch.table.variants:
            self.executor.retire(trial.new)

    def _conclude(self, attempt: Attempt, verdict: Verdict) -> None:
        """Remember what became of a shape or range."""
        self.traffic.remember(attempt.own, verdict)
        self.attempts.remove(attempt)

    # ---- choosing -----------------------------------------------------------------------------

    def _next(self) -> Attempt | None:
        """The shape for which code of its own pays most, if it pays for any; else a range."""
        busy = [attempt.own for attempt in self.attempts]
        shapes: list[Own] = list(self.traffic.hot)
        one_range = self.policy.promote_after or any(isinstance(own, Range) for own in busy)
        ranges: list[Own] = [] if one_range else list(self.traffic.ranges(self.promoted))
        for own in [*shapes, *ranges]:
            if own in self.promoted or own in busy or self.traffic.is_settled(own):
                continue
            calls = self._calls_of(own)
            if self._paused.get(own) == calls or not self._pays(own, calls) or not self._fits(own):
                continue
            self._paused.pop(own, None)
            self._decide("compiling", own, self._reason(own), "specialize='none' compiles nothing"
                         + ("" if isinstance(own, Range) else ", 'eager' with shapes=["
                            f"{self.traffic.sizes(own)}] before the first request"))
            return Attempt(own, self.traffic.schedules(own))
        return None

    def _calls_of(self, own: Own) -> int:
        """Calls of this process."""
        return sum(self.traffic.calls.get(heat.shape, 0) for heat in self.traffic.shapes_of(own))

    def _pays(self, own: Own, calls: int) -> bool:
        if self.policy.promote_after is not None:
            return calls >= self.policy.promote_after
        return self.traffic.heat(own, self.promoted).calls >= LEAST_CALLS and self._saving(
            own) > compile_cost(self._expected_seconds(own), knobs.cores(), self.executor.threads)

    def _reason(self, own: Own) -> str:
        if self.policy.promote_after is not None:
            return f"promote_after={self.policy.promote_after} calls were reached"
        return f"expected gain {self.traffic.expected_gain(own):.1%}"

    def _expected_seconds(self, own: Own) -> float:
        """Of compiling, in another process."""
        count = len(self.traffic.schedules(own)) if self.policy.promote_after is None else 1
        return self._compile_seconds * count

    def _saving(self, own: Own) -> float:
        """Seconds that its own code is expected to save before the shape has gone cold."""
        return self.traffic.heat(own, self.promoted).seconds * self.traffic.expected_gain(own)

    def _fits(self, own: Own) -> bool:
        """Whether there is room, or something much colder to evict: by what came lately."""
        if len(self.promoted) < self.policy.max_variants and self._bytes() < self.policy.code_bytes:
            return True
        return bool(self.promoted) and self.traffic.heat(own).recent > OUST * min(
            self.traffic.heat(other).recent for other in self.promoted)

    def _bytes(self) -> int:
        return sum(promoted.bytes for promoted in list(self.promoted.values()))

    def _load(self, stored: StoredVariant) -> Code:
        return self.executor.load(stored.info, stored.object, stored.launches)

    def _job(self, own: Own, schedule: Schedule) -> Job:
        return Job(self.traffic.name(own), self.traffic.key(own), schedule)

    def _promote(self, own: Own, code: Code, schedule: Schedule, stored: StoredVariant,
                 gain: float | None) -> None:
        """Put code into the table in place of the old code of its own, and keep the budgets."""
        old = self.promoted.pop(own, None)
        self.promoted[own] = Promoted(code, schedule, len(stored.object), gain)
        self.dispatch.replace(add=[code], remove=[old.code] if old else [])
        if old:
            self.executor.retire(old.code)
        while len(self.promoted) > 1 and (len(self.promoted) > self.policy.max_variants
                                          or self._bytes() > self.policy.code_bytes):
            self.evict(min((other for other in self.promoted if other != own), key=self._warmth))

    def _warmth(self, own: Own) -> tuple[float, float]:
        """What is least of it is the coldest: time that goes to it lately, then time at all."""
        heat = self.traffic.heat(own)
        return heat.recent, heat.seconds

    def evict(self, own: Own) -> None:
        """Take code out of the table; it is freed behind the last step that uses it."""
        full = len(self.promoted) > self.policy.max_variants
        gone = self.promoted.pop(own)
        self.dispatch.replace(remove=[gone.code])
        self.executor.retire(gone.code)
        option = (f"max_variants={len(self.promoted) + 1}" if full else
                  f"code_budget_mb={-(-(self._bytes() + gone.bytes) // (1 << 20))}")
        gain = "not measured" if gone.gain is None else f"{gone.gain:.1%}"
        self._decide("evicted", own, f"the coldest, gain {gain}", f"{option} keeps it",
                     gain=gone.gain, bytes=gone.bytes)

    # ---- seeing it ----------------------------------------------------------------------------

    def _decide(self, kind: str, own: Own, why: str, option: str, **details: Any) -> None:
        """An event with what decisions rest on, and the option that would have avoided it."""
        heat = self.traffic.heat(own, self.promoted)
        facts = {"calls": heat.calls, "mean_seconds": heat.mean,
                 "saving_seconds": self._saving(own),
                 "compile_seconds": self._expected_seconds(own), **details}
        self.feed.add(kind, self.traffic.name(own), (
            f"{kind}: {why}; {heat.calls:.0f} calls of {heat.mean * 1e3:.2f} ms, expected saving "
            f"{facts['saving_seconds']:.2f} s, compile {facts['compile_seconds']:.1f} s; {option}"),
            **facts)

    def gains(self) -> dict[str, float | None]:
        """Measured gain of all live code of hot shapes and ranges, by the variant's name."""
        return {promoted.code.info.name: promoted.gain
                for promoted in list(self.promoted.values())}

    def stats(self) -> dict[str, Any]:
        """Live code and the verdicts, for people and programs."""
        return {
            "mode": self.policy.mode, "error": self.error, "code_bytes": self._bytes(),
            "trying": [self.traffic.name(attempt.own) for attempt in list(self.attempts)],
            "promoted": {p.code.info.name: {"gain": p.gain, "bytes": p.bytes,
                                            "schedule": dict(p.schedule)}
                         for p in list(self.promoted.values())},
            "verdicts": self.traffic.verdicts()}


def specialize(executor: Executor, policy: Policy, cache_dir: Path,
               rehearse: Rehearse | None = None) -> Specializer | None:
    """Begin to specialise an executor: what is ready before the first request is. None where there
    is nothing to specialise: all sizes are fixed, or (if lazy) the artifact lacks its graph."""
    if policy.mode == "none" or not executor.dispatch.names:
        return None
    source = make_source(executor.artifact, executor.code_target, executor.code_versions)
    if source is None:
        if policy.mode == "lazy":
            return None
        raise LlmcError(f"{executor.artifact.directory} was written by an older llmc: compile the "
                        "model again to specialise it")
    specializer = Specializer(executor, source, policy, cache_dir, rehearse)
    specializer.prepare()
    specializer.start()
    return specializer


def make_source(artifact: Artifact, target: str, versions: str = "") -> Source | None:
    """What an artifact's further variants are made from; None if it lacks its graph."""
    generic = next(info for info in artifact.manifest.variants if info.name == "generic")
    graph = artifact.graph_text()
    if graph is None:
        return None
    return Source(graph, artifact.program_text(generic), target, versions,
                  describe(artifact.manifest))


def _run(reference: weakref.ref[Specializer], wake: threading.Event, interval: float) -> None:
    """The thread: holds the specializer only while it works, so that it can be collected."""
    while not wake.wait(interval):
        specializer = reference()
        if specializer is None:
            return
        try:
            specializer.tick(interval)
        except Exception as error:  # a fault of ours: serving goes on with what there is
            specializer.error = f"{type(error).__name__}: {error}"
            specializer.feed.add("stopped", "", f"stopped: {specializer.error}",
                                 reason=specializer.error)
            return
        del specializer


def _stop(wake: threading.Event, compiler: Compiler) -> None:
    wake.set()
    compiler.close()
