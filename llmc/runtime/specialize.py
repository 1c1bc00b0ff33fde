"""The policy of specialisation: which shapes get code of their own, and when it goes again.

A thread wakes every INTERVAL seconds, folds the profile, and takes the steps that are due: start
the code that was compiled on every other call of its shape, keep it if it is faster by more than
noise, ask for code for the shape that it would pay most for, evict what has gone cold. Serving
never waits for any of this. Whatever fails here costs speed only.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, Protocol

from llmc.errors import LlmcError
from llmc.runtime.artifact import Artifact, VariantInfo
from llmc.runtime.cache import StoredVariant, VariantCache
from llmc.runtime.compiler import Compiler, Job, Outcome, Source
from llmc.runtime.dispatch import Code, Dispatch, Trial
from llmc.runtime.events import EventFeed
from llmc.runtime.executor import Executor
from llmc.runtime.profile import Heat, Profile, Shape, Verdict

INTERVAL = 0.5  # seconds between two looks at the profile
SAVE_EVERY = 60.0  # seconds
MODES = ("lazy", "eager", "none")
COMPILE_SECONDS = 2.0  # what a compile is expected to take before one was measured
LEAST_CALLS = 8.0  # decayed calls of a shape before anything is expected of it
PATIENCE = 60.0  # seconds that a trial waits for calls of its shape
OUST = 1.5  # by how much a shape must be hotter than the one whose code goes for it


@dataclass(frozen=True)
class Tier:
    """Token counts low..high: the schedules worth trying for exact code, in that order, and the
    share of the time that the first is expected to save."""

    low: int
    high: int | None
    gain: float
    schedules: tuple[Mapping[str, int], ...]


# Measured on Zen 3 at 1B shapes (docs/specialisation.md). Register tiles have up to matmul_rows
# rows: a count just above a multiple of it wastes most, and smaller tiles fit some counts better.
# Up to few_rows, a weight is streamed once past rows that every worker prepares for itself.
TIERS = (
    Tier(1, 4, 0.02, ({},)),
    Tier(5, 6, 0.06, ({"few_rows": 6},)),
    Tier(7, 8, 0.10, ({"matmul_rows": 4},)),
    Tier(9, 10, 0.05, ({"matmul_rows": 5},)),
    Tier(11, 12, 0.02, ({},)),
    Tier(13, 15, 0.02, ({"matmul_rows": 5}, {})),
    Tier(16, 16, 0.05, ({"matmul_rows": 4},)),
    Tier(17, None, 0.02, ({},)),
)


def find_tier(tokens: int) -> Tier:
    for tier in TIERS:
        if tier.low <= tokens and (tier.high is None or tokens <= tier.high):
            return tier
    return TIERS[-1]


@dataclass(frozen=True)
class Policy:
    """What the user may choose. mode: lazy, eager or none; promote_after: calls of a shape after
    which its code is compiled and used, without asking whether it pays; code_bytes and
    max_variants: budgets of what is loaded beyond the artifact's own; shapes: for eager, those to
    compile before ready (empty: those that were kept before)."""

    mode: str = "none"
    promote_after: int | None = None
    code_bytes: int = 64 << 20
    max_variants: int = 32
    shapes: Sequence[Mapping[str, int]] = ()


@dataclass(frozen=True)
class SeenShape:
    """A shape of the profile. calls, seconds: decayed; variant: what runs it now; verdict: what
    became of its own code (kept, dropped, failed, or "": not tried), gain: share of the time that
    this saves."""

    shape: Mapping[str, int]
    calls: float
    seconds: float
    variant: str
    verdict: str = ""
    gain: float | None = None


@dataclass
class Promoted:
    """Live code of one shape."""

    code: Code
    schedule: Mapping[str, int]
    bytes: int
    gain: float | None = None


@dataclass
class Attempt:
    """A shape on its way to code of its own: schedules still to be tried, and what was gained."""

    shape: Shape
    schedules: list[Mapping[str, int]]
    job: Job | None = None
    stored: StoredVariant | None = None
    trial: Trial | None = None
    share: float = 1.0  # of the generic time that is left
    compile_seconds: float = 0.0
    seen: int = 0  # calls of the trial at the last look, and seconds since there were new ones
    waited: float = 0.0


class Specialised(Protocol):
    """What is asked of an executor. retire: no step will choose this variant any more."""

    dispatch: Dispatch

    def load(self, info: VariantInfo, code: bytes, launches: str) -> Code: ...

    def retire(self, variant: Code) -> None: ...


class Specializer:
    """Specialises an executor of any target; only its code comes and goes.

    `tick` does everything; `start` lets a thread call it.
    """

    def __init__(self, executor: Specialised, source: Source, policy: Policy, cache_dir: Path):
        self.executor = executor
        self.dispatch = dispatch = executor.dispatch
        self.policy = policy
        self.compiler = Compiler(source, VariantCache(cache_dir))
        self.path = cache_dir / "profiles" / f"{self.compiler.source.identity}.json"
        self.profile = Profile(dispatch.names)
        self.promoted: dict[Shape, Promoted] = {}
        self.attempt: Attempt | None = None
        self.error = ""  # why the thread gave up, if it did
        self.feed = EventFeed()
        self._hot: dict[Shape, Heat] = {}  # hottest first, as of the last look
        self._calls: dict[Shape, int] = {}  # of this process, as of the last look
        self._paused: dict[Shape, int] = {}  # shapes that stopped coming in a trial: calls then
        self._compile_seconds = COMPILE_SECONDS
        self._wake = threading.Event()
        self._finalizer = weakref.finalize(self, _stop, self._wake, self.compiler)
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._unsaved = 0.0

    # ---- life -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Before ready: take the profile of earlier runs, and the code it found worth its while;
        eager: compile what is missing or asked for."""
        self.profile.load(self.path)
        self._hot = {heat.shape: heat for heat in self.profile.hottest()}
        self.dispatch.profile = self.profile
        for shape in self._wanted()[:self.policy.max_variants]:
            verdict = self.profile.verdicts.get(shape)
            kept = verdict is not None and self._is_current(verdict) and verdict.state == "kept"
            schedule = verdict.schedule if kept and verdict else self._schedules(shape)[0]
            job = self._job(shape, schedule)
            stored = self.compiler.cached(job)
            if stored is None and self.policy.mode == "eager":
                stored = self.compiler.compile(job).variant
            if stored is not None:
                with suppress(LlmcError):
                    self._promote(shape, self._load(stored), schedule, stored,
                                  verdict.gain if kept and verdict else None)
                    self.feed.add("ready", job.name, "ready before the first request")

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
        if self.attempt is not None and self.attempt.trial is not None:
            self._end_trial(self.attempt, self.attempt.trial)
        self._save()

    def _load(self, stored: StoredVariant) -> Code:
        return self.executor.load(stored.info, stored.object, stored.launches)

    # ---- one look -----------------------------------------------------------------------------

    def tick(self, seconds: float = INTERVAL) -> None:
        """Everything that is due. seconds: since the last call."""
        self.profile.fold()
        self._hot = {heat.shape: heat for heat in self.profile.hottest()}
        self._calls = self.profile.calls()
        if self.attempt is None:
            self.attempt = self._next()
        if self.attempt is not None:
            self._advance(self.attempt, seconds)
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
            self._judge(attempt, attempt.trial)
        elif attempt.job is None:
            self._request(attempt)
        else:
            with suppress(Empty):
                self._receive(attempt, self.compiler.finished.get_nowait())

    def _request(self, attempt: Attempt) -> None:
        job = self._job(attempt.shape, attempt.schedules[0])
        if self.compiler.submit(job):
            attempt.job = job

    def _receive(self, attempt: Attempt, outcome: Outcome) -> None:
        """A compile has ended: begin the trial, or take the code as it is."""
        stored, name = outcome.variant, outcome.job.name
        code = None
        error = outcome.error
        if stored is not None:
            try:
                code = self._load(stored)
            except LlmcError as failure:
                error = str(failure)
        if code is None or stored is None:
            self._conclude(attempt, Verdict("failed", reason=error))
            self.feed.add("failed", name, f"not compiled: {error}; it stays on generic code "
                          "(specialize='none' does not compile)", reason=error)
            return
        if not outcome.cached:
            self._compile_seconds = 0.5 * (self._compile_seconds + stored.compile_seconds)
        attempt.compile_seconds += stored.compile_seconds
        self.feed.add("compiled", name, "taken from the cache" if outcome.cached else
                      f"compiled in {stored.compile_seconds:.1f} s", cached=outcome.cached,
                      compile_seconds=stored.compile_seconds, bytes=len(stored.object),
                      schedule=dict(attempt.schedules[0]))
        if self.policy.promote_after is not None:
            self._promote(attempt.shape, code, attempt.schedules[0], stored, None)
            self.feed.add("kept", name, f"used after {self.policy.promote_after} calls "
                          "(promote_after)", gain=None, bytes=len(stored.object))
            self._conclude(attempt, Verdict("kept", 0.0, stored.compile_seconds,
                                            schedule=dict(attempt.schedules[0])))
            return
        attempt.stored = stored
        attempt.trial = self.dispatch.start_trial(attempt.shape, self._values(attempt.shape), code)

    def _wait(self, attempt: Attempt, trial: Trial, seconds: float) -> None:
        """Give up a trial whose shape comes no more, until it comes again."""
        attempt.waited = 0.0 if trial.calls != attempt.seen else attempt.waited + seconds
        attempt.seen = trial.calls
        if attempt.waited > PATIENCE:
            self._paused[attempt.shape] = self._calls.get(attempt.shape, 0)
            self._end_trial(attempt, trial)
            self.attempt = None

    def _end_trial(self, attempt: Attempt, trial: Trial) -> None:
        """The old code again; the new code goes, unless it was promoted."""
        self.dispatch.end_trial(attempt.shape)
        if trial.new not in self.dispatch.table.variants:
            self.executor.retire(trial.new)

    def _judge(self, attempt: Attempt, trial: Trial) -> None:
        """A trial that is done decides."""
        if trial.extend():
            return
        stored, schedule = attempt.stored, attempt.schedules.pop(0)
        assert stored is not None
        gain, noise, faster = trial.gain(), trial.noise(), trial.is_faster()
        state = "kept" if faster else "dropped"
        self.feed.add(state, stored.info.name, f"{dict(schedule) or 'as generic'}: measured gain "
                      f"{gain:.1%} +- {noise:.1%}: {state}", gain=gain, noise=noise,
                      bytes=len(stored.object), schedule=dict(schedule))
        if faster:
            attempt.share *= 1.0 - gain
            self._promote(attempt.shape, trial.new, schedule, stored, 1.0 - attempt.share)
        self._end_trial(attempt, trial)
        attempt.job = attempt.stored = attempt.trial = None
        if not attempt.schedules:
            kept = self.promoted.get(attempt.shape)
            state, best = ("kept", kept.schedule) if kept else ("dropped", {})
            self._conclude(attempt, Verdict(state, gain if not kept else 1.0 - attempt.share,
                                            attempt.compile_seconds, schedule=dict(best)))

    def _conclude(self, attempt: Attempt, verdict: Verdict) -> None:
        """Remember what became of a shape, with the compiler that it became of."""
        current = {"sources": self.compiler.source.identity}
        self.profile.verdicts[attempt.shape] = Verdict(**{**vars(verdict), **current})
        self.attempt = None

    # ---- choosing -----------------------------------------------------------------------------

    def _next(self) -> Attempt | None:
        """The shape for which code of its own pays most, if it pays for any."""
        for heat in self._hot.values():
            verdict = self.profile.verdicts.get(heat.shape)
            concluded = verdict is not None and self._is_current(verdict)
            if heat.shape in self.promoted or (concluded and verdict and verdict.state != "kept"):
                continue
            if self._paused.get(heat.shape) == self._calls.get(heat.shape, 0):
                continue
            if not self._pays(heat) or not self._fits(heat):
                continue
            self._paused.pop(heat.shape, None)
            schedules = self._schedules(heat.shape)
            if concluded and verdict:  # evicted, and hot again
                schedules = [verdict.schedule]
            saving = self._saving(heat)
            self.feed.add("compiling", self._name(heat.shape), f"{heat.calls:.0f} calls of "
                          f"{heat.mean * 1e3:.2f} ms, expected saving {saving:.1f} s: compiling",
                          calls=heat.calls, mean_seconds=heat.mean, saving_seconds=saving)
            return Attempt(heat.shape, schedules)
        return None

    def _pays(self, heat: Heat) -> bool:
        if self.policy.promote_after is not None:
            return self._calls.get(heat.shape, 0) >= self.policy.promote_after
        return heat.calls >= LEAST_CALLS and self._saving(heat) > self._compile_seconds * len(
            self._schedules(heat.shape))

    def _saving(self, heat: Heat) -> float:
        """Seconds that its own code is expected to save before the shape has gone cold."""
        verdict = self.profile.verdicts.get(heat.shape)
        known = verdict.gain if verdict is not None and self._is_current(verdict) else 0.0
        return heat.seconds * (known or find_tier(self._tokens(heat.shape)).gain)

    def _fits(self, heat: Heat) -> bool:
        """Whether there is room, or something much colder to evict."""
        if len(self.promoted) < self.policy.max_variants and self._bytes() < self.policy.code_bytes:
            return True
        return bool(self.promoted) and heat.seconds > OUST * min(
            self._heat(shape).seconds for shape in self.promoted)

    def _bytes(self) -> int:
        return sum(promoted.bytes for promoted in self.promoted.values())

    def _heat(self, shape: Shape) -> Heat:
        return self._hot.get(shape) or Heat(shape, 0.0, 0.0)

    def _promote(self, shape: Shape, code: Code, schedule: Mapping[str, int],
                 stored: StoredVariant, gain: float | None) -> None:
        """Put code into the table in place of the shape's old code, and keep the budgets."""
        old = self.promoted.pop(shape, None)
        self.promoted[shape] = Promoted(code, schedule, len(stored.object), gain)
        self.dispatch.replace(add=[code], remove=[old.code] if old else [])
        if old:
            self.executor.retire(old.code)
        while len(self.promoted) > 1 and (len(self.promoted) > self.policy.max_variants
                                          or self._bytes() > self.policy.code_bytes):
            self.evict(min((own for own in self.promoted if own != shape),
                           key=lambda own: self._heat(own).seconds))

    def evict(self, shape: Shape) -> None:
        """Take a shape's code out of the table; it is freed behind the last step that uses it."""
        gone = self.promoted.pop(shape)
        self.dispatch.replace(remove=[gone.code])
        self.executor.retire(gone.code)
        self.feed.add("evicted", gone.code.info.name,
                      "evicted as the coldest (max_variants, code_budget_mb)", bytes=gone.bytes)

    # ---- shapes -------------------------------------------------------------------------------

    def _wanted(self) -> list[Shape]:
        """Shapes whose code should be ready before the first request, the hottest first."""
        if self.policy.mode == "eager" and self.policy.shapes:
            return [self._asked(given) for given in self.policy.shapes]
        found = []
        for heat in self._hot.values():
            verdict = self.profile.verdicts.get(heat.shape)
            if verdict is not None and self._is_current(verdict):
                wanted = verdict.state == "kept"
            else:
                wanted = self.policy.mode == "eager" and heat.calls >= LEAST_CALLS
            if wanted:
                found.append(heat.shape)
        return found

    def _asked(self, given: Mapping[str, int]) -> Shape:
        """The shape of what the user wrote; of symbols that were left out there are as few as can
        be."""
        if unknown := set(given) - set(self.dispatch.names):
            raise LlmcError(f"unknown symbol {', '.join(sorted(unknown))} in shapes; this model "
                            f"has {', '.join(self.dispatch.names)}")
        values = {}
        for name in self.dispatch.names:
            low, high = self.dispatch.limits[name]
            value = given.get(name, max(low, 1))
            if not isinstance(value, int) or not low <= value <= high:
                raise LlmcError(f"{name} in shapes must be in {low}..{high}, got {value!r}")
            values[name] = value
        return self.dispatch.shape(values)

    def _is_current(self, verdict: Verdict) -> bool:
        return verdict.sources == self.compiler.source.identity

    def _tokens(self, shape: Shape) -> int:
        return dict(zip(self.dispatch.names, shape, strict=True)).get("tokens", 0)

    def _schedules(self, shape: Shape) -> list[Mapping[str, int]]:
        return list(find_tier(self._tokens(shape)).schedules)

    def _values(self, shape: Shape) -> dict[str, int]:
        """Values of all symbols that are such a shape."""
        return {name: low for name, (low, _) in self.dispatch.key(shape).items()}

    def _name(self, shape: Shape) -> str:
        return ",".join(f"{n}={v}" for n, v in zip(self.dispatch.names, shape, strict=True))

    def _job(self, shape: Shape, schedule: Mapping[str, int]) -> Job:
        return Job(self._name(shape), self.dispatch.key(shape), schedule)

    def gains(self) -> dict[str, float | None]:
        """Measured gain of every live variant of a hot shape, by the variant's name."""
        return {own.code.info.name: own.gain for own in list(self.promoted.values())}

    def shapes(self) -> list[SeenShape]:
        """The shapes that arrive, the one that most time goes to first."""
        self.profile.fold()
        return [self._seen(heat) for heat in self.profile.hottest()]

    def _seen(self, heat: Heat) -> SeenShape:
        verdict = self.profile.verdicts.get(heat.shape)
        values = dict(zip(self.dispatch.names, heat.shape, strict=True))
        code = self.dispatch.table.choose(heat.shape, self._values(heat.shape))
        return SeenShape(values, heat.calls, heat.seconds, code.info.name,
                         verdict.state if verdict else "", verdict.gain if verdict else None)

    def stats(self) -> dict[str, Any]:
        """Live code and the verdicts, for people and programs."""
        return {
            "mode": self.policy.mode, "error": self.error, "code_bytes": self._bytes(),
            "compiling": self._name(self.attempt.shape) if self.attempt else None,
            "promoted": {p.code.info.name: {"gain": p.gain, "bytes": p.bytes,
                                            "schedule": dict(p.schedule)}
                         for p in list(self.promoted.values())},
            "verdicts": {self._name(shape): verdict.state
                         for shape, verdict in list(self.profile.verdicts.items())}}


def specialize(executor: Executor, policy: Policy, cache_dir: Path) -> Specializer | None:
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
    specializer = Specializer(executor, source, policy, cache_dir)
    specializer.prepare()
    specializer.start()
    return specializer


def make_source(artifact: Artifact, target: str, versions: str = "") -> Source | None:
    """What an artifact's further variants are made from; None if it lacks its graph."""
    generic = next(info for info in artifact.manifest.variants if info.name == "generic")
    graph = artifact.graph_text()
    if graph is None:
        return None
    return Source(graph, artifact.program_text(generic), target, versions)


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

